"""The ways to place a teacher, each a pure function of sizes, machine and wish: a Placement within the budget, or None.

    replicate, gpu0   every expert stays on the GPU
    swap              what does not fit beside the rest takes turns with it; it waits in host memory
    balanced          each expert's blocks split over all GPUs, one process, micro-batches behind each other
    stream            an expert's blocks pass through a GPU that is smaller than it
    cpu               everything computes on the CPU

Of several arrangements that fit the one is taken that sends least to the GPU.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from harvest.placing.places import CONTEXT_BYTES, CPU, DISK, VAE, Machine, Place, Placement, Size, Wish

Way = Callable[[Sequence[Size], Machine, Wish], Placement | None]


def replicate(sizes: Sequence[Size], machine: Machine, wish: Wish) -> Placement | None:
    return _arranged("replicate", sizes, machine, wish, experts=("resident",), workers=len(machine.gpus))


def gpu0(sizes: Sequence[Size], machine: Machine, wish: Wish) -> Placement | None:
    return _arranged("gpu0", sizes, machine, wish, experts=("resident",), workers=1)


def swap(sizes: Sequence[Size], machine: Machine, wish: Wish) -> Placement | None:
    return _arranged("swap", sizes, machine, wish, experts=("resident", "turns"), workers=len(machine.gpus))


def stream(sizes: Sequence[Size], machine: Machine, wish: Wish) -> Placement | None:
    return _arranged("stream", sizes, machine, wish, experts=("stream",), workers=len(machine.gpus))


def cpu(sizes: Sequence[Size], machine: Machine, wish: Wish) -> Placement | None:
    budget = int(machine.host * wish.budget)
    for kept in ("memory", "mapped") if wish.prepared else ("memory",):
        wanted = [size.num_bytes for size in sizes if size.name != VAE]
        held = (sum(wanted) if kept == "memory" else max(wanted)) + sum(s.num_bytes for s in sizes if s.name == VAE)
        peak = held + max(wish.work_bytes, *(size.own_work for size in sizes))
        kepts = {size.name: "memory" if size.name == VAE else kept for size in sizes}
        places = tuple(
            Place(name=s.name, num_bytes=s.num_bytes, how="host", device=CPU, kept=kepts[s.name]) for s in sizes
        )
        if peak <= budget:
            return Placement(
                strategy="cpu", workers=1, device=CPU, places=places, peaks={CPU: peak}, budgets={CPU: budget}
            )
    return None


def balanced(sizes: Sequence[Size], machine: Machine, wish: Wish) -> Placement | None:
    """The encoder on the emptiest GPU if it may and can be, then each expert's blocks in proportion to what is free.
    As many micro-batches are under way as there are GPUs: each brings its text, and keeps something in every block."""
    if len(machine.gpus) < 2:
        return None
    budgets = {gpu: int(free * wish.budget) for gpu, free in machine.gpus.items()}
    even = Place(name="", num_bytes=0, how="split", device="", modules={f"{n}": gpu for n, gpu in enumerate(budgets)})
    for with_encoder in _encoder_choices(wish):
        expected = {gpu: work_on(gpu, [even], wish, len(budgets)) for gpu in budgets}
        main, pictures = next(iter(budgets)), max([0, *(s.num_bytes + s.own_work for s in sizes if s.name == VAE)])
        expected[main] = max(expected[main], pictures)
        room = {gpu: budget - CONTEXT_BYTES - expected[gpu] for gpu, budget in budgets.items()}
        places = []
        for size in sorted(sizes, key=lambda size: not size.is_encoder):
            if size.name == VAE:
                places.append(Place(name=VAE, num_bytes=size.num_bytes, how="turns", device=main))
                continue
            place = _encoder_at(size, room, with_encoder) if size.is_encoder else _split(size, room)
            if place is None or min(room.values()) < 0:
                break
            places.append(place)
        else:
            experts = [place for place in places if place.how == "split"]
            needed = {gpu: work_on(gpu, experts, wish, len(room)) for gpu in room}
            needed[main] = max(needed[main], pictures)
            room = {gpu: left + expected[gpu] - needed[gpu] for gpu, left in room.items()}
            host = _host_peak(places, machine, wish, workers=1)
            if host is not None and min(room.values()) >= 0:
                peaks = {gpu: budgets[gpu] - left for gpu, left in room.items()} | host[0]
                return Placement(
                    strategy="balanced", workers=1, device=next(iter(room)), places=host[1],
                    peaks=peaks, budgets=budgets | {CPU: int(machine.host * wish.budget)},
                )  # fmt: skip
    return None


WAYS: dict[str, Way] = {
    "replicate": replicate, "swap": swap, "balanced": balanced, "stream": stream, "gpu0": gpu0, "cpu": cpu,
}  # fmt: skip
AUTO = ("replicate", "swap", "balanced", "stream")
"""Tried in this order where there is a GPU; the CPU only when it is asked for, or when there is none."""


def _arranged(
    strategy: str, sizes: Sequence[Size], machine: Machine, wish: Wish, *, experts: Sequence[str], workers: int
) -> Placement | None:
    """One worker a GPU, all alike: the smallest GPU decides, and the host's memory is shared."""
    if not machine.gpus:
        return None
    gpus = dict(list(machine.gpus.items())[:workers])
    budget = int(min(gpus.values()) * wish.budget)
    best: tuple[tuple[bool, bool, int], Placement] | None = None
    for hows in itertools.product(*(_hows(size, experts, wish) for size in sizes)):
        if strategy == "swap" and "turns" not in hows:
            continue
        peak = gpu_peak(dict(zip([size.name for size in sizes], hows, strict=True)), sizes, wish.work_bytes)
        device = next(iter(gpus))
        places = [
            Place(name=s.name, num_bytes=s.num_bytes, how=how, device=CPU if how == "host" else device)
            for s, how in zip(sizes, hows, strict=True)
        ]
        host = _host_peak(places, machine, wish, workers=len(gpus))
        if peak > budget or host is None:
            continue
        found = Placement(
            strategy=strategy, workers=len(gpus), device=device, places=host[1],
            peaks=dict.fromkeys(gpus, peak) | host[0],
            budgets={gpu: int(free * wish.budget) for gpu, free in gpus.items()}
            | {CPU: int(machine.host * wish.budget)},
        )  # fmt: skip
        rank = ("host" in hows, found.is_mapped, found.item_bytes)
        if best is None or rank < best[0]:
            best = rank, found
    return best[1] if best else None


