"""What two sets have in common and what not.

difference = compare(a, b);  difference.lines()
"""

from collections.abc import Iterator
from dataclasses import dataclass

from common.shards import ShardSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    contract: tuple[str, ...]
    """Fields that differ, `name: a | b`."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    """Keys."""
    altered: tuple[str, ...]
    """Keys of records that both hold, with other values."""
    num_equal: int
    numerics: tuple[str, ...]

    @property
    def none(self) -> bool:
        return not (self.contract or self.only_a or self.only_b or self.altered)

    def lines(self) -> Iterator[str]:
        yield f"{self.num_equal} records equal"
        for title, entries in (("contract", self.contract), ("only in the first", self.only_a),
                               ("only in the second", self.only_b), ("of other values", self.altered),
                               ("numerics", self.numerics)):  # fmt: skip
            if entries:
                yield f"{title}: {len(entries)}: {', '.join(entries[:5])}{' ...' if len(entries) > 5 else ''}"


def compare(a: ShardSet, b: ShardSet) -> Difference:
    mine, theirs = _digests(a), _digests(b)
    both = mine.keys() & theirs.keys()
    kinds = [{str(receipt.numerics) for receipt in shards.manifest().receipts} for shards in (a, b)]
    return Difference(
        contract=tuple(a.contract.difference(b.contract)),
        only_a=tuple(sorted(mine.keys() - theirs.keys())),
        only_b=tuple(sorted(theirs.keys() - mine.keys())),
        altered=tuple(sorted(key for key in both if mine[key] != theirs[key])),
        num_equal=sum(mine[key] == theirs[key] for key in both),
        numerics=tuple(sorted(kinds[0] ^ kinds[1])),
    )


def _digests(shards: ShardSet) -> dict[str, str]:
    return {
        key: digest
        for receipt in shards.manifest().receipts
        for header in [shards.read(receipt).header]
        for key, digest in zip(header.keys, header.digests, strict=True)
    }
