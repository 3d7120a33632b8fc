"""A writer to be killed, and the one who kills it. No torch: a fork costs milliseconds, so a thousand kills do too.

    python -m tests.faults.writer SET KILLS SEED          prints one JSON line: kills, commits seen, faults found

Each round forks a child that commits the next missing items; it is killed with SIGKILL at a random moment, and what
it left is looked at: every committed record is there and right, nothing uncommitted is visible, nothing is twice.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from common.files import TEMPORARY_PREFIX
from common.record import Record
from common.shard_reader import check_records
from common.shards import ShardSet
from tests.made import NUMERICS, made_contract, made_record

NUM_ITEMS, PER_ITEM = 6, 2


def records_of(item: int) -> list[Record]:
    return [made_record(number) for number in range(item * PER_ITEM, (item + 1) * PER_ITEM)]


def write_missing(path: Path, container: str) -> None:
    """What a harvest does, without a teacher."""
    shards = ShardSet.create(path, made_contract())
    held = {key for receipt in shards.manifest().receipts for key in shards.read(receipt).header.keys}
    for item in range(NUM_ITEMS):
        records = records_of(item)
        if records[0].key not in held:
            shards.commit(records, NUMERICS, container=container)


def look(path: Path, expected: dict[str, str]) -> tuple[int, list[str]]:
    """How many items are committed, and what is wrong with them."""
    if not (path / "contract.json").exists():
        return 0, []
    shards = ShardSet.open(path)
    manifest = shards.manifest()
    faults = [f"{item} has a receipt and no whole shard" for item in manifest.absent]
    seen: list[str] = []
    for receipt in manifest.receipts:
        reader = shards.read(receipt)
        check_records(reader)
        for key, digest in zip(reader.header.keys, reader.header.digests, strict=True):
            seen.append(key)
            if expected.get(key) != digest:
                faults.append(f"record {key} is not what was written")
    if len(seen) != len(set(seen)):
        faults.append("a record is there twice")
    return len(manifest.receipts), faults


def remove_all(path: Path) -> None:
    for root, folders, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(Path(root) / name)
        for name in folders:
            os.rmdir(Path(root) / name)


def kill_often(path: Path, kills: int, seed: int) -> dict[str, object]:
    import zarr  # noqa: F401 - before the fork, so that a child starts at once

    expected = {record.key: record.digest() for item in range(NUM_ITEMS) for record in records_of(item)}
    rng, faults, in_the_middle, leftovers = random.Random(seed), [], 0, 0
    for number in range(kills):
        container = ("zarr", "tar")[number // 7 % 2]
        child = os.fork()
        if child == 0:
            write_missing(path, container)
            os._exit(0)
        time.sleep(rng.random() ** 2 * 0.12)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before, wrong = look(path, expected)
        faults += [f"after kill {number}: {fault}" for fault in wrong]
        in_the_middle += 0 < before < NUM_ITEMS
        leftovers += any(path.rglob(f"{TEMPORARY_PREFIX}*"))
        if before == NUM_ITEMS:
            remove_all(path)
    write_missing(path, "zarr")
    done, wrong = look(path, expected)
    return {
        "kills": kills,
        "in_the_middle": in_the_middle,
        "leftovers": leftovers,
        "faults": faults + wrong,
        "done": done,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(kill_often(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
