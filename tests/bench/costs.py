"""What reading costs besides time: memory per step, and opening a set of very many shards."""

import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np

from common.shards import ShardSet
from tests.bench.rounds import BATCH, Reader
from tests.made import NUMERICS, ROOT, made_contract, made_record


def allocated_per_step(reader: Reader, num_points: int) -> int:
    """Bytes: the most that a step after the first epoch held at any moment above what was there before it."""
    reader.open()
    order, most = np.arange(num_points), 0
    for _ in reader.epoch(order):
        pass
    tracemalloc.start()
    batches = reader.epoch(order)
    next(batches)
    for _ in range(num_points // BATCH - 1):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        next(batches)
        _, peak = tracemalloc.get_traced_memory()
        most = max(most, peak - before)
    tracemalloc.stop()
    reader.close()
    return most


def open_many(folder: Path, num_receipts: int) -> dict[str, float]:
    """A set of that many shards, opened by fresh processes: `seconds`, `cpu_s` and `peak_mb`, all of the process. The
    shards are hard links to one real shard, so that they cost no disk: their receipts and names are their own."""
    shards = ShardSet.create(folder, made_contract())
    receipt = shards.commit([made_record(0), made_record(1)], NUMERICS)
    parts = receipt.paths(shards.shards_dir)
    for number in range(num_receipts - 1):
        item = hashlib.sha256(str(number).encode()).hexdigest()[:16]
        copy = dataclasses.replace(receipt, item=item, stem=f"{item}-{receipt.digest[:8]}")
        for name, path in copy.paths(shards.shards_dir).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(parts[name], path)
        shards.receipt_path(item).write_bytes(copy.to_json())
    words = [sys.executable, "-c", _OPEN, str(folder)]
    runs = [subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3)]
    figures: list[dict[str, float]] = [json.loads(run.stdout) for run in runs]
    assert all(run["receipts"] == num_receipts for run in figures)
    return {name: statistics.median(run[name] for run in figures) for name in figures[0]}


_OPEN = """
import json, sys, time
from pathlib import Path
from common.shards import ShardSet
start, cpu = time.perf_counter(), time.process_time()
manifest = ShardSet.open(Path(sys.argv[1])).manifest()
seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
# Not ru_maxrss: a process inherits it from the one that started it.
status = Path("/proc/self/status").read_text()
peak_mb = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
print(json.dumps({"receipts": len(manifest.receipts), "seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak_mb}))
"""
