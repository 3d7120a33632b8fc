"""What every teacher needs of its folder: device and dtype chosen, networks placed and on their way, their identity.

    parts = load_parts(config, resolved, ("text_encoder", "transformer", "transformer_2"), watch, log, needs)
    parts.networks.ready("transformer"), parts.tokenizer, parts.fingerprints

Where the identity of these very files is known (prepared, or seen before) it returns with the first two networks in,
and the last one comes behind; else all of them are read and hashed first, for the contract wants their identity.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.errors import Refused
from common.log import Log, gpu_label
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.loading.arrivals import Arrivals
from harvest.loading.circle import Circle, join
from harvest.loading.folder import Component, Resolved
from harvest.loading.hands import Hands
from harvest.loading.identity import Digests, Remembered, fingerprint, fingerprint_files, tensor_digests
from harvest.loading.kernels import Kernels, choose_kernels, require_compilable
from harvest.loading.measure import TEXT_ENCODER, Needs, machine_at_hand, sizes_of, vae_sizes, wish_of
from harvest.loading.networks import Networks
from harvest.loading.prepare import from_prepared, prepare, prepared_digests
from harvest.loading.weights import class_of, kept_in_float32, load_model
from harvest.placing.placement import place
from harvest.placing.places import VAE, Placement
from harvest.teacher import Fingerprints

TOKENIZER = "tokenizer"
Check = Callable[["Parts"], str]
"""Looks at loaded networks; "" or what is odd about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    device: str
    """Where the work's tensors are."""
    dtype: torch.dtype
    networks: Networks
    tokenizer: Any
    fingerprints: Fingerprints
    kernels: Kernels


def load_parts(config: TeacherConfig, resolved: Resolved, names: Sequence[str], watch: Watch, log: Log,
               needs: Needs, check: Check = lambda _: "") -> Parts:  # fmt: skip
    """The named networks, the text encoder first, then in the order in which they are needed."""
    device, dtype = choose_device(config.device), choose_dtype(config.dtype, config.device)
    if ":" in device:  # what names no GPU (pinned memory, the driver's questions) must not open another one
        torch.cuda.set_device(device)
    vae = _vae_print(resolved, needs, config, watch)
    if config.prepared is not None:
        watch.moved(preparing=str(config.prepared))
        resolved = from_prepared(resolved, prepare(resolved, config.prepared, dtype, log, watch.moved, watch.heed))
    log.say(f"teacher {config.folder} on {device_name(device)} in {dtype_name(dtype)}: {resolved.summary()}")
    chosen = [resolved.components[name] for name in names]
    arrivals = Arrivals(watch, log, {part.name: part.folder for part in chosen})
    placement = _placed(config, resolved, names, dtype, needs, arrivals)
    for line in placement.lines():
        log.say(f"placement {line}")
    require_compilable(config, placement)
    kernels = choose_kernels(config, placement.device, dtype, needs.attention)
    log.say(f"attention by {kernels.told}" + (", torch's own choice" if kernels.backend is None else ""))
    _bound_allocator(placement)
    memory = Remembered(chosen, dtype, {part.name: kept_in_float32(part, class_of(part), dtype) for part in chosen})
    known = None if config.rehash else memory.recall()
    if known:  # these very files were looked at before
        chosen = [replace(part, crcs={}) for part in chosen]
    circle = _circle(config, chosen, placement, dtype, known, watch, arrivals, log)
    networks = Networks(chosen, placement, dtype, arrivals, circle)
    hashed: dict[str, Digests] = {}
    with contextlib.ExitStack() as on_fault:
        on_fault.callback(networks.abandon)
        networks.start(None if known or config.prepared else hashed)
        digests = {part.name: _digests(part, networks, config, known, hashed) for part in chosen}
        tokenizer = resolved.components[TOKENIZER]
        parts = Parts(
            device=placement.device,
            dtype=dtype,
            networks=networks,
            tokenizer=load_tokenizer(tokenizer),
            fingerprints=_fingerprints(digests, tokenizer, vae),
            kernels=kernels,
        )
        for name in names[:2]:
            networks.model(name)
        _require_embeddings(networks.model(TEXT_ENCODER))
        odd = known["odd"] if known else check(parts)
        if known is None:
            memory.write({"digests": digests, "odd": odd})
        if odd:
            log.say(f"WARNING {odd}")
        on_fault.pop_all()
    return parts


