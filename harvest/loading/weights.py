"""A component's weights into memory, once, and the certainty that all of them came.

    model = load_model(component, torch.bfloat16, moved=watch.moved)

    build on the meta device (one at a time) -> for each tensor its stored piece and its dtype by policy
        same dtype: read straight into place;  another: through a small staging buffer a thread, cast into place;
        prepared files (harvest/loading/prepare.py): mapped
    -> assign, tie -> refuse what is missing, extra, of another shape, on meta or not finite

Loaders trust too much: a missing weight is a warning and a tensor on the meta device, an encoder without its embeddings
gets random ones. Threads move bytes and cast; modules are never built in threads (accelerate's context is global).
"""

import hashlib
import importlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import Corrupt, Refused
from common.tensor_file import StoredTensor, read_header
from common.wan_names import diffusers_name
from harvest.loading.folder import Component
from harvest.loading.hands import Hands, patiently
from harvest.loading.identity import THREADS, complete_digests, digest_line, tied_names

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STAGING_BYTES = 1 << 20
"""Small enough that a piece is cast and looked at while it is in the cache."""
_BUILDING = threading.Lock()
Moved = Callable[..., None]
Put = Callable[[str, Tensor], Tensor]


def load_model(part: Component, dtype: torch.dtype, *, moved: Moved = lambda **_: None,
               heed: Callable[[], None] = lambda: None) -> Any:  # fmt: skip
    """The network of a component on the CPU, in eval mode, bitwise as its own library would load it."""
    moved(loading=part.name)
    pool, waiter = Hands(THREADS, "bytes"), Hands(1, "component")
    try:
        return patiently(waiter.submit(lambda: fill_model(part, build(part), dtype, pool=pool, moved=moved)), heed)
    finally:
        waiter.finish()
        pool.finish()


def fill_model(part: Component, model: Any, dtype: torch.dtype, *, pool: Hands, moved: Moved,
               put: Put = lambda _, tensor: tensor, mapped: bool = True,
               digests: dict[str, str] | None = None) -> Any:  # fmt: skip
    """A built model with its weights; no module is made here, so several may be filled at once.

    put: takes each tensor to its device as soon as it is there.
    mapped: prepared files are mapped, not read: for tensors that stay on the CPU.
    digests: filled with what `tensor_digests` would say, taken while the bytes are in the cache.
    """
    sources = sources_of(part, model, moved)

    def dtype_of(name: str) -> torch.dtype:
        return policy_dtype(part, model, name, dtype)

    if part.prepared:
        _require_policy(part, sources, dtype_of)
    if part.prepared and mapped:
        filled = dict(pool.map(lambda item: (item[0], put(*item)), mapped_tensors(sources).items()))
    else:
        filled = fill(sources, dtype_of, part.name, pool, moved, put, digests)
    return assigned(part, model, filled, digests)


def assigned(part: Component, model: Any, filled: Mapping[str, Tensor], digests: dict[str, str] | None) -> Any:
    with _BUILDING:  # a module that is built meanwhile would put these parameters on meta: the context is global
        model.load_state_dict(filled, strict=False, assign=True)
        model.tie_weights() if hasattr(model, "tie_weights") else None
    _require_whole(part, model)
    if digests is not None:
        complete_digests(model, digests)
    return model.eval().requires_grad_(False)


def class_of(part: Component) -> Any:
    return getattr(importlib.import_module(part.library), part.class_name)


def build(part: Component) -> Any:
    """The module with its parameters on the meta device; buffers are real."""
    model_class = class_of(part)
    from accelerate import init_empty_weights

    with _BUILDING, init_empty_weights():
        if part.library == "transformers":
            return model_class(model_class.config_class.from_pretrained(str(part.folder), local_files_only=True))
        return model_class.from_config({key: value for key, value in part.config.items() if key != "_name_or_path"})


