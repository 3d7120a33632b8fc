"""ShardSet: the one face of a set on disk. Harvest writes records through it, training reads points through it.

shards = ShardSet.create(set_dir, contract)       or ShardSet.open(set_dir): a set cut short is a normal set
shards.commit(records, numerics)                  shard on disk, then its receipt: that is the commit
for receipt in shards.manifest().receipts:
    shard = shards.read(receipt)
    shard.read_point(record, point, out)          into your buffer, checked at first touch
    shard.record(i)                               a whole Record

set/ contract.json  receipts/<item>.json  shards/<item>-<digest>.zarr  assets/  runs/
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from common import shards_zarr
from common.errors import BadUsage, Corrupt, Refused
from common.extents import crc32c
from common.files import sweep, write_atomic, write_folder
from common.manifest import Manifest, Receipt, fold
from common.record import Array, Contract, Numerics, Record
from common.shard_header import FIELDS, ShardHeader

CONTRACT_NAME, RECEIPTS, SHARDS, ASSETS, RUNS, QUARANTINE = (
    "contract.json",
    "receipts",
    "shards",
    "assets",
    "runs",
    "quarantine",
)
MAX_RECORDS_PER_SHARD = 2048
"""So that a receipt stays within its two kilobytes."""
LEFT_OVER_AFTER_S = 3600.0


def is_held_out(prompt: str) -> bool:
    """One prompt in fifty is never trained on, whatever its seeds."""
    return crc32c(prompt.encode()) % 50 == 0


class ShardSet:
    """A folder of immutable shards that share one contract."""

    def __init__(self, path: Path, contract: Contract) -> None:
        self.path, self.contract = path, contract

    @classmethod
    def create(cls, path: Path, contract: Contract) -> Self:
        """Start a set, or go on with the one that is there if it means the same."""
        if not (path / CONTRACT_NAME).exists():
            if path.exists() and any(path.glob(f"{RECEIPTS}/*.json")):
                raise Refused(
                    wrong=f"{path} holds receipts and no contract",
                    found=f"no {CONTRACT_NAME}",
                    mend="copy the contract of the set here",
                )
            for name in (RECEIPTS, SHARDS, ASSETS, RUNS):
                (path / name).mkdir(parents=True, exist_ok=True)
            write_atomic(path / CONTRACT_NAME, contract.to_json())
        shards = cls.open(path)
        shards.require(contract)
        for name in (RECEIPTS, SHARDS):
            sweep(path / name, older_than_s=LEFT_OVER_AFTER_S)
        return shards

    @classmethod
    def open(cls, path: Path) -> Self:
        try:
            return cls(path, Contract.from_json((path / CONTRACT_NAME).read_bytes()))
        except OSError as error:
            raise BadUsage(
                wrong=f"{path} is no shard set",
                found=f"{CONTRACT_NAME}: {error.strerror}",
                mend="harvest one: make harvest CONFIG=configs/harvest/demo.yaml",
            ) from None

    def require(self, contract: Contract) -> None:
        """Refuse, field by field, what does not mean the same."""
        difference = self.contract.difference(contract)
        if difference:
            raise Refused(
                wrong=f"{self.path} means something else (the set's | this run's)",
                found="; ".join(difference),
                mend="harvest into another folder, or restore what changed",
            )

    def manifest(self) -> Manifest:
        return fold(self.path / RECEIPTS, self.path / SHARDS)

    def commit(self, records: Sequence[Record], numerics: Numerics, *, container: str = "zarr") -> Receipt:
        """Put the records of one item on disk. Whoever commits an item first has committed it: a second receipt
        for it is not written, and shards of other content have other names, so writers never harm each other."""
        assert 0 < len(records) <= MAX_RECORDS_PER_SHARD
        header = ShardHeader.of(records)
        files = shards_zarr.pack(records, header, self.contract.storage_dtype)
        receipt = _receipt(header, files, numerics)
        receipt_path = self.path / RECEIPTS / f"{receipt.item}.json"
        if receipt_path.exists():
            return Receipt.from_json(receipt_path.read_bytes(), source=str(receipt_path))
        self._place(receipt.shard, files)
        write_atomic(receipt_path, receipt.to_json())
        return receipt

    def read(self, receipt: Receipt) -> "ShardReader":
        return ShardReader(self.path / SHARDS / receipt.shard, receipt, self.contract)

    def _place(self, name: str, files: dict[str, bytes]) -> None:
        """The shard under its final name. One of that name may stand there already, by a writer that was killed
        before its receipt: its name says its content, so it is ours if its bytes are."""
        shard = self.path / SHARDS / name
        try:
            write_folder(shard, files)
        except OSError:
            if not shard.is_dir():
                raise
            if any(not (shard / part).is_file() or (shard / part).read_bytes() != data for part, data in files.items()):
                raise Corrupt(
                    wrong=f"{shard} has the name of what was to be written, and other bytes",
                    found="an uncommitted shard that was altered",
                    mend="remove that folder and run again",
                ) from None


class ShardReader:
    """One committed shard, read by offset."""

    def __init__(self, path: Path, receipt: Receipt, contract: Contract) -> None:
        self.path, self.receipt, self._dtype = path, receipt, contract.storage_dtype
        self.header = shards_zarr.read_header(path, receipt.files, self._corrupt)
        if self.header.item != receipt.item or self.header.timesteps.shape != (receipt.num_records, receipt.num_points):
            raise self._corrupt(shards_zarr.HEADER_FILE, "the header of another item")
        num_records, num_points = receipt.num_records, receipt.num_points
        side = contract.latent_stride
        self.state_shape = (contract.latent_channels, receipt.height // side, receipt.width // side)
        state_bytes = int(np.prod(self.state_shape)) * self._dtype.itemsize
        table = partial(shards_zarr.extents, path, corrupt=self._corrupt)
        self.points = table(
            shards_zarr.POINTS, num_records * num_points, len(FIELDS) * state_bytes, name=self._point_name
        )
        self.final = table(shards_zarr.FINAL, num_records, state_bytes, name=self._record_name("final"))
        row_bytes = contract.text_dim * self._dtype.itemsize
        self.text = table(shards_zarr.TEXT, receipt.num_tokens, row_bytes, name=lambda i: f"text row {i}")

    def read_point(self, record: int, point: int, out: memoryview) -> None:
        """(latents, cond, uncond) of one point into `out`."""
        self.points.read(record * self.receipt.num_points + point, out)

    def read_text(self, prompt: int) -> Array:
        """[L, D] of a distinct prompt."""
        rows = self.text.read_run(int(self.header.text_starts[prompt]), self.header.text_lengths[prompt])
        return rows.view(self._dtype)

    def record(self, index: int) -> Record:
        header, num_points = self.header, self.receipt.num_points
        points = np.empty((num_points, len(FIELDS), *self.state_shape), self._dtype)
        for point in range(num_points):
            self.read_point(index, point, points[point].data.cast("B"))
        final = np.empty(self.state_shape, self._dtype)
        self.final.read(index, final.data.cast("B"))
        prompt = header.prompt_of[index]
        fields = {name: np.ascontiguousarray(points[:, i]) for i, name in enumerate(FIELDS)}
        return Record(
            key=header.keys[index],
            prompt=header.prompts[prompt],
            seed=header.seeds[index],
            height=header.height,
            width=header.width,
            text=self.read_text(prompt),
            timesteps=header.timesteps[index],
            sigmas=header.sigmas[index],
            expert=header.expert[index],
            final=final,
            **fields,
        )

    def check(self) -> None:
        """Read every byte; raise Corrupt at the first record that is not what was written."""
        for index, digest in enumerate(self.header.digests):
            if self.record(index).digest() != digest:
                raise self._corrupt(f"record {self.header.keys[index]}", "another digest than when it was written")

    def _corrupt(self, part: str, found: str) -> Corrupt:
        return Corrupt(
            wrong=f"shard {self.path}: {part} is not what was written",
            found=found,
            mend="run `python -m harvest repair SET` where the teacher is, or copy the shard again",
        )

    def _point_name(self, index: int) -> str:
        record, point = divmod(index, self.receipt.num_points)
        return f"item {self.receipt.item}, record {self.header.keys[record]}, point {point} ({'/'.join(FIELDS)})"

    def _record_name(self, field: str) -> Callable[[int], str]:
        return lambda index: f"item {self.receipt.item}, record {self.header.keys[index]}, {field}"


def _receipt(header: ShardHeader, files: dict[str, bytes], numerics: Numerics) -> Receipt:
    digest = hashlib.sha256("".join(header.digests).encode()).hexdigest()
    held_out = np.packbits([is_held_out(header.prompts[prompt]) for prompt in header.prompt_of])
    return Receipt(
        item=header.item,
        container="zarr",
        shard=f"{header.item}-{digest[:8]}{shards_zarr.SUFFIX}",
        num_records=len(header.keys),
        num_points=header.timesteps.shape[1],
        height=header.height,
        width=header.width,
        num_tokens=sum(header.text_lengths),
        held_out=base64.b64encode(held_out.tobytes()).decode(),
        digest=digest,
        files={name: [len(data), crc32c(data)] for name, data in files.items()},
        numerics=numerics,
    )
