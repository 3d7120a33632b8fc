"""Training on a budget of minutes: optimizers, a moving average of the weights, and a checkpoint to go on from.

    training = Training("vae", named_parameters, work_dir, minutes=20, peak_rate=2e-3)
    for step in training.steps():
        training.update(loss_of(batch(step)))
    training.average                                  # the weights to keep, by name

AdamW everywhere, except for the matrices that are named: those get Muon. Data are a function of the step; how many
steps fit into the minutes depends on the machine, so the learning rate follows the share of the budget that is spent.
Run again after a stop, it goes on from the last checkpoint.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SAVE_EVERY_SECONDS = 90
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # AdamW keeps the first two, Muon the third
LOG_EVERY_STEPS = 50
WARM_UP_STEPS = 100


class Training:
    def __init__(
        self,
        name: str,
        parameters: dict[str, nn.Parameter],
        work_dir: Path,
        *,
        minutes: float,
        peak_rate: float,
        end_rate: float = 0.0,
        average_decay: float = 0.999,
        weight_decay: float = 0.01,
        matrices: frozenset[str] = frozenset(),
    ) -> None:
        self.name, self.parameters, self.path = name, parameters, work_dir / f"{name}.safetensors"
        self.budget_seconds, self.average_decay = 60 * minutes, average_decay
        self.peak_rate, self.end_rate = peak_rate, end_rate
        others = [value for key, value in parameters.items() if key not in matrices]
        adam = torch.optim.AdamW(others, lr=peak_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.optimizers, self.optimizer_of = [adam], dict.fromkeys(parameters, adam)
        if matrices:  # Muon (Jordan 2024; scaled as in arXiv 2502.16982, so that it takes AdamW's rates)
            chosen = [parameters[key] for key in sorted(matrices)]
            muon = torch.optim.Muon(chosen, lr=peak_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
            self.optimizer_of |= dict.fromkeys(matrices, muon)
        self.average = {key: value.detach().clone() for key, value in parameters.items()}
        self.step, self.spent_seconds, self.losses = 0, 0.0, []
        if self.path.exists():
            self._load()

    @property
    def progress(self) -> float:
        return min(1.0, self.spent_seconds / self.budget_seconds)

    def steps(self) -> Iterator[int]:
        saved_at = self.spent_seconds
        while self.spent_seconds < self.budget_seconds:
            started = time.perf_counter()
            yield self.step
            self.step += 1
            self.spent_seconds += time.perf_counter() - started
            if self.step % LOG_EVERY_STEPS == 0:
                self._log()
            if self.spent_seconds - saved_at > SAVE_EVERY_SECONDS:
                self.save()
                saved_at = self.spent_seconds
        self.save()

    def update(self, loss: Tensor) -> None:
        rate = self.end_rate + (self.peak_rate - self.end_rate) * 0.5 * (1 + math.cos(math.pi * self.progress))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (self.step + 1) / WARM_UP_STEPS)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.average_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        self.losses.append(loss.item())

    def save(self) -> None:
        """Weights, their average and the optimizers' moments; complete under its name or not there at all."""
        tensors = {f"average.{key}": value for key, value in self.average.items()}
        for key, parameter in self.parameters.items():
            tensors[f"weight.{key}"] = parameter.detach()
            tensors |= {f"{moment}.{key}": value for moment, value in self._moments(key).items()}
        facts = {"step": self.step, "spent_seconds": self.spent_seconds}
        partial = self.path.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"facts": json.dumps(facts)})
        partial.replace(self.path)

    def _moments(self, key: str) -> dict[str, Tensor]:
        state = self.optimizer_of[key].state.get(self.parameters[key], {})
        return {moment: state[moment] for moment in MOMENTS if moment in state}

    def _load(self) -> None:
        with safe_open(self.path, "pt") as stored, torch.no_grad():
            facts, names = json.loads(stored.metadata()["facts"]), set(stored.keys())
            self.step, self.spent_seconds = facts["step"], facts["spent_seconds"]
            for key, parameter in self.parameters.items():
                parameter.copy_(stored.get_tensor(f"weight.{key}"))
                self.average[key].copy_(stored.get_tensor(f"average.{key}"))
                moments = {m: stored.get_tensor(f"{m}.{key}") for m in MOMENTS if f"{m}.{key}" in names}
                if moments:
                    self.optimizer_of[key].state[parameter] = moments | {"step": torch.tensor(float(self.step))}

    def _log(self) -> None:
        recent = self.losses[-LOG_EVERY_STEPS:]
        print(
            f"{self.name}: step {self.step}, loss {sum(recent) / len(recent):.5f}, "
            f"{self.spent_seconds / 60:.1f} of {self.budget_seconds / 60:.1f} min",
            flush=True,
        )


def averaged(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, by name."""
    with safe_open(path, "pt") as stored:
        return {key[8:]: stored.get_tensor(key) for key in stored.keys() if key.startswith("average.")}  # noqa: SIM118
