"""`harvest status`: what a set holds and who works on it, from the set alone, without torch."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from common.log import human_bytes
from common.shards import QUARANTINE, RUNS, ShardSet
from common.watch import read_heartbeat


def survey(set_path: Path) -> dict[str, Any]:
    shards = ShardSet.open(set_path)
    manifest = shards.manifest()
    numerics = {str(receipt.numerics) for receipt in manifest.receipts}
    quarantine = sorted((set_path / QUARANTINE).glob("[!.]*.json"))
    beats = (read_heartbeat(folder) for folder in sorted((set_path / RUNS).iterdir()))
    return {
        "set": str(set_path),
        "teacher": shards.contract.teacher,
        "contract": shards.contract.digest()[:16],
        "shards": len(manifest.receipts),
        "absent": list(manifest.absent),
        "records": manifest.num_records,
        "points": manifest.num_points,
        "bytes": manifest.num_bytes,
        "sizes": dict(Counter(f"{receipt.height}x{receipt.width}" for receipt in manifest.receipts)),
        "numerics": len(numerics),
        "quarantined": sum(len(json.loads(path.read_bytes())) for path in quarantine),
        "runs": [beat for beat in beats if beat is not None],
    }


def lines(facts: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{count} shards of {size}" for size, count in facts["sizes"].items())
    out = [
        f"{facts['set']}: {facts['teacher']}, contract {facts['contract']}",
        f"{facts['records']} records, {facts['points']} points, {human_bytes(facts['bytes'])}",
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
    out += [f"run {beat['host']}-{beat['pid']}: {beat['state']}" for beat in facts["runs"]]
    return out