def _hows(size: Size, experts: Sequence[str], wish: Wish) -> Iterator[str]:
    if not size.is_encoder:
        yield from experts
        return
    if size.name == VAE:
        yield "turns"
        return
    for on_gpu in _encoder_choices(wish):
        yield from ("resident", "turns") if on_gpu else ("host",)


def _encoder_choices(wish: Wish) -> tuple[bool, ...]:
    return {"gpu": (True,), "cpu": (False,)}.get(wish.text_encoder, (True, False))


def gpu_peak(hows: Mapping[str, str], sizes: Sequence[Size], work_bytes: int) -> int:
    """Most bytes on the GPU in any phase: what stays, and of the others the one whose turn it is."""
    stays = sum(size.num_bytes for size in sizes if hows[size.name] == "resident")

    def phase(size: Size) -> int:
        comes = {"turns": size.num_bytes, "stream": size.streamed_bytes}.get(hows[size.name], 0)
        return comes + (size.own_work if size.is_encoder else work_bytes)

    return CONTEXT_BYTES + stays + max(phase(size) for size in sizes)


def _host_peak(
    places: Sequence[Place], machine: Machine, wish: Wish, *, workers: int
) -> tuple[dict[str, int], tuple[Place, ...]] | None:
    """What waits in host memory, pinned while the budget lasts; beyond it mapped, where there are prepared files."""
    budget, held, settled = int(machine.host * wish.budget), 0, []
    for place in places:
        if place.how in ("resident", "split"):
            settled.append(place)
            continue
        wanted = place.num_bytes * workers
        kept = "memory" if place.how == "host" or place.name == VAE else "pinned"
        if held + wanted > budget:
            if not wish.prepared or place.name == VAE:
                return None
            kept, wanted = "mapped", 0
        held += wanted
        settled.append(_kept(place, kept))
    return {CPU: held} if held else {}, tuple(settled)


def work_on(gpu: str, experts: Sequence[Place], wish: Wish, in_flight: int) -> int:
    """What forwards need there, so many micro-batches being under way: the first one's work, the others' texts, and of
    what every one's blocks keep the share of the expert that has most of them there."""
    kept = in_flight * wish.kept_bytes
    share = max(-(-kept * here // max(blocks, 1)) for here, blocks in (_blocks_on(gpu, place) for place in experts))
    return wish.work_bytes - wish.kept_bytes + (in_flight - 1) * wish.text_bytes + share


def _blocks_on(gpu: str, place: Place) -> tuple[int, int]:
    """How many, and of how many; one that stays whole is one."""
    devices = [device for module, device in place.modules.items() if module.rpartition(".")[2].isdigit()]
    # What lies on the CPU or the disk comes to where the inputs are.
    blocks = [place.device if device in (CPU, DISK) else device for device in devices or [place.device]]
    return blocks.count(gpu), len(blocks)


def _kept(place: Place, kept: str) -> Place:
    return Place(name=place.name, num_bytes=place.num_bytes, how=place.how, device=place.device, kept=kept)


def _encoder_at(size: Size, room: dict[str, int], on_gpu: bool) -> Place | None:
    """Takes its bytes out of `room`."""
    if not on_gpu:
        return Place(name=size.name, num_bytes=size.num_bytes, how="host", device=CPU)
    device = max(room, key=lambda gpu: room[gpu])
    room[device] -= size.num_bytes
    return Place(name=size.name, num_bytes=size.num_bytes, how="resident", device=device)


def _split(size: Size, room: dict[str, int]) -> Place | None:
    """Blocks in their order over the GPUs, to each its share of what is free; what is no block on the first."""
    blocks, first = size.blocks, next(iter(room))
    modules = {name: first for name in size.modules if name not in blocks}
    room[first] -= size.num_bytes - sum(blocks.values())
    free = {gpu: max(left, 0) for gpu, left in room.items()}
    waiting, left_free = list(blocks.items()), sum(free.values())
    for gpu, share in free.items():
        left = sum(num_bytes for _, num_bytes in waiting)
        goal, taken = left * share / max(left_free, 1), 0
        # Half a block over the goal is nearer to it than half a block under.
        while waiting and taken + waiting[0][1] / 2 <= goal and waiting[0][1] <= room[gpu]:
            name, num_bytes = waiting.pop(0)
            modules[name] = gpu
            room[gpu] -= num_bytes
            taken += num_bytes
        left_free -= share
    if waiting:
        return None
    return Place(name=size.name, num_bytes=size.num_bytes, how="split", device=first, modules=modules)
