"""What must not enter a shard, and when there is too much of it.

    health = Health(shards, max_share, log)
    good, faults = health.sift(records)
    health.set_aside(item, faults)             a note names them: step, noise level, expert
    health.complain()                          Partial, when something was set aside

Not finite, constant, exploding: such a record is set aside, and not asked for again until its note is removed
(`python -m harvest repair` does both).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import Partial
from common.log import Log
from common.record import Contract, Record, item_id
from common.schedule import contract_grid, expert_of, kept_steps
from common.shards import QUARANTINE, ShardSet
from harvest.plan import WorkItem
from harvest.quarantine import Fault, Note, remove_note

EXPLODES_ABOVE = 100.0
"""Times the state's own size: what a teacher predicts is of the order of noise and picture."""
UNREADABLE = "unreadable"
MEND_NUMBERS = "compute in bfloat16 or float32 (teacher.dtype): into a new set, or `python -m harvest repair`"
MEND_PICTURES = "mend the pictures named there, which are new ones then, or leave them out"
FEW = 100
"""Records that a share is taken of, at least: the first bad one is no rate."""


class Health:
    """Counts what is set aside in one run; called from one thread at a time."""

    def __init__(self, shards: ShardSet, max_share: float, log: Log) -> None:
        self.num_good, self.num_bad, self._mends = 0, 0, dict[str, None]()
        self._shards, self._max_share, self._log = shards, max_share, log

    def sift(self, records: Sequence[Record], missing: Sequence[Fault] = ()) -> tuple[list[Record], list[Fault]]:
        """The good ones, and what is wrong with the others; `missing`: what did not become a record at all."""
        faults = [{"key": record.key, **fault} for record in records if (fault := self._fault(record))] + [*missing]
        bad = {fault["key"] for fault in faults}
        self.num_bad += len(bad)
        self._mends |= dict.fromkeys(MEND_PICTURES if fault["what"] == UNREADABLE else MEND_NUMBERS for fault in faults)
        good = [record for record in records if record.key not in bad]
        self.num_good += len(good)
        return good, faults

    def set_aside(self, item: WorkItem, faults: Sequence[Fault]) -> None:
        """Before the good ones are committed."""
        if not faults:
            remove_note(self._shards.path, item.id)  # of a walk whose good ones were never committed
            return
        bad, walked = {fault["key"] for fault in faults}, [question.key for question in item.questions]
        good = [key for key in walked if key not in bad]
        note = Note(item=item.id, walked=walked, shard=item_id(good) if good else None, faults=list(faults))
        note.write(self._shards.path)
        first = f"{faults[0]['key']} {faults[0]['where']}"
        self._log.say(f"item {item.id}: {len(faults)} records quarantined", first=first)

    @property
    def folder(self) -> Path:
        return self._shards.path / QUARANTINE

    def require_few(self) -> None:
        """Stop before a sick teacher has filled a week with nothing."""
        if self.num_bad > self._max_share * max(self.num_good + self.num_bad, FEW):
            raise Partial(
                wrong=f"{self.num_bad} of {self.num_good + self.num_bad} records had to be quarantined",
                found=f"more than max_quarantined: {self._max_share}; see {self.folder}",
                mend="; ".join(self._mends),
            )

    def complain(self) -> None:
        if self.num_bad:
            raise Partial(
                wrong=f"{self.num_bad} records were set aside",
                found=f"see {self.folder}",
                mend="; ".join(self._mends),
            )

    def _fault(self, record: Record) -> Fault | None:
        where = record.bad_field(self._shards.contract.storage_dtype)
        if where == "text":
            return {"what": "not finite", "where": "text: the text encoder overflowed"}
        fault = {"what": "not finite", "where": where} if where else odd_prediction(record)
        return fault and fault | step_of(record, fault["where"], self._shards.contract)


def step_of(record: Record, where: str, contract: Contract) -> Fault:
    """The number of the solver's step, 0 the first, that the named point was kept at; nothing for an end point."""
    point = re.match(r"\w+\[(\d+)\]", where)
    if point is None:
        return {}
    grid = contract_grid(contract, int(record.key, 16))
    experts = expert_of(grid.timesteps, contract.boundary, train_steps=contract.train_steps)
    kept = kept_steps(record.key, contract.steps, contract.keep, experts, contract.keep_at)
    return {"step": f"{kept[int(point[1])]} of {contract.steps}"}


def odd_prediction(record: Record) -> Fault | None:
    """The first point whose prediction says nothing, or far too much."""
    for point in range(len(record.timesteps)):
        size = rms(record.latents[point])
        for name in record.point_fields[1:]:
            prediction = getattr(record, name)[point]
            what = None
            if float(np.ptp(prediction)) == 0.0:
                what = "constant"
            elif rms(prediction) > EXPLODES_ABOVE * max(size, 1.0):
                what = "exploding"
            if what:
                where = f"{name}[{point}] (t={record.timesteps[point]:.1f}, expert {record.expert[point]})"
                return {"what": what, "where": where}
    return None


def rms(array: Any) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
