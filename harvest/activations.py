"""How strongly a teacher's channels are used, heard in passing while it answers: what a smaller student is cut by.

    with listening(teacher, shards):
        records = rollout(...)                every EVERY-th forward is listened to -> assets/activations.safetensors

Mean squares over all tokens heard, per expert and block: `residual` [D] leaves the block; `attn1`, `attn2` [D] are the
heads' outputs; `ffn` [F] is between its two linears; `change` [] is how far the block moves its stream, as a share.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from common.seals import leave
from common.shards import ASSETS, ShardSet
from harvest.teacher import Teacher

ACTIVATIONS_NAME = "activations.safetensors"
EVERY = 16
"""Of an expert's forwards: each costs a tenth more while it is listened to."""


class Listener:
    """Hooks on the blocks of Wan transformers; nothing of the answers changes."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._hooks: list[Any] = []

    def attend(self, name: str, expert: Any) -> None:
        """An expert may come later than the first forward; it is attended once."""
        if name not in self._known:
            self._known.add(name)
            self._attach(name, expert)

    def close(self) -> None:
        """Who is attended again is heard again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._known.clear()

    def means(self) -> dict[str, Tensor]:
        return {name: (total / self._counts[name]).float().cpu() for name, total in sorted(self._sums.items())}

    def _attach(self, name: str, expert: Any) -> None:
        num_forwards = -1

        def begin(*_: Any) -> None:
            nonlocal num_forwards
            num_forwards += 1

        def heard(place: str, measure: Callable[[Any, Any, Any], Tensor]) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                if num_forwards % EVERY == 0:
                    self._add(f"{name}.{place}", measure(module, inputs, output))

            return hook

        self._hooks.append(expert.register_forward_pre_hook(begin))
        for number, block in enumerate(expert.blocks):
            place = f"blocks.{number}"
            listened = {
                f"{place}.residual": (block, _of_output),
                f"{place}.change": (block, _change),
                f"{place}.attn1": (block.attn1.to_out[0], _of_input),
                f"{place}.attn2": (block.attn2.to_out[0], _of_input),
                f"{place}.ffn": (block.ffn.net[2], _of_input),
            }
            for where, (module, measure) in listened.items():
                self._hooks.append(module.register_forward_hook(heard(where, measure)))

    def _add(self, name: str, mean: Tensor) -> None:
        self._sums[name] = self._sums[name] + mean if name in self._sums else mean
        self._counts[name] = self._counts.get(name, 0) + 1


@contextlib.contextmanager
def listening(teacher: Teacher, shards: ShardSet) -> Iterator[None]:
    """What is heard goes into the set's assets, once."""
    path = shards.path / ASSETS / ACTIVATIONS_NAME
    if path.exists():
        yield
        return
    teacher.listener = listener = Listener()
    try:
        yield
        means = listener.means()
    finally:
        listener.close()
        teacher.listener = None
    if means and all(mean.isfinite().all() for mean in means.values()):
        leave(shards.path / ASSETS, ACTIVATIONS_NAME, save(means))


def _of_output(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.float().square().mean(dim=(0, 1))


def _of_input(module: Any, inputs: tuple[Tensor, ...], output: Any) -> Tensor:
    return inputs[0].float().square().mean(dim=(0, 1))


def _change(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    before, after = inputs[0].float(), output.float()
    return torch.stack([(after - before).square().sum() / before.square().sum()])
