"""Loading a transformer of half a billion parameters: ours, unprepared and prepared, against the library and the disk.

    python -m tests.bench loading [--rounds 5] [--layers 12]

Each loader runs in a process of its own, in turn, round after round; the time ends when every page of the result was
touched. Ratios are of the same round; the page cache is warm for all of them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIG = {
    "patch_size": [1, 2, 2], "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}  # fmt: skip
CHILD = """
import json, sys, time
from pathlib import Path
import torch
kind, folder, prepared = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(2)
import accelerate  # no loader's time is an import's
from diffusers import WanTransformer3DModel
from harvest.loading.folder import Component
from harvest.loading.weights import load_model
from common.tensor_file import weight_files
config = json.loads((folder / "config.json").read_text())
part = Component(name="transformer", library="diffusers", class_name="WanTransformer3DModel", folder=folder,
                 config=config, variant=None, files=weight_files(folder, None))
def peak():  # of this process alone: ru_maxrss begins at the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
began = time.perf_counter()
if kind == "raw read":
    buffer = bytearray(8 << 20)
    with open(prepared / "model.safetensors", "rb") as file:
        while file.readinto(buffer):
            pass
    size = 0
else:
    if kind == "from_pretrained":
        model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    elif kind == "from_pretrained, bf16 files":
        model = WanTransformer3DModel.from_pretrained(prepared, torch_dtype=torch.bfloat16)
    elif kind == "ours, unprepared":
        model = load_model(part, torch.bfloat16)
    else:
        from dataclasses import replace
        from harvest.loading.folder import Resolved
        from harvest.loading.prepare import from_prepared
        whole = Resolved(folder=folder.parent, pipeline="", scalars={}, components={"transformer": part})
        part = from_prepared(whole, prepared.parent).components["transformer"]
        if kind == "ours, prepared":  # files that were looked at before (harvest/loading/parts.py)
            part = replace(part, crcs={})
        model = load_model(part, torch.bfloat16)
    total = sum(float(tensor.view(-1)[::1024].float().sum()) for tensor in model.state_dict().values())
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
spent = time.perf_counter() - began
print(json.dumps({"seconds": spent, "peak": peak() - before, "bytes": size}))
"""
KINDS = (
    "raw read",
    "ours, prepared",
    "ours, prepared, for the first time",
    "from_pretrained, bf16 files",
    "ours, unprepared",
    "from_pretrained",
)


def write_checkpoint(folder: Path, layers: int) -> None:
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG, num_layers=layers)
    model.save_pretrained(folder, max_shard_size="100GB")


def run(*, rounds: int = 5, layers: int = 12) -> list[str]:
    from common.log import Log
    from harvest.loading.folder import Component, Resolved
    from harvest.loading.prepare import prepare

    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "transformer", Path(place) / "prepared"
        write_checkpoint(folder, layers)
        _prepare(folder, out, prepare, Component, Resolved, Log)
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                found[kind].append(_measured(kind, folder, out / "transformer"))
    return _table(found)


def _prepare(folder: Path, out: Path, prepare: Any, component: Any, resolved: Any, log: Any) -> None:
    import shutil

    import torch

    from common.tensor_file import weight_files

    config = json.loads((folder / "config.json").read_text())
    part = component(name="transformer", library="diffusers", class_name="WanTransformer3DModel", folder=folder,
                     config=config, variant=None, files=weight_files(folder, None))  # fmt: skip
    whole = resolved(folder=folder.parent, pipeline="WanPipeline", scalars={}, components={"transformer": part})
    prepare(whole, out, torch.bfloat16, log("bench", quiet=True))
    # The library reads the same bytes under its own names.
    shutil.copy(folder / "config.json", out / "transformer" / "config.json")
    target = out / "transformer" / "diffusion_pytorch_model.safetensors"
    target.hardlink_to(out / "transformer" / "model.safetensors")


def _measured(kind: str, folder: Path, prepared: Path) -> dict[str, float]:
    words = [sys.executable, "-c", CHILD, kind, str(folder), str(prepared)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def _table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    def median(kind: str, name: str) -> float:
        return statistics.median(run[name] for run in found[kind])

    def ratio(kind: str, other: str) -> float:
        pairs = zip(found[kind], found[other], strict=True)
        return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)

    weights = median("ours, prepared", "bytes")
    lines = [
        f"{weights / 1e9:.2f} GB of weights in mixed bfloat16/float32",
        "| loader | seconds | peak / weights |",
        "|---|---|---|",
    ]
    lines += [f"| {kind} | {median(kind, 'seconds'):.2f} | {median(kind, 'peak') / weights:.2f} |" for kind in KINDS]
    lines.append(f"prepared / raw read: {ratio('ours, prepared', 'raw read'):.2f} (goal <= 1.5)")
    lines.append(f"from_pretrained / prepared: {ratio('from_pretrained', 'ours, prepared'):.1f} (goal >= 20)")
    lines.append(f"from_pretrained / unprepared: {ratio('from_pretrained', 'ours, unprepared'):.2f} (goal >= 1.6)")
    lines.append(f"peak of unprepared / weights: {median('ours, unprepared', 'peak') / weights:.2f} (goal <= 1.15)")
    return lines
