"""Where the segments of a stored path begin and end, for objective: segment. Numpy only: `train plan` counts them.

spans = spans_of(config.segments, contract)      by number among the points that every record keeps
steps = kept_by_all(contract)                    which steps of the walk those are
"""

import numpy as np
from numpy.typing import NDArray

from common.errors import Refused
from common.record import Contract
from train.feed.slots import FINAL, Spans


def spans_of(segments: int | None, contract: Contract) -> Spans:
    """As even as they can be; None: one from each of these points to the next."""
    num_points = len(kept_by_all(contract))
    num = segments or num_points
    if num > num_points:
        raise Refused(wrong=f"segments: {num}", found=f"{num_points} points a record", mend="ask for fewer")
    begins = [number * num_points // num for number in range(num)]
    return tuple(zip(begins, [*begins[1:], FINAL], strict=True))


def kept_by_all(contract: Contract) -> NDArray[np.int64]:
    """The steps that every record holds, from noise on."""
    kept = np.arange(contract.steps) if contract.keep == contract.steps else np.unique(contract.keep_at)
    if len(kept) < 2 or kept[0] != 0:
        raise Refused(
            wrong="objective: segment wants steps that every record keeps, noise first",
            found=f"keep_at {list(contract.keep_at)}; the other points of a record are drawn",
            mend=f"harvest with keep_at: {[number * contract.steps // 4 for number in range(4)]}",
        )
    return kept
