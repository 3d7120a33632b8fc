"""ShardSet: the one face of a set on disk. Harvest writes records through it, training reads points through it.

shards = ShardSet.create(set_dir, contract)       or ShardSet.open(set_dir): a set cut short is a normal set
shards.commit(records, numerics)                  shard on disk, then its receipt: that is the commit
for receipt in shards.manifest().receipts:
    reader = shards.read(receipt)                 see common/shard_reader.py

set/ contract.json  receipts/<item>.json  shards/<item>-<of its bytes>.zarr|.tar+.idx  quarantine/  assets/  runs/
"""

import base64
import contextlib
import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from common.errors import BadUsage, Corrupt, Refused
from common.extents import crc32c
from common.files import set_aside, sweep, sync_folder, write_atomic, write_folder, write_new
from common.log import Log
from common.manifest import MAX_RECORDS, Manifest, Receipt, fold, whole_receipt
from common.record import Contract, Numerics, Record
from common.shard_header import PackedShard, pack_records, record_of, three_digits
from common.shard_reader import CONTAINERS, ShardReader, open_shard, read_keys

CONTRACT_NAME, RECEIPTS, SHARDS, ASSETS, RUNS, QUARANTINE, MOVED = (
    "contract.json",
    "receipts",
    "shards",
    "assets",
    "runs",
    "quarantine",
    "moved",
)
LEFT_OVER_AFTER_S = 3600.0
TRIES = 5
_KEYS: dict[str, tuple[str, ...]] = {}


def is_held_out(prompt: str) -> bool:
    """One prompt in fifty is never trained on, whatever its seeds."""
    return crc32c(prompt.encode()) % 50 == 0


class ShardSet:
    """A folder of immutable shards that share one contract."""

    def __init__(self, path: Path, contract: Contract, *, library: bool = False) -> None:
        self.path, self.contract, self.library = path, contract, library
        self._contract_digest = contract.digest()

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
    def open(cls, path: Path, *, library: bool = False) -> Self:
        """`library`: read through zarr-python and tarfile instead of by offset."""
        try:
            return cls(path, Contract.from_json((path / CONTRACT_NAME).read_bytes()), library=library)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Corrupt(
                wrong=f"{path / CONTRACT_NAME} is damaged",
                found=str(error),
                mend="copy it from another copy of the set: every receipt holds its digest",
            ) from None
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
        assert 0 < len(records) <= MAX_RECORDS
        return self.commit_packed(pack_records(records, self.contract, numerics), container)

    def commit_packed(self, shard: PackedShard, container: str) -> Receipt:
        """The same for a shard that is packed already, as when it changes its container."""
        receipt_path = self.receipt_path(shard.header.item)
        committed = whole_receipt(receipt_path, f"{self.shards_dir}/")
        if committed:  # a damaged receipt, or one whose shard is gone, is none
            return committed
        files = CONTAINERS[container].pack(shard)
        receipt = make_receipt(shard, self.contract, container, files)
        self.place(receipt, files)
        try:
            write_new(receipt_path, receipt.to_json())
        except FileExistsError:
            committed = whole_receipt(receipt_path, f"{self.shards_dir}/")
            if committed:
                Log("shards").say(f"item {receipt.item} was committed by another writer meanwhile")
                return committed
            write_atomic(receipt_path, receipt.to_json())
        return receipt

    def read(self, receipt: Receipt, *, library: bool = False) -> ShardReader:
        self._require_ours(receipt)
        return open_shard(self.shards_dir, receipt, self.contract, library=library or self.library)

    def keys(self, receipt: Receipt) -> tuple[str, ...]:
        """Of its records; read once by a process, as what bears a shard's name never changes."""
        self._require_ours(receipt)
        path = str(self.shards_dir / receipt.stem)
        if path not in _KEYS:
            _KEYS[path] = read_keys(self.shards_dir, receipt)
        return _KEYS[path]

    def _require_ours(self, receipt: Receipt) -> None:
        if receipt.contract != self._contract_digest:
            raise Refused(
                wrong=f"item {receipt.item} was made under another contract",
                found=f"{receipt.contract[:16]}, the set's is {self._contract_digest[:16]}",
                mend="keep shards of different contracts in different sets",
            )

    @property
    def shards_dir(self) -> Path:
        return self.path / SHARDS

    def receipt_path(self, item: str) -> Path:
        return self.path / RECEIPTS / f"{item}.json"

    def place(self, receipt: Receipt, files: dict[str, bytes]) -> None:
        """The shard's files under their final names, which say their content: what stands there already, by a
        writer that was killed before its receipt, is ours if its bytes are. Else it is a part of a copy, or torn."""
        folders: dict[str, dict[str, bytes]] = {}
        for name, data in files.items():
            top, _, rest = name.partition("/")
            folders.setdefault(top, {})[rest] = data
        for top, parts in folders.items():
            path = self.shards_dir / (receipt.stem + top)
            for _ in range(TRIES):  # a copy under way may come back with its next file
                if _is_put(path, parts):
                    break
                self._set_aside(path, receipt)
            else:
                raise Corrupt(wrong=f"{path} cannot be written", found="somebody else puts other bytes there",
                              mend="stop the copy, and run again")  # fmt: skip

    def _set_aside(self, path: Path, receipt: Receipt) -> None:
        """What no whole receipt names does not exist, whatever its name says."""
        committed = whole_receipt(self.receipt_path(receipt.item), f"{self.shards_dir}/")
        if committed and committed.stem == receipt.stem:
            raise Corrupt(
                wrong=f"{path} has the name of what was to be written, and other bytes",
                found="a committed shard that was altered",
                mend="run `python -m harvest repair SET CONFIG`",
            )
        with contextlib.suppress(FileNotFoundError):  # somebody else's turn
            aside = set_aside(path)
            Log("shards").say(f"{path.name} is not whole and not committed: written again", old=aside.name)


