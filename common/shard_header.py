"""What a shard says of its records besides their arrays. The same in every container.

header = ShardHeader.of(records); header.to_attributes() -> JSON; ShardHeader.from_attributes(json)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.record import PREDICTIONS, Record, item_id

FIELDS = ("latents", *PREDICTIONS)
"""The third axis of `points`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """Keys, prompts, seeds and noise levels of a shard's records, R of them with K points each."""

    keys: tuple[str, ...]
    digests: tuple[str, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    prompts: tuple[str, ...]
    """Distinct, in order of first use."""
    prompt_of: tuple[int, ...]
    text_lengths: tuple[int, ...]
    """Tokens of each distinct prompt; their rows follow each other."""
    timesteps: NDArray[np.float32]  # [R, K]
    sigmas: NDArray[np.float32]  # [R, K]
    expert: NDArray[np.uint8]  # [R, K]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Self:
        by_prompt = {record.prompt: record for record in records}
        prompts = tuple(by_prompt)
        index = {prompt: i for i, prompt in enumerate(prompts)}
        return cls(
            keys=tuple(record.key for record in records),
            digests=tuple(record.digest() for record in records),
            seeds=tuple(record.seed for record in records),
            height=records[0].height,
            width=records[0].width,
            prompts=prompts,
            prompt_of=tuple(index[record.prompt] for record in records),
            text_lengths=tuple(len(by_prompt[prompt].text) for prompt in prompts),
            timesteps=np.stack([record.timesteps for record in records]),
            sigmas=np.stack([record.sigmas for record in records]),
            expert=np.stack([record.expert for record in records]),
        )

    @property
    def item(self) -> str:
        return item_id(list(self.keys))

    @property
    def text_starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.text_lengths)[:-1]]).astype(np.int64)

    def to_attributes(self) -> dict[str, Any]:
        """JSON keeps a float32 exactly: it is written as the double that it is."""
        return {
            "item": self.item,
            "fields": list(FIELDS),
            "height": self.height,
            "width": self.width,
            "keys": list(self.keys),
            "digests": list(self.digests),
            "seeds": list(self.seeds),
            "prompts": list(self.prompts),
            "prompt_of": list(self.prompt_of),
            "text_lengths": list(self.text_lengths),
            "timesteps": self.timesteps.astype(float).tolist(),
            "sigmas": self.sigmas.astype(float).tolist(),
            "expert": self.expert.tolist(),
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> Self:
        return cls(
            keys=tuple(attributes["keys"]),
            digests=tuple(attributes["digests"]),
            seeds=tuple(attributes["seeds"]),
            height=attributes["height"],
            width=attributes["width"],
            prompts=tuple(attributes["prompts"]),
            prompt_of=tuple(attributes["prompt_of"]),
            text_lengths=tuple(attributes["text_lengths"]),
            timesteps=np.array(attributes["timesteps"], np.float32),
            sigmas=np.array(attributes["sigmas"], np.float32),
            expert=np.array(attributes["expert"], np.uint8),
        )
