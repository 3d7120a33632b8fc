"""The nouns of placement: how large a teacher is, what a machine has, where each network goes.

    Size      a component's bytes by module, in the dtypes that are computed in
    Machine   what is free on it
    Wish      what the configuration asks for, and how much a forward needs beside the weights
    Place     where one component is kept and where it computes;  Placement: all of them, and what it costs

Torch-free and pure: placement.py makes a Placement of the first three, harvest/loading/networks.py carries it out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.log import human_bytes

CPU, DISK = "cpu", "disk"
VAE = "vae"
"""It is on a device only while it encodes pictures, whatever else was wished."""
CONTEXT_BYTES = 1_000_000_000
"""Of a GPU, before a weight: the driver's context, libraries' workspaces, one prompt in the text encoder."""
STREAMED_BLOCKS = 3
"""On the GPU at once while streaming: the one at work, the next one, one whose memory is not free again yet."""
_BLOCK = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.)")
HOWS = {
    "resident": "stays on {device}",
    "turns": "on {device} when it is its turn, else {kept}",
    "stream": "block by block through {device}, else {kept}",
    "split": "split over {device}",
    "host": "computes on the CPU, {kept}",
}
KEPT = {
    "": "",
    "pinned": "in pinned host memory",
    "memory": "in host memory",
    "mapped": "read from its prepared file",
}


def module_of(tensor_name: str) -> str:
    """What is placed as one: a repeated block, or else the module that a tensor belongs to."""
    block = _BLOCK.match(tensor_name)
    return block.group() if block else tensor_name.rpartition(".")[0] or tensor_name


WORKERS_HERE = ("HARVEST_WORKERS_HERE", "LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE")
"""How many share this machine: our own supervisor; torchrun; srun, as 4 or 4(x2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    name: str
    is_encoder: bool
    """Of prompts or of pictures: it is done before an expert begins."""
    modules: Mapping[str, int]
    """Bytes by module, in the order in which they are used; blocks whole."""
    own_work: int = 0
    """What an encoder's forward needs beside it; an expert's is in the wish."""

    @property
    def num_bytes(self) -> int:
        return sum(self.modules.values())

    @property
    def blocks(self) -> dict[str, int]:
        return {name: size for name, size in self.modules.items() if name.rpartition(".")[2].isdigit()}

    @property
    def streamed_bytes(self) -> int:
        """On the GPU at most while its blocks pass through."""
        blocks = self.blocks
        return self.num_bytes - sum(blocks.values()) + STREAMED_BLOCKS * max(blocks.values(), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    gpus: Mapping[str, int]
    """Free bytes by name (`cuda:0`)."""
    host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    strategy: str = "auto"
    modules: Mapping[str, str] = field(default_factory=dict)
    """With the strategy `map`: module -> device, as the user wrote it."""
    text_encoder: str = "auto"
    budget: float = 0.9
    work_bytes: int = 0
    """What a forward of an expert needs beside its weights."""
    kept_bytes: int = 0
    """Of it, what its blocks keep as long as a micro-batch is under way: it lies where they do."""
    text_bytes: int = 0
    """Of it, what a micro-batch brings."""
    prepared: bool = False
    """The weights lie on the disk as they are computed in: what does not fit may be mapped instead of kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    name: str
    num_bytes: int
    how: str
    """One of HOWS."""
    device: str
    """Where it computes; where it is split, where its inputs go."""
    kept: str = ""
    """One of KEPT: what of it is in host memory all the time."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Of a split one: module -> device."""

    def line(self) -> str:
        devices = ", ".join(dict.fromkeys(self.modules.values())) or self.device
        text = HOWS[self.how].format(device=devices, kept=KEPT[self.kept])
        return f"{self.name:<16}{human_bytes(self.num_bytes):>9}  {text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    strategy: str
    workers: int
    """How many such processes the machine holds, one a GPU."""
    device: str
    """Where the work's tensors are."""
    places: tuple[Place, ...]
    peaks: Mapping[str, int]
    """Most bytes held at once, by device; `cpu`: by all workers together."""
    budgets: Mapping[str, int]

    def of(self, name: str) -> Place:
        return next(place for place in self.places if place.name == name)

    @property
    def in_flight(self) -> int:
        """Micro-batches under way at once: one for each GPU that an expert is split over."""
        return max([1, *(len({*place.modules.values()} - {CPU, DISK}) for place in self.places)])

    @property
    def item_bytes(self) -> int:
        """Sent to the GPU for each shard's worth of records."""
        return sum(place.num_bytes for place in self.places if place.how == "turns")

    @property
    def forward_bytes(self) -> int:
        """Sent to the GPU for each forward."""
        return max((place.num_bytes for place in self.places if place.how == "stream"), default=0)

    @property
    def is_mapped(self) -> bool:
        return any(place.kept == "mapped" for place in self.places)

    @property
    def cost(self) -> str:
        costs = []
        if self.item_bytes:
            costs.append(f"{human_bytes(self.item_bytes)} to the GPU per shard")
        if self.forward_bytes:
            costs.append(f"{human_bytes(self.forward_bytes)} to the GPU per forward")
        if any(place.how == "split" for place in self.places):
            costs.append(f"micro-batches from GPU to GPU, {self.in_flight} under way")
        if any(place.how == "host" and place.device == CPU for place in self.places) and self.device != CPU:
            costs.append("prompts are encoded on the CPU")
        if self.is_mapped:
            costs.append("the disk is read again where memory is short")
        return "; ".join(costs) or "nothing is moved"

    def lines(self) -> list[str]:
        workers = f", {self.workers} workers" if self.workers > 1 else ""
        held = ", ".join(
            f"{human_bytes(peak)} of {human_bytes(self.budgets[device])} on {device}"
            for device, peak in self.peaks.items()
        )
        return [f"{self.strategy}{workers}: {self.cost}", *(place.line() for place in self.places), f"at most {held}"]


def workers_here(environment: Mapping[str, str]) -> int:
    """Between so many the memory of this machine is divided."""
    told = next((environment[name] for name in WORKERS_HERE if name in environment), "1")
    number = re.match(r"\d+", told)
    return max(1, int(number[0])) if number else 1
