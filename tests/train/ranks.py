"""Processes that train together, by gloo: answers = together(3, function, *inputs), of function(rank, *inputs)."""

import multiprocessing
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta
from typing import Any

TIMEOUT_S = 40


def together(size: int, function: Callable[..., Any], *inputs: Any) -> list[Any]:
    """The fault of the first that fails is raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn")) as fresh:
        answers = [fresh.submit(_as_rank, rank, size, port, function, inputs) for rank in range(size)]
        for answer in as_completed(answers, timeout=2 * TIMEOUT_S):
            answer.result()
        return [answer.result() for answer in answers]


def _as_rank(rank: int, size: int, port: int, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
                                         timeout=timedelta(seconds=TIMEOUT_S))  # fmt: skip
    try:
        return function(rank, *inputs)
    finally:
        torch.distributed.destroy_process_group()
