"""The training libraries with formats of their own: litdata, MDS, webdataset. Each shuffles as it sees fit."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench.rounds import BATCH, Batch, Order
from tests.bench.store import KEEP, RECORDS_PER_SHARD

FILE_BYTES = 64 << 20
SHUFFLE_BUFFER = 1000


class Litdata:
    """Tensors, read by iteration, as its loader does; asked by number it is slower."""

    name = "litdata (iterated, its own shuffle)"

    def __init__(self, folder: Path) -> None:
        import litdata
        import litdata.streaming.cache

        self._folder, self._library = folder, litdata

    def write(self, points: NDArray[Any]) -> None:
        cache = self._library.streaming.cache.Cache(str(self._folder), chunk_bytes=FILE_BYTES)
        for number, point in enumerate(points):
            cache[number] = {"number": number, "points": torch.from_numpy(np.array(point))}
        cache.done()
        cache.merge()

    def open(self) -> None:
        self._dataset = self._library.StreamingDataset(str(self._folder), shuffle=True)

    def epoch(self, order: Order) -> Iterator[Batch]:
        for samples in _batched(self._dataset):
            yield _numbers(samples), torch.stack([sample["points"] for sample in samples])

    def close(self) -> None:
        del self._dataset


class Mds:
    """An array a sample, read by iteration, as a DataLoader over it does."""

    name = "mosaicml-streaming MDS (iterated, its own shuffle)"

    def __init__(self, folder: Path) -> None:
        # Its package imports its pictures' part, that torchvision, and that must be of torch's own build: MDS needs
        # neither.
        sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
        import streaming

        self._folder, self._library = folder, streaming

    def write(self, points: NDArray[Any]) -> None:
        columns = {"number": "int", "points": f"ndarray:float16:{','.join(map(str, points.shape[1:]))}"}
        with self._library.MDSWriter(out=str(self._folder), columns=columns, size_limit=FILE_BYTES) as writer:
            for number, point in enumerate(points):
                writer.write({"number": number, "points": np.array(point)})

    def open(self) -> None:
        self._dataset = self._library.StreamingDataset(local=str(self._folder), batch_size=BATCH, shuffle=True)

    def epoch(self, order: Order) -> Iterator[Batch]:
        for samples in _batched(self._dataset):
            yield _numbers(samples), torch.from_numpy(np.stack([sample["points"] for sample in samples]))

    def close(self) -> None:
        del self._dataset


class MdsByNumber(Mds):
    """The same files, asked for one sample at a time in our order: faster, and not what its loader does."""

    name = "mosaicml-streaming MDS (by number)"

    def epoch(self, order: Order) -> Iterator[Batch]:
        for numbers in order.reshape(-1, BATCH):
            samples = [self._dataset[number] for number in numbers.tolist()]
            yield numbers, torch.from_numpy(np.stack([sample["points"] for sample in samples]))


class Webdataset:
    """It has no order of its own: shards in random order, then a shuffle buffer, as its users do."""

    name = f"webdataset (sequential, shuffle buffer {SHUFFLE_BUFFER})"

    def __init__(self, folder: Path) -> None:
        import webdataset

        self._folder, self._library = folder, webdataset

    def write(self, points: NDArray[Any]) -> None:
        per_file, pattern = KEEP * RECORDS_PER_SHARD, str(self._folder / "%06d.tar")
        with self._library.ShardWriter(pattern, maxcount=per_file, verbose=0) as writer:
            for number, point in enumerate(points):
                writer.write({"__key__": f"{number:08d}", "npy": np.array(point)})

    def open(self) -> None:
        files = sorted(map(str, self._folder.glob("*.tar")))
        stored = self._library.WebDataset(files, shardshuffle=len(files))
        self._batches = stored.shuffle(SHUFFLE_BUFFER).decode().to_tuple("__key__", "npy").batched(BATCH)

    def epoch(self, order: Order) -> Iterator[Batch]:
        for keys, points in self._batches:
            yield np.array([int(key) for key in keys]), torch.from_numpy(points)

    def close(self) -> None:
        del self._batches


def _batched(samples: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == BATCH:
            yield batch
            batch = []


def _numbers(samples: list[dict[str, Any]]) -> Order:
    return np.array([int(sample["number"]) for sample in samples])
