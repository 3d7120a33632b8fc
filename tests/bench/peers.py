"""What others would store and read these points with, each as its own users do: files that can be asked for a point.

Where a peer can be asked for one point, it is asked in the same shuffled order as we are; its points are stacked into
a fresh batch, which is what its loader would do. None of them is a dependency of the project: one that is not
installed is named and left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from tests.bench.rounds import BATCH, Batch, Order
from tests.bench.store import OurReader, place


class Lookup:
    """A reader that is asked for one point at a time."""

    name: str

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def point(self, number: int) -> NDArray[Any]:
        raise NotImplementedError

    def epoch(self, order: Order) -> Iterator[Batch]:
        for numbers in order.reshape(-1, BATCH):
            yield numbers, torch.from_numpy(np.stack([self.point(number) for number in numbers.tolist()]))


class Safetensors(Lookup):
    name = "safetensors get_slice"

    def __init__(self, folder: Path) -> None:
        import safetensors.numpy

        super().__init__(folder)
        self._library: Any = safetensors

    def write(self, points: NDArray[Any]) -> None:
        self._library.numpy.save_file({"points": points}, self._folder / "points.safetensors")

    def open(self) -> None:
        self._file = self._library.safe_open(self._folder / "points.safetensors", "np")
        self._points = self._file.get_slice("points")

    def point(self, number: int) -> NDArray[Any]:
        return self._points[number]

    def close(self) -> None:
        del self._file, self._points


class Lmdb(Lookup):
    """Bytes under a key, as CausVid and Self-Forcing keep their trajectories; stacked with no copy between."""

    name = "LMDB"

    def __init__(self, folder: Path) -> None:
        import lmdb

        super().__init__(folder)
        self._library: Any = lmdb

    def write(self, points: NDArray[Any]) -> None:
        self._shape, size = points.shape[1:], 2 * points.nbytes + (16 << 20)
        with (
            self._library.open(str(self._folder), map_size=size) as environment,
            environment.begin(write=True) as transaction,
        ):
            for number, point in enumerate(points):
                transaction.put(f"points_{number}".encode(), point.tobytes())

    def open(self) -> None:
        self._environment = self._library.open(str(self._folder), readonly=True, lock=False, readahead=False)

    def point(self, number: int) -> NDArray[Any]:
        with self._environment.begin() as transaction:
            data = transaction.get(f"points_{number}".encode())
        return np.frombuffer(data, np.float16).reshape(self._shape)

    def close(self) -> None:
        self._environment.close()


class LmdbAsTensors(Lmdb):
    """As their datasets read it: a tensor of its own for each, which the loader collates. Theirs are cast to float32
    besides; here they stay as they are."""

    name = "LMDB (as Self-Forcing's dataset reads it)"

    def epoch(self, order: Order) -> Iterator[Batch]:
        for numbers in order.reshape(-1, BATCH):
            yield numbers, default_collate([torch.tensor(self.point(number)) for number in numbers.tolist()])


class Tensorstore:
    """Stock tensorstore on the Zarr shards that we wrote: a batch's points are asked for together."""

    name = "tensorstore (on our Zarr shards)"

    def __init__(self, ours: OurReader) -> None:
        import tensorstore

        self._ours, self._library = ours, tensorstore

    def write(self, points: NDArray[Any]) -> None:
        """They stand there already."""

    def open(self) -> None:
        stores = [{"driver": "file", "path": f"{path}/points/"} for path in self._ours.shard_paths()]
        opening = [self._library.open({"driver": "zarr3", "kvstore": store}) for store in stores]
        self._arrays = [array.result() for array in opening]

    def epoch(self, order: Order) -> Iterator[Batch]:
        for numbers in order.reshape(-1, BATCH):
            places = map(place, numbers.tolist())
            reading = [self._arrays[shard][record, point].read() for shard, record, point in places]
            yield numbers, torch.from_numpy(np.stack([point.result() for point in reading]))

    def close(self) -> None:
        del self._arrays


class ZarrPython(Lookup):
    """Stock zarr-python on the Zarr shards that we wrote."""

    name = "zarr-python (on our Zarr shards)"

    def __init__(self, ours: OurReader) -> None:
        import zarr

        self._ours, self._library = ours, zarr

    def write(self, points: NDArray[Any]) -> None:
        """They stand there already."""

    def open(self) -> None:
        self._arrays = [self._library.open_array(path / "points", mode="r") for path in self._ours.shard_paths()]

    def point(self, number: int) -> NDArray[Any]:
        shard, record, point = place(number)
        return self._arrays[shard][record, point]

    def close(self) -> None:
        del self._arrays
