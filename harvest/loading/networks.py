"""A teacher's networks: on their way, in, and each on its place when it is asked for.

    networks = Networks(parts, placement, dtype, arrivals)
    networks.start(digests)                 every module is built here, one at a time; bytes move in threads behind
    encoder = networks.ready("text_encoder")            waits until it is in and brings it where it computes

    file -> read, cast, hashed by THREADS -> its device, one transfer at a time a GPU      the next component behind it

What may start early starts early: nobody waits for a network that is not asked for yet.
"""

import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from common.errors import Refused
from common.tensor_file import read_header
from harvest.loading.arrivals import Arrivals
from harvest.loading.circle import PULSE_S, Circle
from harvest.loading.folder import Component
from harvest.loading.hands import Hands, patiently
from harvest.loading.identity import THREADS, Digests, tied_names
from harvest.loading.transfer import Lanes, Turns, pinned
from harvest.loading.weights import assigned, build, fill_model
from harvest.placing.places import DISK, Place, Placement, module_of

AT_ONCE = 2
"""Components whose bytes are under way at the same time."""


class Networks:
    def __init__(
        self, parts: Sequence[Component], placement: Placement, dtype: torch.dtype, arrivals: Arrivals,
        circle: Circle | None = None,
    ) -> None:  # fmt: skip
        """parts: in the order in which they are needed; circle: who shares those that stay where they compute."""
        self._parts, self._placement, self._dtype = parts, placement, dtype
        self._arrivals, self._lanes, self._turns = arrivals, Lanes(), Turns(placement.device)
        self._circle, self._coming = circle, dict[str, Future[Any]]()
        self._pools: tuple[Hands, ...] = ()
        if circle:
            arrivals.look = circle.look

    def start(self, digests: dict[str, Digests] | None = None) -> None:
        """digests: filled, by component, with those of tensors that are not prepared."""
        models = {part.name: build(part) for part in self._parts}
        bytes_pool, components = Hands(THREADS, "bytes"), Hands(AT_ONCE, "components")
        speaker = Hands(1 if self._circle else 0, "speaker")  # one, so that all of them say all in one order
        shared = shared_parts(self._parts, self._placement) if self._circle else []
        for part in self._parts:
            told = None if digests is None else digests.setdefault(part.name, {})
            if part in shared and self._circle and self._circle.rank:
                coming = speaker.submit(self._receive, self._circle, part, models[part.name], told)
            else:
                coming = components.submit(self._bring_in, part, models[part.name], bytes_pool, told)
                if part in shared and self._circle:
                    coming = speaker.submit(self._share, self._circle, part, coming, told)
            self._coming[part.name] = coming
        if self._circle:
            speaker.submit(self._circle.leave)
        self._pools = (components, speaker, bytes_pool)
        components.finish()
        speaker.finish()
        for coming in self._coming.values():
            coming.add_done_callback(lambda _: self._when_all_are_in(bytes_pool))

    def abandon(self) -> None:
        """What is not begun yet never begins: who was asked to stop does not wait for 57 GB."""
        for pool in self._pools:
            pool.leave()

    def model(self, name: str) -> Any:
        """Once it is in, wherever it is."""
        return self._arrivals.wait(self._coming[name], name)

    def ready(self, name: str) -> Any:
        """Once it is in, on its place; what took its turn before makes room."""
        model = self.model(name)
        if self._placement.of(name).how == "turns":
            with torch.inference_mode(False), torch.no_grad():
                return self._turns.bring(model)
        self._turns.clear()  # the plan counts on it: a forward has the room of whoever takes turns
        return model

    def make_room(self) -> None:
        self._turns.clear()

    @property
    def in_flight(self) -> int:
        return self._placement.in_flight

    def device_of(self, name: str) -> str:
        """Where its inputs go."""
        return self._placement.of(name).device

    def _when_all_are_in(self, bytes_pool: Hands) -> None:
        if all(coming.done() for coming in self._coming.values()):
            bytes_pool.finish()

    def _share(self, circle: Circle, part: Component, coming: "Future[Any]", digests: Digests | None) -> Any:
        """Once it is in."""
        model = patiently(coming, circle.pulse, every_s=PULSE_S)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied_names(model)}
        circle.give(part.name, tensors, {"digests": digests})
        return model

    def _receive(self, circle: Circle, part: Component, model: Any, digests: Digests | None) -> Any:
        place = self._placement.of(part.name)

        def make(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
            self._arrivals.moved(loading=part.name, file="from another worker")
            return torch.empty(shape, dtype=dtype, device=place.device)

        notes, tensors = circle.take(part.name, make)
        if digests is not None:
            digests |= notes["digests"]
        return settle(assigned(part, model, tensors, digests), place, part)

    def _bring_in(self, part: Component, model: Any, pool: Hands, digests: Digests | None) -> Any:
        place = self._placement.of(part.name)

        def put(name: str, tensor: Tensor) -> Tensor:
            if place.kept == "pinned":
                return pinned(tensor)
            return self._lanes.send(tensor, _device_of_tensor(place, name))

        # A driver pins no mapped pages, and a GPU is fed faster by several readers than by page faults.
        mapped = place.how in ("host", "split") or place.kept == "mapped"
        touched = place.kept != "mapped" and DISK not in place.modules.values()
        fill_model(part, model, self._dtype, pool=pool, moved=self._arrivals.moved, put=put, mapped=mapped,
                   touched=touched, digests=digests)  # fmt: skip
        return settle(model, place, part)


def shared_parts(parts: Sequence[Component], placement: Placement) -> list[Component]:
    """Those that stay on the one device; prepared ones on a CPU are mapped, and shared by that already."""
    places = [(part, placement.of(part.name)) for part in parts]
    here = [(part, place) for part, place in places if place.device == placement.device]
    return [part for part, place in here if place.how == "resident" or (place.how == "host" and not part.prepared)]


def _device_of_tensor(place: Place, name: str) -> str:
    """Where a tensor stays; what takes turns or is streamed waits on the CPU."""
    if place.how == "resident":
        return place.device
    return place.modules[module_of(name)] if place.how == "split" else "cpu"


def settle(model: Any, place: Place, part: Component) -> Any:
    """A whole network as its place wants it: its buffers beside its weights, the libraries' hooks on it."""
    if place.how == "resident":
        return model.to(place.device)
    if place.how == "split":
        return _dispatched(model, place, part)
    if place.how == "stream":
        return _streamed(model, place)
    return model


def _dispatched(model: Any, place: Place, part: Component) -> Any:
    """By accelerate: each module's inputs come to its device, what is kept elsewhere comes for its forward."""
    from accelerate import dispatch_model

    # It warns of a parameter that is the network's own, in no module below it: that one stays where it was put.
    warnings.filterwarnings("ignore", "The following device_map keys do not match", UserWarning)
    index = None
    if DISK in place.modules.values():
        if not part.prepared:
            raise Refused(wrong=f"{part.name} cannot stay on the disk", found="files of another dtype",
                          mend="set teacher.prepared")  # fmt: skip
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in model.state_dict().items()}
        index = {
            name: {"safetensors_file": str(path), "weight_name": name, "dtype": dtypes[name]}
            for path in part.files
            for name in read_header(path)
        }
    # The map is of stored tensors: what has only buffers of its own (rope) would stay on the host, and each block would
    # fetch them from there, the host waiting every time.
    unmapped = [
        name
        for name, module in model.named_modules()
        if [*module.buffers(recurse=False)] and not any(f"{name}.".startswith(f"{top}.") for top in place.modules)
    ]
    modules = {**place.modules, **dict.fromkeys(filter(None, unmapped), place.device)}
    return dispatch_model(model, device_map=modules, main_device=place.device, offload_index=index, force_hooks=True)


def _streamed(model: Any, place: Place) -> Any:
    """By diffusers: a block at a time, the next one fetched on a stream beside the one at work."""
    from diffusers.hooks import apply_group_offloading

    on_gpu = place.device.startswith("cuda")
    apply_group_offloading(
        model,
        onload_device=torch.device(place.device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
        record_stream=on_gpu,
        # The weights are where they wait already; without this they would all be copied into pinned memory again.
        low_cpu_mem_usage=True,
    )
    return model
