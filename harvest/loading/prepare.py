"""Weights converted once: a folder that later loads as fast as the disk reads.

    prepare(resolved, out_dir, torch.bfloat16, log)      float32 -> mixed bfloat16/float32, tensor by tensor
    resolved = from_prepared(resolved, out_dir)          the same teacher, its weights taken from there

    out_dir/<component>/model.safetensors     in the dtypes that the component computes in
    out_dir/prepared.json                     policy, source files, digest and crc32c of each tensor: written last

Small staging buffers and several threads for bytes and casts; never a second copy of the weights in memory. A prepared
component is then mapped and assigned, not read: several workers of a node share its pages. Checksums are looked at when
these very files are loaded for the first time on a machine, and with `teacher.rehash`.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.claim import claimed
from common.errors import Partial
from common.extents import crc32c
from common.files import sweep, sync_folder, write_atomic
from common.log import Log, human_bytes
from common.tensor_file import ITEM_BYTES, StoredTensor
from harvest.loading.folder import Component, Resolved
from harvest.loading.hands import Hands, patiently
from harvest.loading.identity import THREADS, tensor_digest, tied_names
from harvest.loading.reading import TORCH_DTYPES, Moved, read_tensor
from harvest.loading.weights import build, class_of, kept_in_float32, policy_dtype, sources_of

MANIFEST_NAME, WEIGHTS_NAME, LOCK_NAME = "prepared.json", "model.safetensors", "lock.json"
POLICY_VERSION = 1
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def prepare(resolved: Resolved, out_dir: Path, dtype: torch.dtype, log: Log, moved: Moved = lambda **_: None,
            heed: Callable[[], None] = lambda: None) -> Path:  # fmt: skip
    """Convert every component that has weights; what is prepared and fresh is left alone. `moved` hears of every
    tensor, also of another process that converts the same; it may raise to stop, as `heed` may, which is called while
    nothing comes."""
    if is_fresh(resolved, out_dir, dtype):
        log.say(f"{out_dir} is prepared already")
        return out_dir
    todo = [part for part in resolved.components.values() if part.files]
    sizes = {part.name: _prepared_bytes(part, dtype) for part in todo}
    _require_room(out_dir, sum(sizes.values()))
    # Of several workers one converts; the others wait, and find it done.
    what = f"the preparation of {out_dir}"
    with claimed(out_dir / LOCK_NAME, what, waiting=_onlooker(out_dir, moved, heed)):
        if not is_fresh(resolved, out_dir, dtype):
            _convert(todo, sizes, resolved, out_dir, dtype, log, moved, heed)
    return out_dir


def _onlooker(out_dir: Path, moved: Moved, heed: Callable[[], None]) -> Callable[[str], None]:
    """Moves as the holder's bytes do: when he stands still, so does who waits for him, and says so in time."""
    seen = -1

    def look(holder: str) -> None:
        nonlocal seen
        there = sum(map(_size_now, out_dir.rglob("*")))
        if there == seen:
            heed()
            return
        seen = there
        moved(loading="prepare", waiting_for=holder, bytes_there=there)

    return look


