"""What was loaded, by content: digests of tensors, a teacher's fingerprints, and what is remembered of them.

    told = tensor_digests(model)            `dtype shape sha256(bytes)` of each tensor
    fingerprint([told, ...])                of one or more networks: equal tensors agree, whatever their files
    memory = Remembered(parts, dtype, kept) of these very files (path, size, time, inode) in this dtype
    memory.recall() / memory.write(digests)

Remembered digests lie in the user's cache folder: a file that was changed is read again, one that was only touched too.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import write_atomic
from harvest.loading.folder import Component

THREADS = 4
POLICY_VERSION = 1
"""Of what a dtype makes of a file's tensors: another one, and nothing that was written down holds."""
Digests = dict[str, str]


def fingerprint(networks: Iterable[Mapping[str, str]]) -> str:
    """sha256 over `network/tensor dtype shape sha256(bytes)`, sorted: folders that load to the same tensors agree,
    whatever their files. Takes what `tensor_digests` says of each network."""
    lines = (f"{number}/{name} {told}" for number, digests in enumerate(networks) for name, told in digests.items())
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def tensor_digests(model: Any) -> Digests:
    """`dtype shape sha256(bytes)` of each tensor of a loaded network, hashed by several threads."""
    named = model.state_dict()
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(named, pool.map(tensor_digest, named.values()), strict=True))


def tensor_digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return digest_line(tensor, hashlib.sha256(data).hexdigest())


def digest_line(tensor: Tensor, digest: str) -> str:
    return f"{tensor.dtype} {'x'.join(map(str, tensor.shape))} {digest}"


def complete_digests(model: Any, digests: Digests) -> None:
    """Adds what was not read under its own name: tied tensors."""
    tied = tied_names(model)
    for name, tensor in model.state_dict().items():
        if name not in digests:
            digests[name] = digests[tied[name]] if tied.get(name) in digests else tensor_digest(tensor)


def tied_names(model: Any) -> dict[str, str]:
    """Tensor -> the one that it is tied to."""
    return dict(getattr(model, "_tied_weights_keys", None) or {})


def fingerprint_files(paths: Iterable[Path]) -> str:
    """sha256 over the names and bytes of small files: a tokenizer's identity."""
    running = hashlib.sha256()
    for path in sorted(paths):
        running.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return running.hexdigest()


class Remembered:
    """The digests of some components' tensors, kept beside what their files looked like."""

    def __init__(self, parts: Iterable[Component], dtype: torch.dtype, float32: Mapping[str, Iterable[str]]) -> None:
        """`float32`: which of each component's modules stay so."""
        files = [[str(path.resolve()), *_look(path)] for part in parts for path in part.files]
        configs = [part.config for part in parts]
        kept = {name: sorted(modules) for name, modules in float32.items()}
        self._key = {"policy": POLICY_VERSION, "dtype": str(dtype), "float32": kept, "configs": configs, "files": files}
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:32]
        self._path = home / "wan-lite" / "fingerprints" / f"{name}.json"

    def recall(self) -> dict[str, Any] | None:
        """{} of components' digests and what else was noted, or None."""
        try:
            told: dict[str, Any] = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return None
        # The name is a digest of the key; the key itself stands within, for people and against a torn file.
        same = told.get("key") == json.loads(json.dumps(self._key))
        return told.get("found") if same else None

    def write(self, found: Mapping[str, Any]) -> None:
        """A cache that cannot be written costs only time."""
        try:
            write_atomic(self._path, json.dumps({"key": self._key, "found": found}).encode())
        except OSError:
            return


def _look(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]
