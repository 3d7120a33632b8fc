"""`harvest repair SET CONFIG`: items that hold damaged or quarantined records, asked again; damaged assets, left again.

    for line in repair(config, set_dir): ...

With equal numerics a shard comes back with the digest that its receipt names, byte for byte. Where it does not (other
numerics, or hardware that erred then or errs now), it is a new generation whose receipt names what it supersedes.
What does not come back, or was not made by this plan, is said, and the others are mended all the same.
The old shard goes when the new one can take its place: killed in between, the item is not committed, and asked again.
A record that was set aside and is sound now is committed as a shard of its own, and leaves its note's faults.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from common.errors import Corrupt, Fault, Partial, Refused
from common.files import sync_folder, write_atomic
from common.manifest import Receipt
from common.shard_header import pack_records
from common.shard_reader import CONTAINERS
from common.shards import ASSETS, ShardSet, make_receipt
from harvest.assets import leave_again
from harvest.config import HarvestConfig
from harvest.granary.again import Asked, asked_again, task_for, walked_as
from harvest.granary.rebuild import rebuild
from harvest.granary.verify import LOST_RECEIPT, verify, verify_assets
from harvest.quarantine import Note, notes_that_count
from harvest.running.health import Health
from harvest.running.task import Task


def repair(config: HarvestConfig, set_dir: Path) -> Iterator[str]:
    """One line for each thing that was mended; the teacher is loaded only where nothing less will do."""
    shards, task = ShardSet.open(set_dir), task_for(config, set_dir)
    damages, assets = list(verify(shards)), list(verify_assets(shards))
    lost = {damage.item for damage in damages if damage.pieces == LOST_RECEIPT}
    items = sorted({damage.item for damage in damages} - lost)
    notes = [note for note in notes_that_count(set_dir, shards.manifest()) if note.faults]
    faults: list[Fault] = []
    if items or notes or assets:
        with asked_again(task) as asked:
            questions = [partial(_leave_again, asked, damage.file) for damage in assets]
            questions += [partial(_mend, asked, item) for item in items]
            questions += [partial(_ask_once_more, asked, note) for note in notes]
            for ask in questions:
                try:
                    yield ask()
                except (Partial, Refused, Corrupt) as fault:
                    faults.append(fault)
                    yield str(fault)
    for made in rebuild(shards) if lost else ():
        yield f"item {made.item}: whole again" if isinstance(made, Receipt) else str(made)
    if not damages and not notes and not assets:
        yield "nothing is damaged, nothing is quarantined"
    if faults:
        raise faults[0]


def _leave_again(asked: Asked, name: str) -> str:
    leave_again(name, asked.shards, asked.task.resolved, asked.teacher)
    return f"{ASSETS}/{name}: left again"


def _mend(asked: Asked, damaged: str) -> str:
    shards, task = asked.shards, asked.task
    old = Receipt.read(shards.receipt_path(damaged))
    keys = _keys(shards, old, task)
    item, is_known = walked_as(task, keys, old.item)
    walked = {record.key: record for record in asked.records(keys, [item])}
    good, faults = Health(shards, 1.0, asked.log).sift([walked[key] for key in keys])
    if faults:
        raise Partial(wrong=f"item {old.item} does not come back", found=f"{faults[0]['key']}: {faults[0]['where']}",
                      mend="compute in bfloat16 or float32, or remove its receipt and run again")  # fmt: skip
    packed = pack_records(good, shards.contract, asked.numerics)
    files = CONTAINERS[old.container].pack(packed)
    new = make_receipt(packed, shards.contract, old.container, files)
    if new.digest == old.digest:
        new = old if new.files == old.files else new
        how = "as it was, byte for byte" if new == old else "with the same records"
    else:
        new = replace(new, supersedes=old.digest)
        how = f"a new generation that supersedes {old.digest[:8]}: {_why(asked.numerics == old.numerics, is_known)}"
    _replace(shards, old, new, files)
    return f"item {old.item}: {len(good)} records, {how}"


def _why(same_numerics: bool, is_known: bool) -> str:
    if not same_numerics:
        return "other numerics"
    if not is_known:
        return "nothing says what was walked with these records"
    return "EQUAL NUMERICS, OTHER VALUES: hardware erred then or errs now"


def _replace(shards: ShardSet, old: Receipt, new: Receipt, files: dict[str, bytes]) -> None:
    """The damaged bytes leave their name before whole ones can take it."""
    if new.stem != old.stem:
        shards.place(new, files)
        write_atomic(shards.receipt_path(new.item), new.to_json())
        _remove(shards, old)
        return
    shards.receipt_path(old.item).unlink()
    sync_folder(shards.receipt_path(old.item).parent)
    _remove(shards, old)
    shards.place(new, files)
    write_atomic(shards.receipt_path(new.item), new.to_json())


def _remove(shards: ShardSet, receipt: Receipt) -> None:
    for path in shards.shards_dir.glob(f"{receipt.stem}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    sync_folder(shards.shards_dir)


def _keys(shards: ShardSet, receipt: Receipt, task: Task) -> list[str]:
    """In the shard's own order: from the plan, or from its header where that is whole."""
    for item in task.plan.items:
        if item.id == receipt.item:
            return [question.key for question in item.questions]
    return list(shards.read(receipt).header.keys)


def _ask_once_more(asked: Asked, note: Note) -> str:
    """What was set aside, walked with the neighbours that it had."""
    planned = {question.key for item in asked.task.plan.items for question in item.questions}
    keys = note.bad_keys & planned  # a picture that was mended is another one, and in the plan under another key
    if not keys:
        replace(note, faults=[]).write(asked.shards.path)
        return f"quarantine {note.item}: what it names is asked for no more"
    health = Health(asked.shards, 1.0, asked.log)
    item, _ = walked_as(asked.task, keys, note.item)
    walked = list(asked.records(keys, [item]))
    missing = [] if asked.pictures is None else asked.pictures.faults(item)
    good, faults = health.sift(walked, [fault for fault in missing if fault["key"] in keys])
    if good:
        asked.shards.commit(good, asked.numerics, container=asked.task.config.container)
    replace(note, faults=faults).write(asked.shards.path)
    return f"quarantine {note.item}: {len(good)} of {len(keys)} records are sound now"