def _placed(config: TeacherConfig, resolved: Resolved, names: Sequence[str], dtype: torch.dtype, needs: Needs,
            arrivals: Arrivals) -> Placement:  # fmt: skip
    """The files' headers are read in a thread: they are the first bytes that a disk may keep to itself."""
    hand = Hands(1, "headers")
    try:
        sizes = [
            arrivals.wait(hand.submit(sizes_of, resolved, [name], dtype, arrivals.moved), name)[0] for name in names
        ]
        sizes += arrivals.wait(hand.submit(vae_sizes, resolved, needs, arrivals.moved), VAE)
    finally:
        hand.finish()
    return place(sizes, machine_at_hand(config.device), wish_of(config, needs))


def _circle(config: TeacherConfig, chosen: Sequence[Component], placement: Placement, dtype: torch.dtype,
            known: Mapping[str, Any] | None, watch: Watch, arrivals: Arrivals, log: Log) -> Circle | None:  # fmt: skip
    files = [str(path) for part in chosen for path in part.files]
    places = [f"{place.name} {place.how} {place.kept}" for place in placement.places]
    what = {"files": files, "dtype": str(dtype), "places": places, "known": known is not None}
    return join(config, placement.device, what, watch, arrivals.moved, log)


def _digests(part: Component, networks: Networks, config: TeacherConfig, known: Mapping[str, Any] | None,
             hashed: Mapping[str, Digests]) -> Digests:  # fmt: skip
    """What was written down of these files, or what was taken while they were read."""
    if part.prepared and not config.rehash:
        return prepared_digests(part)
    if known is not None:
        told: Digests = known["digests"][part.name]
        return told
    model = networks.model(part.name)
    return tensor_digests(model) if part.prepared else hashed[part.name]


def load_tokenizer(part: Component) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(part.folder), local_files_only=True)


def count_tokens(tokenizer: Any, prompts: list[str]) -> list[int]:
    """With the marks that the tokenizer adds, and nothing cut."""
    return [len(ids) for ids in tokenizer(prompts, add_special_tokens=True, verbose=False).input_ids]


def _vae_print(resolved: Resolved, needs: Needs, config: TeacherConfig, watch: Watch) -> str:
    """As it encodes: in float32, from the folder's own files."""
    if needs.tile_bytes is None:
        return ""
    part = resolved.components[VAE]
    memory = Remembered([part], torch.float32, {})
    found = None if config.rehash else memory.recall()
    if found is None:
        watch.moved(loading=VAE)
        found = {"digests": tensor_digests(load_model(part, torch.float32, heed=watch.heed))}
        memory.write(found)
    return fingerprint([found["digests"]])


def _fingerprints(digests: Mapping[str, Digests], tokenizer: Component, vae: str) -> Fingerprints:
    return Fingerprints(
        weights=fingerprint(told for name, told in digests.items() if name != TEXT_ENCODER),
        text_encoder=fingerprint([digests[TEXT_ENCODER]]),
        vae=vae,
        tokenizer=fingerprint_files(path for path in tokenizer.folder.iterdir() if _is_of_a_tokenizer(path)),
    )


def _is_of_a_tokenizer(path: Path) -> bool:
    """Not what a file system, a desktop or a download leaves beside."""
    return path.is_file() and path.name[0] != "." and path.suffix != ".md"


def _bound_allocator(placement: Placement) -> None:
    """The budget binds torch's allocator too: what was not planned for fails here, not in a neighbour's process."""
    for device in placement.peaks:
        if device.startswith("cuda"):
            index = torch.device(device).index
            total = torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(placement.budgets[device] / total, 1.0), index)


def choose_device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """bfloat16 where the hardware has it: Wan and its text encoder degrade in float16."""
    if wanted != "auto":
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    if choose_device(device) == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: str) -> str:
    """For people: an index alone means nothing under CUDA_VISIBLE_DEVICES."""
    if not device.startswith("cuda"):
        return device
    index = torch.device(device).index or 0
    return gpu_label(index=index, uuid=str(torch.cuda.get_device_properties(index).uuid), rank=0)


def _require_embeddings(encoder: Any) -> None:
    """An encoder whose file lacks the embeddings gets random or empty ones without a word where they are tied."""
    weight = encoder.get_input_embeddings().weight
    if not weight.is_meta and not weight.any():  # meta: the user's map keeps it on the disk
        raise Refused(
            wrong="the text encoder's embeddings are empty", found="only zeros", mend="fetch text_encoder again"
        )
