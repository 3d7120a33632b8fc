"""Which records a run looks at, chosen once: run/watched.json. No torch.

    watched = Watched.read(run_dir)
    dataclasses.replace(watched, held_out=chosen).write(run_dir)

A set may grow between two starts: what is measured and drawn stays the same, or one curve would compare unlike things.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from common.errors import Corrupt
from common.files import write_atomic
from train.chosen import Chosen
from train.run_folder import WATCHED_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    held_out: tuple[Chosen, ...] = ()
    """Empty: not chosen yet."""
    untrained_gap: float | None = None
    """On these, of the student that the run began with."""
    pictures: tuple[Chosen, ...] = ()
    sample_prompts: tuple[str, ...] | None = None
    """That were asked for when the pictures were chosen."""

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        path = run_dir / WATCHED_NAME
        if not path.exists():
            return cls()
        try:
            return cls(**_typed(json.loads(path.read_bytes())))
        except (ValueError, TypeError, KeyError) as error:
            raise Corrupt(wrong=f"{path} cannot be read", found=str(error),
                          mend="remove it: records are chosen again, and the held-out curve begins anew"
                          ) from None  # fmt: skip

    def write(self, run_dir: Path) -> None:
        write_atomic(run_dir / WATCHED_NAME, json.dumps(dataclasses.asdict(self)).encode())


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    prompts, gap = values["sample_prompts"], values["untrained_gap"]
    return {
        "held_out": tuple(Chosen(*each) for each in values["held_out"]),
        "untrained_gap": None if gap is None else float(gap),
        "pictures": tuple(Chosen(*each) for each in values["pictures"]),
        "sample_prompts": None if prompts is None else tuple(prompts),
    }