def make_receipt(shard: PackedShard, contract: Contract, container: str, files: dict[str, bytes]) -> Receipt:
    header = shard.header
    facts = {name: [len(data), crc32c(data)] for name, data in files.items()}
    held_out = np.packbits([is_held_out(header.prompts[prompt]) for prompt in header.prompt_of])
    return Receipt(
        item=header.item,
        container=container,
        stem=f"{header.item}-{_sha256(json.dumps(facts, sort_keys=True))[:8]}",
        contract=header.contract,
        num_records=len(header.keys),
        num_points=header.timesteps.shape[1],
        height=header.height,
        width=header.width,
        num_tokens=sum(header.text_lengths),
        held_out=base64.b64encode(held_out.tobytes()).decode(),
        guided_error=header.guided_error,
        guided_std=three_digits(_guided_std(shard, contract)),
        digest=_sha256("".join(header.digests)),
        files=facts,
        numerics=header.numerics,
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _guided_std(shard: PackedShard, contract: Contract) -> float:
    sums = np.zeros(3)
    for index in range(len(shard.header.keys)):
        guided = record_of(shard, index, contract).combination(contract)
        sums += guided.size, float(guided.sum(dtype=np.float64)), float(np.square(guided, dtype=np.float64).sum())
    return float(np.sqrt(max(sums[2] / sums[0] - (sums[1] / sums[0]) ** 2, 0.0)))


def _is_put(path: Path, parts: dict[str, bytes]) -> bool:
    """Whether these bytes stand there now, for good: put there, or found."""
    try:
        write_folder(path, parts) if "" not in parts else write_new(path, parts[""])
    except OSError as error:
        if not isinstance(error, FileExistsError) and error.errno != errno.ENOTEMPTY:
            raise
        if not _holds(path, parts):
            return False
        sync_folder(path.parent)  # whoever put it there may not have come to this
    return True


def _holds(path: Path, parts: dict[str, bytes]) -> bool:
    try:
        return all((path / name if name else path).read_bytes() == data for name, data in parts.items())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