def policy_dtype(part: Component, model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is computed in: modules that a model keeps in float32 stay so. diffusers keeps them under both
    half types; transformers under float16 alone, and a second list under both."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if part.library != "transformers" or dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if kept & set(name.split(".")) else dtype


def fill(
    sources: Mapping[str, StoredTensor],
    dtype_of: Callable[[str], torch.dtype],
    part: str,
    pool: Hands,
    moved: Moved,
    put: Put,
    digests: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Every tensor in its dtype, read and cast by several threads."""
    total, done, lock = sum(stored.num_bytes for stored in sources.values()), 0, threading.Lock()

    def one(name: str) -> tuple[str, Tensor]:
        nonlocal done
        running = hashlib.sha256() if digests is not None else None
        moved(loading=part, file=sources[name].path.name, bytes_read=done, bytes_total=total)
        tensor = read_tensor(sources[name], dtype_of(name), running)
        if digests is not None and running is not None:
            digests[name] = digest_line(tensor, running.hexdigest())
        with lock:
            done += sources[name].num_bytes
            moved(loading=part, file=sources[name].path.name, bytes_read=done, bytes_total=total)
        return name, put(name, tensor)

    # By file and offset: the disk sees one sweep.
    order = sorted(sources, key=lambda name: (str(sources[name].path), sources[name].offset))
    waiting = [pool.submit(one, name) for name in order]
    try:
        return dict(future.result() for future in waiting)
    finally:
        for future in waiting:
            future.cancel()


def read_tensor(stored: StoredTensor, dtype: torch.dtype, running: "hashlib._Hash | None" = None) -> Tensor:
    """One tensor, finite: straight into place, or through a staging buffer that is cast piece by piece; `running`
    hears of what was kept."""
    source_dtype = TORCH_DTYPES[stored.dtype]
    target = source_dtype if not source_dtype.is_floating_point else dtype
    tensor = torch.empty(stored.shape, dtype=target)
    flat = tensor.view(-1)
    step = STAGING_BYTES // source_dtype.itemsize
    in_place = source_dtype == target
    staging = flat[:0] if in_place else torch.empty(min(step, flat.numel()), dtype=source_dtype)
    fd = os.open(stored.path, os.O_RDONLY)
    try:
        for start in range(0, flat.numel(), step):
            place = flat[start : start + step]
            piece = place if in_place else staging[: len(place)]
            _read_into(fd, stored, start * source_dtype.itemsize, piece.view(torch.uint8).numpy().data)
            if not in_place:
                place.copy_(piece)
            _require_finite(stored, piece, place)
            if running is not None:
                running.update(place.view(torch.uint8).numpy().data)
    finally:
        os.close(fd)
    return tensor


def _require_finite(stored: StoredTensor, read: Tensor, kept: Tensor) -> None:
    """As it was read and as it is kept: a float32 weight may be too large for float16."""
    for piece in (read, kept) if kept.dtype == torch.float16 else (read,):
        # The sum tells at once; where it overflows by itself each value is looked at.
        if piece.is_floating_point() and not torch.isfinite(piece.sum()) and not torch.isfinite(piece).all():
            raise Corrupt(
                wrong=f"{stored.path.parent.name} holds NaN or Inf" + ("" if read is piece else " in float16"),
                found=stored.name,
                mend=f"fetch {stored.path.name} again" if read is piece else "compute in bfloat16 or float32",
            )


def mapped_tensors(sources: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Tensors over the files' own pages, which every process that maps them shares; nobody writes to them."""
    paths = {stored.path for stored in sources.values()}
    maps = {path: torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8) for path in paths}

    def piece(stored: StoredTensor) -> Tensor:
        data = maps[stored.path][stored.offset : stored.offset + stored.num_bytes]
        return data.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)

    return {name: piece(stored) for name, stored in sources.items()}


def _require_policy(
    part: Component, sources: Mapping[str, StoredTensor], dtype_of: Callable[[str], torch.dtype]
) -> None:
    for name, stored in sources.items():
        if TORCH_DTYPES[stored.dtype] != dtype_of(name):
            raise Refused(
                wrong=f"{part.name} was prepared for another dtype",
                found=f"{name} in {stored.dtype}, wanted {dtype_of(name)}",
                mend="run `python -m harvest prepare` for this dtype",
            )


def _read_into(fd: int, stored: StoredTensor, skip: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], stored.offset + skip + done)
        if got == 0:
            raise Corrupt(wrong=f"{stored.path} ends within {stored.name}", found=f"{done} of {len(view)} bytes",
                          mend=f"fetch {stored.path.name} again")  # fmt: skip
        done += got


def stored_tensors(part: Component, moved: Moved = lambda **_: None) -> dict[str, StoredTensor]:
    """What a component's files hold, by diffusers' names."""
    stored = {}
    for path in part.files:
        moved(loading=part.name, file=path.name)
        stored.update(read_header(path))
    return {diffusers_name(name): tensor for name, tensor in stored.items()} if part.original else stored


def sources_of(part: Component, model: Any, moved: Moved = lambda **_: None) -> dict[str, StoredTensor]:
    """Each tensor's stored piece, by its own name or that of the tensor it is tied to."""
    stored = stored_tensors(part, moved)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = tied_names(model)
    twins = tied | {target: name for name, target in tied.items()}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    odd = {
        "missing": [name for name in wanted if name not in stored and twins.get(name) not in stored],
        "unknown": [name for name in stored if name not in wanted and not any(rule.search(name) for rule in ignored)],
        "of another shape": [name for name, shape in wanted.items() if name in stored and stored[name].shape != shape],
    }
    if any(odd.values()):
        files = ", ".join(sorted({path.name for path in part.files})[:3])
        raise Refused(
            wrong=f"{part.name} and its files do not fit: {part.folder}",
            found="; ".join(f"{len(names)} {what}: {', '.join(names[:2])}" for what, names in odd.items() if names),
            mend=f"fetch {files} and config.json of {part.name} again",
        )
    # Of tied tensors only the one that the others are tied to is read; `tie_weights` gives it to the rest.
    return {name: stored[name if name in stored else twins[name]] for name in wanted if name not in tied}


def _require_whole(part: Component, model: Any) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise Refused(wrong=f"{part.name} did not load whole", found=f"no data for {key}", mend="fetch it again")
