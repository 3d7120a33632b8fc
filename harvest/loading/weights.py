"""A component's weights into memory, once, and the certainty that all of them came.

    model = load_model(component, torch.bfloat16, moved=watch.moved)

    build on the meta device (one at a time) -> for each tensor its stored piece and its dtype by policy
        -> read and cast, or mapped if it was prepared (harvest/loading/reading.py, prepare.py)
    -> assign, tie -> refuse what is missing, extra, of another shape, on meta or not finite

Loaders trust too much: a missing weight is a warning and a tensor on the meta device, an encoder without its embeddings
gets random ones. Threads move bytes and cast; modules are never built in threads (accelerate's context is global).
"""

import importlib
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import Refused
from common.tensor_file import StoredTensor, read_header
from common.wan_names import diffusers_name
from harvest.loading.folder import Component
from harvest.loading.hands import Hands, patiently
from harvest.loading.identity import THREADS, complete_digests, tied_names
from harvest.loading.reading import TORCH_DTYPES, Arriving, Moved, Put, fill, map_in

_BUILDING = threading.Lock()


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
               put: Put = lambda _, tensor: tensor, mapped: bool = True, touched: bool = True,
               digests: dict[str, str] | None = None) -> Any:  # fmt: skip
    """A built model with its weights; no module is made here, so several may be filled at once.

    put: takes each tensor to its device as soon as it is there.
    mapped: prepared files are mapped, not read: for tensors that stay on the CPU; touched: and their pages brought in
    now, where that is told and watched, not in the first forward.
    digests: filled with what `tensor_digests` would say, taken while the bytes are in the cache.
    """
    sources = sources_of(part, model, moved)

    def dtype_of(name: str) -> torch.dtype:
        return policy_dtype(part, model, name, dtype)

    if part.prepared:
        _require_policy(part, sources, dtype_of)
    if part.prepared and mapped:
        filled = map_in(sources, Arriving(part.name, sources, moved), pool, put, touched=touched,
                        crcs=part.crcs)  # fmt: skip
    else:
        filled = fill(sources, dtype_of, Arriving(part.name, sources, moved), pool, put, digests, part.crcs)
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
    """What a tensor is computed in: modules that a model keeps in float32 stay so."""
    return torch.float32 if kept_in_float32(part, model, dtype) & set(name.split(".")) else dtype


def kept_in_float32(part: Component, model: Any, dtype: torch.dtype) -> set[str]:
    """diffusers keeps them under both half types; transformers under float16 alone, and a second list under both. Their
    releases change these lists."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if part.library != "transformers" or dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept


def _require_policy(
    part: Component, sources: Mapping[str, StoredTensor], dtype_of: Callable[[str], torch.dtype]
) -> None:
    for name, stored in sources.items():
        if TORCH_DTYPES[stored.dtype] != dtype_of(name):
            raise Refused(
                wrong=f"{part.name} was prepared for another dtype",
                found=f"{name} in {stored.dtype}, wanted {dtype_of(name)}",
                mend="run `python -m harvest prepare` for this dtype (if it finds nothing to do, remove prepared.json)",
            )


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
