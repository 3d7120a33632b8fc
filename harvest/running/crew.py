"""How many workers this machine gets, and which GPUs each of them sees.

count = num_workers(config)                                        None: that depends on the sizes of the plan
count = placed_workers_asked_apart(config, plan.sizes, heed)
gpus = share_out(gpus_of(config), count)
"""

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context

from harvest.config import HarvestConfig
from harvest.loading.folder import resolve
from harvest.teacher import work_of

ON_ONE_GPU = ("auto", "replicate", "swap", "stream", "gpu0", "cpu")
HEED_EVERY_S = 1.0


def gpus_of(config: HarvestConfig) -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES leaves; none where the teacher is to run on the CPU."""
    if config.teacher.device not in ("auto", "cuda"):
        return []
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(index) for index in range(torch.cuda.device_count())]


def num_workers(config: HarvestConfig) -> int | None:
    """As configured; else one for all GPUs where the placement spreads one teacher over them, or one for each: what
    `plan` says of this very machine. None: that depends on the sizes of the plan."""
    num_gpus = len(gpus_of(config)) if config.workers is None else 0
    if config.workers is not None or num_gpus <= 1:
        return config.workers or 1
    return None if config.teacher.placement in ON_ONE_GPU else 1


def placed_workers_asked_apart(
    config: HarvestConfig, sizes: Collection[tuple[int, int]], heed: Callable[[], object]
) -> int:
    """By a process that ends: who asks a GPU what is free holds some hundred megabytes of it from then on."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        answer = apart.submit(_placed_workers, config, sizes)
        while not wait([answer], timeout=HEED_EVERY_S).done:
            heed()
        return answer.result()


def _placed_workers(config: HarvestConfig, sizes: Collection[tuple[int, int]]) -> int:
    from harvest.teachers import placement_of

    resolved = resolve(config.teacher.folder, config.teacher.variant, config.teacher.rest)
    return placement_of(config.teacher, resolved, work_of(config, sizes)).workers


def share_out(gpus: Sequence[str], count: int) -> list[str | None]:
    """What each of `count` workers sees: neighbours together, and two on one only where there are too few."""
    each = max(1, len(gpus) // count)
    return [
        ",".join(gpus[number * each : (number + 1) * each] or [gpus[number % len(gpus)]]) if gpus else None
        for number in range(count)
    ]
