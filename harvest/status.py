"""`harvest status`: what a set holds and who works on it, from the set alone, without torch."""

from collections import Counter
from pathlib import Path
from typing import Any

from common.log import human_bytes
from common.record import BOTH
from common.shards import CONTRACT_NAME, QUARANTINE, RUNS, ShardSet
from common.watch import read_heartbeat
from harvest.quarantine import notes_that_count


def survey(set_path: Path) -> dict[str, Any]:
    beats = [beat for folder in _run_dirs(set_path) if (beat := read_heartbeat(folder)) is not None]
    if beats and not (set_path / CONTRACT_NAME).exists():
        return {"set": str(set_path), "teacher": None, "records": 0, "runs": beats}
    shards = ShardSet.open(set_path)
    manifest = shards.manifest()
    numerics = {str(receipt.numerics) for receipt in manifest.receipts}
    return {
        "set": str(set_path),
        "teacher": shards.contract.teacher,
        "contract": shards.contract.digest()[:16],
        "branches": shards.contract.branches,
        "shards": len(manifest.receipts),
        "absent": list(manifest.absent),
        "records": manifest.num_records,
        "points": manifest.num_points,
        "bytes": manifest.num_bytes,
        "sizes": dict(Counter(f"{receipt.height}x{receipt.width}" for receipt in manifest.receipts)),
        "numerics": len(numerics),
        "quarantined": sum(len(note.faults) for note in notes_that_count(set_path, manifest)),
        "runs": beats,
    }


def _run_dirs(set_path: Path) -> list[Path]:
    return sorted(path for path in (set_path / RUNS).glob("*") if path.is_dir())


def lines(facts: dict[str, Any]) -> list[str]:
    runs = [f"run {_told(beat)}" for beat in facts["runs"]]
    if facts["teacher"] is None:
        return [f"{facts['set']}: no contract yet, its teacher has not been loaded", *runs]
    sizes = ", ".join(f"{count} shards of {size}" for size, count in facts["sizes"].items())
    alone = "" if facts["branches"] == BOTH else f", {facts['branches']} predictions alone"
    out = [
        f"{facts['set']}: {facts['teacher']}, contract {facts['contract']}",
        f"{facts['records']} records, {facts['points']} points, {human_bytes(facts['bytes'])}{alone}",
        sizes or "no shard yet",
    ]
    if facts["absent"]:
        out.append(
            f"{len(facts['absent'])} receipts without their whole shard (a copy under way?): {facts['absent'][0]} ..."
        )
    if facts["quarantined"]:
        out.append(f"{facts['quarantined']} records quarantined, see {QUARANTINE}/")
    if facts["numerics"] > 1:
        out.append(f"{facts['numerics']} kinds of numerics: last bits may differ between shards")
    return out + runs


def _told(beat: dict[str, Any]) -> str:
    """Who, what of it, in which state, how far; why, when it stopped."""
    words = [f"{beat['host']}-{beat['pid']}: {beat['state']}"]
    words += [f"slice {beat['slice']}"] if "slice" in beat else []
    words += [f"{beat['added']} of {beat['of']} records"] if "of" in beat else []
    words += [f"{beat['workers']} workers"] if "workers" in beat else []
    words += [beat["why"]] if "why" in beat else []
    return ", ".join(words)
