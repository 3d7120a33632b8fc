"""Parts of sets: other containers, unions, choices.

    convert(source, out_dir, "tar")                      the same records in another container
    merge([a, b], out_dir)                               one set of several with one contract; each key once
    subset(source, out_dir, Choice(prompts=("*cat*",)))  records by prompt, size, held-out; points by noise level

Each goes on where it was stopped: what the target holds already is not done again. What is whole in the sources is
taken, as of a set that is being copied; what is not is named at the end, where it is read: Partial.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import Partial
from common.manifest import Manifest, Receipt
from common.record import Array, Contract, item_id
from common.shard_header import PackedShard, ShardHeader, record_of
from common.shard_reader import check_records
from common.shards import ShardSet, is_held_out
from harvest.granary.carry import carry_assets, carry_notes, require_apart
from harvest.granary.place import LocalPlace
from harvest.plan import moved_keys

Done = Callable[[Receipt], None]
"""Told of each shard of a source when it is done with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which records and points of a set; everything by default."""

    prompts: tuple[str, ...] = ()
    """Shell patterns; one of them must match."""
    sizes: tuple[tuple[int, int], ...] = ()
    sigmas: tuple[float, float] | None = None
    """Points with low <= sigma < high; a record without any is left out."""
    held_out: bool | None = None
    """Only the held-out ones, or only the others."""

    def wants(self, prompt: str, size: tuple[int, int]) -> bool:
        return (
            (not self.prompts or any(fnmatch.fnmatchcase(prompt, pattern) for pattern in self.prompts))
            and (not self.sizes or size in self.sizes)
            and (self.held_out is None or is_held_out(prompt) == self.held_out)
        )

    def contract(self, contract: Contract) -> Contract:
        """Fewer noise levels are another meaning; fewer records are not."""
        if self.sigmas is None:
            return contract
        low, high = self.sigmas
        return dataclasses.replace(contract, source=f"{contract.source}, sigma {low:g}..{high:g}")


def convert(source: ShardSet, out_dir: Path, container: str, done: Done = lambda receipt: None) -> ShardSet:
    out, manifest = _target(out_dir, [source], source.contract), source.manifest()
    carry_notes(LocalPlace(source.path), LocalPlace(out_dir))
    for receipt in _missing(manifest, out):
        out.commit_packed(_checked(source, receipt), container)
        done(receipt)
    _require_all([source], [manifest], out)
    return out


def merge(sources: Sequence[ShardSet], out_dir: Path, done: Done = lambda receipt: None) -> ShardSet:
    """In the order given: a record that an earlier set holds is not taken from a later one."""
    out = _target(out_dir, sources, sources[0].contract)
    manifests = [source.manifest() for source in sources]
    held = _keys(out)
    for source, manifest in zip(sources, manifests, strict=True):
        source.require(out.contract)
        for receipt in _missing(manifest, out):
            keys = source.keys(receipt)
            new = np.array([key not in held for key in keys])
            if new.any():
                out.commit_packed(take(_checked(source, receipt), np.flatnonzero(new), out.contract), receipt.container)
                held |= set(keys)
            done(receipt)
    _require_all(sources, manifests, out)
    return out


def subset(source: ShardSet, out_dir: Path, choice: Choice, done: Done = lambda receipt: None) -> ShardSet:
    out, manifest = _target(out_dir, [source], choice.contract(source.contract)), source.manifest()
    there = out.manifest().by_item
    for receipt in manifest.receipts:
        header = source.read(receipt).header
        size = (header.height, header.width)
        wanted = [i for i, prompt in enumerate(header.prompt_of) if choice.wants(header.prompts[prompt], size)]
        parts = _by_points(header, np.array(wanted), choice) if wanted else []
        parts = [part for part in parts if item_id([header.keys[row] for row in part[0]]) not in there]
        if parts:
            shard = _checked(source, receipt)
            for rows, points in parts:
                out.commit_packed(take(shard, rows, out.contract, points=points), receipt.container)
        done(receipt)
    _require_all([source], [manifest], out)
    return out


def take(shard: PackedShard, rows: Array, contract: Contract, *, points: Array | None = None) -> PackedShard:
    """Some records of a shard, of each the `points` [len(rows), K'] if given; the stored bytes unchanged."""
    header = shard.header
    if points is None:
        points = np.tile(np.arange(header.timesteps.shape[1]), (len(rows), 1))
    used = list(dict.fromkeys(header.prompt_of[row] for row in rows))
    cut = PackedShard(
        header=dataclasses.replace(
            header,
            contract=contract.digest(),
            keys=tuple(header.keys[row] for row in rows),
            digests=(),
            seeds=tuple(header.seeds[row] for row in rows),
            prompts=tuple(header.prompts[prompt] for prompt in used),
            prompt_of=tuple(used.index(header.prompt_of[row]) for row in rows),
            text_lengths=tuple(header.text_lengths[prompt] for prompt in used),
            timesteps=np.take_along_axis(header.timesteps[rows], points, axis=1),
            sigmas=np.take_along_axis(header.sigmas[rows], points, axis=1),
            expert=np.take_along_axis(header.expert[rows], points, axis=1),
        ),
        points=np.stack([shard.points[row][chosen] for row, chosen in zip(rows, points, strict=True)]),
        final=shard.final[rows],
        text=np.concatenate([shard.text[header.text_rows(prompt)] for prompt in used]),
    )
    digests = tuple(record_of(cut, index, contract).digest() for index in range(len(rows)))
    return dataclasses.replace(cut, header=dataclasses.replace(cut.header, digests=digests))


def _by_points(header: ShardHeader, rows: Array, choice: Choice) -> list[tuple[Array, Array]]:
    """Rows grouped by how many of their points are wanted: a shard has one K."""
    if choice.sigmas is None:
        return [(rows, np.tile(np.arange(header.sigmas.shape[1]), (len(rows), 1)))]
    low, high = choice.sigmas
    chosen = {int(row): np.flatnonzero((header.sigmas[row] >= low) & (header.sigmas[row] < high)) for row in rows}
    counts = sorted({len(points) for points in chosen.values()} - {0})
    return [
        (np.array(group), np.stack([chosen[row] for row in group]))
        for count in counts
        if (group := [row for row, points in chosen.items() if len(points) == count])
    ]


def _target(out_dir: Path, sources: Sequence[ShardSet], contract: Contract) -> ShardSet:
    """The set to fill, with the first source's assets."""
    for source in sources:
        require_apart(LocalPlace(source.path), LocalPlace(out_dir))
    out = ShardSet.create(out_dir, contract)
    carry_assets(LocalPlace(sources[0].path), LocalPlace(out_dir))
    return out


def _missing(manifest: Manifest, out: ShardSet) -> list[Receipt]:
    there = out.manifest().by_item
    return [receipt for receipt in manifest.receipts if receipt.item not in there]


def _require_all(sources: Sequence[ShardSet], manifests: Sequence[Manifest], out: ShardSet) -> None:
    """Whoever deletes a source afterwards would lose what was not whole in it, or had been carried elsewhere."""
    there, lost = out.manifest().by_item, []
    for source, manifest in zip(sources, manifests, strict=True):
        why = dict.fromkeys(manifest.absent, "is not whole")
        why |= dict.fromkeys(_elsewhere(moved_keys(source), manifest, out), "was carried elsewhere")
        lost += [f"{source.path}: {item} {what}" for item, what in why.items() if item not in there]
    if lost:
        raise Partial(
            wrong=f"{out.path} lacks {len(lost)} items of what it was made from",
            found="; ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else ""),
            mend="`python -m harvest verify` and `rebuild` them, or `pull` them back; then run the same command again",
        )


def _elsewhere(moved: Mapping[str, Sequence[str]], manifest: Manifest, out: ShardSet) -> list[str]:
    """Of the items that were freed: those that neither came back nor stand in `out` by way of another source."""
    gone = {item: keys for item, keys in moved.items() if item not in manifest.by_item}
    held = _keys(out) if gone else set()
    return [item for item, keys in gone.items() if not held >= set(keys)]


def _keys(shards: ShardSet) -> set[str]:
    return {key for receipt in shards.manifest().receipts for key in shards.keys(receipt)}


def _checked(source: ShardSet, receipt: Receipt) -> PackedShard:
    """A whole shard in memory, every record compared with its digest: damage is never copied."""
    reader = source.read(receipt)
    check_records(reader)
    return reader.packed()
