"""Where a teacher's networks go: a pure function of their sizes, what is free and what is wished.

placement = place(sizes, machine, wish)       never over the budget; Refused where nothing fits, with what would do
print("\\n".join(placement.lines()))           what goes where, GB each, what it costs

sizes of model (harvest/loading/measure.py) + free memory + wish -> one way after the other (ways.py) -> Placement
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.errors import BadUsage, Refused
from common.log import human_bytes
from harvest.placing.places import CONTEXT_BYTES, CPU, DISK, VAE, Machine, Place, Placement, Size, Wish
from harvest.placing.ways import AUTO, WAYS, gpu_peak, work_on

MAP = "map"


def place(sizes: Sequence[Size], machine: Machine, wish: Wish) -> Placement:
    """Every component's place."""
    if wish.strategy == MAP:
        return _as_told(sizes, machine, wish)
    if wish.strategy == "auto":
        tried = AUTO if machine.gpus else (CPU,)
    else:
        tried = (wish.strategy,)
    # Encoding on the CPU is slower than moving weights to the GPU: that an encoder goes there is the last resort.
    wishes = [replace(wish, text_encoder="gpu"), wish] if machine.gpus and wish.text_encoder == "auto" else [wish]
    for last in wishes:
        for strategy in tried:
            found = WAYS[strategy](sizes, machine, last)
            if found is not None:
                return found
    raise Refused(
        wrong=f"the teacher does not fit on this machine ({', '.join(tried)} tried)",
        found=_machine_line(machine, wish.budget),
        mend="; ".join(_would_do(sizes, machine, wish)),
    )


def _machine_line(machine: Machine, budget: float) -> str:
    gpus = ", ".join(f"{human_bytes(free)} free on {gpu}" for gpu, free in machine.gpus.items()) or "no GPU"
    return f"{gpus}, {human_bytes(machine.host)} of host memory, of which {budget:.0%} may be used"


def _would_do(sizes: Sequence[Size], machine: Machine, wish: Wish) -> list[str]:
    """What would let each way work: a GPU of so much, or so much host memory."""
    experts = [size for size in sizes if not size.is_encoder]
    whole = sum(size.num_bytes for size in sizes)
    hows = {size.name: "turns" for size in sizes}
    streamed = hows | {size.name: "stream" for size in experts}
    gpu = {name: int(gpu_peak(told, sizes, wish.work_bytes) / wish.budget) + 1
           for name, told in (("swap", hows), ("stream", streamed))}  # fmt: skip
    host = int(whole * max(len(machine.gpus), 1) / wish.budget) + 1
    kept = f"{human_bytes(host)} of host memory" + ("" if wish.prepared else " (less with teacher.prepared)")
    mapped = int((max(size.num_bytes for size in sizes) + wish.work_bytes) / wish.budget) + 1
    return [
        f"stream wants {human_bytes(gpu['stream'])} free on each GPU and {kept}",
        f"swap wants {human_bytes(gpu['swap'])} and the same",
        f"cpu wants {human_bytes(int((whole + wish.work_bytes) / wish.budget) + 1)} of host memory"
        + ("" if wish.prepared else f", or {human_bytes(mapped)} with teacher.prepared"),
        "a smaller micro_batch or picture wants less beside the weights" if wish.work_bytes > CONTEXT_BYTES else
        "a half dtype halves the weights of a float32 teacher",
    ]  # fmt: skip


def _as_told(sizes: Sequence[Size], machine: Machine, wish: Wish) -> Placement:
    """The user's own map of modules to devices, held to the same budget."""
    known = {*machine.gpus, CPU, *([DISK] if wish.prepared else [])}
    odd = set(wish.modules.values()) - known
    if odd:
        raise BadUsage(
            wrong="teacher.placement names a device that is not there",
            found=", ".join(sorted(odd)),
            mend=f"use {', '.join(sorted(known))}" + ("" if wish.prepared else f" ({DISK} wants teacher.prepared)"),
        )
    pictures = [size for size in sizes if size.name == VAE]  # no network of the teacher's: it has no place of its own
    sizes = [size for size in sizes if size.name != VAE]
    told = {size.name: {module: _device_of(size.name, module, wish.modules) for module in size.modules}
            for size in sizes}  # fmt: skip
    held = dict.fromkeys(machine.gpus, CONTEXT_BYTES) | {CPU: 0}
    for size in sizes:
        at = _told_place(size, told[size.name])
        for module, num_bytes in size.modules.items():
            if told[size.name][module] != DISK:
                held[told[size.name][module]] += num_bytes
        # What lies elsewhere comes to where it computes, one module at a time.
        away = [num for module, num in size.modules.items() if told[size.name][module] in (CPU, DISK)]
        if at.how == "split":
            held[at.device] += max(away, default=0)
    budgets = {name: int(free * wish.budget) for name, free in {**machine.gpus, CPU: machine.host}.items()}
    experts = [size.name for size in sizes if not size.is_encoder]
    working = {device for name in experts for device in told[name].values()} - {CPU, DISK} or {CPU}
    used = {device for devices in told.values() for device in devices.values()} | working
    places = tuple(_told_place(size, told[size.name]) for size in sizes)
    device = next(place.device for place in places if place.name in experts)
    plan = Placement(strategy=MAP, workers=1, device=device, places=places, peaks={}, budgets=budgets)
    computing = [place for place in places if place.name in experts]
    peaks = {device: bytes_ + (work_on(device, computing, wish, plan.in_flight) if device in working else 0)
             for device, bytes_ in held.items() if device in used}  # fmt: skip
    for vae in pictures:  # it waits in host memory, and comes when no expert works
        peaks[CPU] = peaks.get(CPU, 0) + vae.num_bytes
        comes = 2 * vae.num_bytes if device == CPU else vae.num_bytes
        peaks[device] = max(peaks[device], held[device] + comes + vae.own_work)
    over = [device for device, peak in peaks.items() if peak > budgets[device]]
    if over:
        raise Refused(
            wrong=f"teacher.placement puts too much on {over[0]}",
            found=f"{human_bytes(peaks[over[0]])} of {human_bytes(budgets[over[0]])}",
            mend="move some blocks elsewhere, or take `auto`",
        )
    return replace(plan, peaks=peaks)


def _told_place(size: Size, modules: Mapping[str, str]) -> Place:
    devices = list(dict.fromkeys(modules.values()))
    computing = [device for device in devices if device not in (CPU, DISK)] or [CPU]
    if devices == [CPU]:
        return Place(name=size.name, num_bytes=size.num_bytes, how="host", device=CPU, kept="memory")
    if len(devices) == 1 and devices[0] != DISK:
        return Place(name=size.name, num_bytes=size.num_bytes, how="resident", device=devices[0])
    return Place(name=size.name, num_bytes=size.num_bytes, how="split", device=computing[0], modules=modules)


def _device_of(name: str, module: str, told: Mapping[str, str]) -> str:
    """By the longest prefix that the map names."""
    path = f"{name}.{module}"
    while path:
        if path in told:
            return told[path]
        path = path.rpartition(".")[0]
    raise BadUsage(
        wrong="teacher.placement leaves a module out",
        found=f"{name}.{module}",
        mend=f"name it, or all of '{name}'",
    )