def _size_now(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a temporary name that is another now
        return 0


def _convert(todo: Sequence[Component], sizes: Mapping[str, int], resolved: Resolved, out_dir: Path,
             dtype: torch.dtype, log: Log, moved: Moved, heed: Callable[[], None]) -> None:  # fmt: skip
    log.say(f"preparing {human_bytes(sum(part.num_bytes for part in todo))} into {human_bytes(sum(sizes.values()))}")
    told: dict[str, dict[str, Any]] = {}
    if (out_dir / MANIFEST_NAME).exists():  # it speaks of the weights that are replaced now
        (out_dir / MANIFEST_NAME).unlink()
        sync_folder(out_dir)
    for part in todo:
        path = out_dir / part.name / WEIGHTS_NAME
        tensors: dict[str, str] = {}
        crcs: dict[str, int] = {}
        write_atomic(path, _stream(part, dtype, tensors, crcs, moved, heed))
        sweep(path.parent, older_than_s=3600.0)
        told[part.name] = {"bytes": path.stat().st_size, "tensors": tensors, "crc32c": crcs}
        log.say(f"prepared {part.name}", bytes=human_bytes(path.stat().st_size))
    manifest = {**_key(resolved, dtype), "components": told}
    write_atomic(out_dir / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())


def from_prepared(resolved: Resolved, out_dir: Path) -> Resolved:
    """The same teacher with its weights taken from what was prepared of it."""
    told = json.loads((out_dir / MANIFEST_NAME).read_bytes())["components"]
    parts = {
        name: replace(
            part,
            files=(out_dir / name / WEIGHTS_NAME,),
            prepared=True,
            original=False,
            crcs=told[name].get("crc32c", {}),
        )  # older ones have none
        if part.files
        else part
        for name, part in resolved.components.items()
    }
    return replace(resolved, components=parts)


def prepared_digests(part: Component) -> dict[str, str]:
    """What `tensor_digests` would say, from what was written down while preparing: no byte is read."""
    path = part.files[0].parent.parent / MANIFEST_NAME
    stored: dict[str, str] = json.loads(path.read_bytes())["components"][part.name]["tensors"]
    tied = tied_names(class_of(part))
    return stored | {name: stored[target] for name, target in tied.items() if target in stored}


def is_fresh(resolved: Resolved, out_dir: Path, dtype: torch.dtype) -> bool:
    """Made by this policy from these very files, and whole."""
    key = _key(resolved, dtype)
    try:
        manifest = json.loads((out_dir / MANIFEST_NAME).read_bytes())
        manifest.setdefault("float32", key["float32"])  # of older ones nobody knows: loading will tell
        sizes = {name: entry["bytes"] for name, entry in manifest.pop("components").items()}
        there = {name: (out_dir / name / WEIGHTS_NAME).stat().st_size for name in sizes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(manifest == key and sizes == there)


def _key(resolved: Resolved, dtype: torch.dtype) -> dict[str, Any]:
    """What a prepared folder depends on."""
    files = {
        f"{part.name}/{path.name}": [path.stat().st_size, path.stat().st_mtime_ns]
        for part in resolved.components.values()
        for path in part.files
    }
    weighty = [part for part in resolved.components.values() if part.files]
    configs = {part.name: part.config for part in weighty}
    text = json.dumps(configs, sort_keys=True)
    return {
        "policy": POLICY_VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "configs": hashlib.sha256(text.encode()).hexdigest(),
        "float32": {part.name: sorted(kept_in_float32(part, class_of(part), dtype)) for part in weighty},
        "sources": dict(sorted(files.items())),
    }


def _targets(part: Component, dtype: torch.dtype) -> dict[str, tuple[StoredTensor, torch.dtype]]:
    model = build(part)
    return {name: (stored, policy_dtype(part, model, name, dtype)) for name, stored in sources_of(part, model).items()}


def _prepared_bytes(part: Component, dtype: torch.dtype) -> int:
    return sum(math.prod(stored.shape) * target.itemsize for stored, target in _targets(part, dtype).values())


def _stream(part: Component, dtype: torch.dtype, digests: dict[str, str], crcs: dict[str, int], moved: Moved,
            heed: Callable[[], None]) -> Iterator[memoryview | bytes]:  # fmt: skip
    """The prepared file's bytes, a few tensors ahead of the disk; fills `digests` and `crcs` as they pass."""
    targets = _targets(part, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (stored, target) in targets.items():
        size = math.prod(stored.shape) * ITEM_BYTES[_NAMES[target]]
        header[name] = {"dtype": _NAMES[target], "shape": list(stored.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that every tensor of a mapped file is aligned
    yield len(text).to_bytes(8, "little") + text
    reads = [partial(read_tensor, stored, target) for stored, target in targets.values()]
    for name, tensor in zip(targets, _ahead(reads, heed), strict=True):
        digests[name] = tensor_digest(tensor)
        moved(loading="prepare", file=f"{part.name}/{name}")
        data = tensor.view(-1).view(torch.uint8).numpy().data
        crcs[name] = crc32c(data)
        yield data


def _ahead(reads: Sequence[Callable[[], Tensor]], heed: Callable[[], None]) -> Iterator[Tensor]:
    """In order, THREADS of them under way."""
    hands = Hands(THREADS, "prepare")
    try:
        waiting = [hands.submit(read) for read in reads[:THREADS]]
        for number in range(len(reads)):
            tensor = patiently(waiting.pop(0), heed)
            if number + THREADS < len(reads):
                waiting.append(hands.submit(reads[number + THREADS]))
            yield tensor
    finally:
        hands.finish()


def _require_room(out_dir: Path, num_bytes: int) -> None:
    place = out_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes > free * 0.99:
        raise Partial(
            wrong="the prepared weights do not fit on the disk",
            found=f"{human_bytes(num_bytes)} to write, {human_bytes(free)} free in {place}",
            mend="give another folder, or run without teacher.prepared",
        )
