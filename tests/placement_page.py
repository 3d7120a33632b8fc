"""docs/placement.md, made anew from the planner and Wan 2.2 A14B's true shape; no weight exists for it.

python -m tests.placement_page > docs/placement.md
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import Refused
from common.log import human_bytes, human_seconds
from harvest.loading.folder import Component, Resolved
from harvest.loading.measure import TEXT_ENCODER, Needs, size_of
from harvest.placing.placement import place
from harvest.placing.places import CPU, Machine, Placement, Size, Wish
from harvest.teacher import Work

PAGE = Path("docs/placement.md")
GB = 1_000_000_000
WORK = Work(records=4, height=512, width=512)
TRANSFORMER = {
    "patch_size": [1, 2, 2], "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}  # fmt: skip
ENCODER = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
MACHINES = [(1, 16, 64), (1, 24, 96), (1, 48, 128), (1, 80, 128), (2, 24, 128), (4, 24, 128), (8, 80, 512),
            (0, 0, 64), (0, 0, 256)]  # fmt: skip
DISKS = {"HDD 0.15 GB/s": 0.15, "SATA 0.5 GB/s": 0.5, "NVMe 3 GB/s": 3.0}


WHAT = {
    "`replicate`": "every expert stays on each GPU, one worker a GPU; the encoder stays too, or comes for its turn",
    "`swap`": "one expert at a time on the GPU, the other waits in pinned host memory: one exchange a shard",
    "`balanced`": "each expert's blocks over all GPUs, one process (set `workers: 1`); one micro-batch a GPU under way",
    "`stream`": "blocks pass through a GPU that is smaller than an expert, the next one behind the one at work",
    "`gpu0`": "as `replicate`, on the first GPU alone",
    "`cpu`": "everything on the CPU",
    "a map": '`{"transformer": "cuda:0", "transformer_2": "cuda:1", "text_encoder": "cpu"}`, or a .json file of one',
}


def true_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensor -> shape of each network, from its own class on the meta device."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with init_empty_weights():
        encoder, expert = UMT5EncoderModel(UMT5Config(**ENCODER)), WanTransformer3DModel(**TRANSFORMER)
    models = {TEXT_ENCODER: encoder, "transformer": expert}
    shapes = {name: {key: tuple(t.shape) for key, t in model.state_dict().items()} for name, model in models.items()}
    return shapes | {"transformer_2": shapes["transformer"]}


def true_sizes(dtype: Any, shapes: dict[str, dict[str, tuple[int, ...]]]) -> list[Size]:
    from diffusers import WanTransformer3DModel
    from transformers import UMT5EncoderModel

    def class_of(name: str) -> Any:
        return UMT5EncoderModel if name == TEXT_ENCODER else WanTransformer3DModel

    return [size_of(_component(name), shapes[name], class_of(name), dtype) for name in shapes]


def _component(name: str) -> Component:
    library = "transformers" if name == TEXT_ENCODER else "diffusers"
    config = {} if name == TEXT_ENCODER else TRANSFORMER
    return Component(name=name, library=library, class_name="", folder=Path(), config=config, variant=None, files=())


def true_needs(dtype: Any, work: Work = WORK) -> Needs:
    from harvest.config import TeacherConfig
    from harvest.teachers.wan import needs_of

    vae = Component(name="vae", library="diffusers", class_name="", folder=Path(), variant=None, files=(),
                    config={"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16})  # fmt: skip
    scheduler = Component(name="scheduler", library="diffusers", class_name="", variant=None, files=(), config={},
                          folder=Path("configs/teachers/shapes/scheduler"))  # fmt: skip
    parts = {"transformer": _component("transformer"), "vae": vae, "scheduler": scheduler}
    resolved = Resolved(folder=Path(), pipeline="WanPipeline", scalars={}, components=parts)
    return needs_of(TeacherConfig(folder=Path()), resolved, work, dtype)


def page() -> Iterator[str]:
    import torch

    shapes = true_shapes()
    sizes, needs = true_sizes(torch.bfloat16, shapes), true_needs(torch.bfloat16)
    files = {
        "official, float32": {size.name: size.num_bytes for size in true_sizes(torch.float32, shapes)},
        "prepared, bfloat16": {size.name: size.num_bytes for size in sizes},
    }
    yield from _head(sizes, needs)
    yield "| machine | host memory | prepared | placement | text encoder | experts | on a GPU | in host memory | cost |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for num_gpus, gpu, host in MACHINES:
        machine = Machine(gpus={f"cuda:{n}": gpu * GB for n in range(num_gpus)}, host=host * GB)
        name = f"{num_gpus} x {gpu} GB" if num_gpus else "CPU"
        for is_prepared in (False, True):
            wish = Wish(work_bytes=needs.work_bytes, kept_bytes=needs.kept_bytes, text_bytes=needs.text_bytes,
                        prepared=is_prepared)  # fmt: skip
            yield f"| {name} | {host} GB | {'yes' if is_prepared else 'no'} | {_row(sizes, machine, wish)} |"
    yield ""
    yield from _seconds(files)
    yield from _tail()


def _row(sizes: list[Size], machine: Machine, wish: Wish) -> str:
    try:
        plan = place(sizes, machine, wish)
    except Refused as refused:
        return f"refused | | | | | {refused.mend} "
    on_gpu = max((peak for device, peak in plan.peaks.items() if device != CPU), default=0)
    return " | ".join([
        plan.strategy + (f", {plan.workers} workers" if plan.workers > 1 else ""),
        _where(plan, TEXT_ENCODER), _where(plan, "transformer"),
        human_bytes(on_gpu) if on_gpu else "", human_bytes(plan.peaks.get(CPU, 0)), plan.cost,
    ])  # fmt: skip


def _where(plan: Placement, name: str) -> str:
    at = plan.of(name)
    words = {"resident": "stays", "turns": "by turns", "stream": "block by block", "split": "split", "host": "CPU"}
    other = plan.of("transformer_2") if name == "transformer" else at
    how = words[at.how] if at.how == other.how else f"{words[at.how]}, {words[other.how]}"
    return how + (", mapped" if "mapped" in (at.kept, other.kept) else "")


def _head(sizes: list[Size], needs: Needs) -> list[str]:
    told = ", ".join(f"{size.name} {human_bytes(size.num_bytes)}" for size in sizes)
    return [
        "# Where a teacher's networks go",
        "",
        *_wrapped("""
            `python -m harvest plan CONFIG` prints this for your machine, from what is free on it now. This page is
            made by `python -m tests.placement_page` from the same planner; a test compares. It is arithmetic: no
            GPU was used."""),
        *_wrapped(f"""
            Wan 2.2 T2V A14B in bfloat16 (modules that stay float32 counted so): {told}. Beside the weights a
            forward of {WORK.records} records at {WORK.height}x{WORK.width}, cond and uncond in one batch, is given
            {human_bytes(needs.work_bytes)}, of which {human_bytes(needs.kept_bytes)} are the texts' keys and values,
            and each GPU 1.0 GB for its context. `memory_budget` is 0.9 of what is free;
            here all of a GPU is. GB are 10^9 bytes."""),
        "| placement | what it does |",
        "|---|---|",
        *(f"| {name} | {what} |" for name, what in WHAT.items()),
        "",
        *_wrapped("""
            `auto` takes the first of replicate, swap, balanced, stream that fits with the encoder on a GPU, then
            with it on the CPU; and `cpu` where there is no GPU. With `teacher.prepared`, what does not fit into
            host memory is mapped from the prepared file (`mapped`), and the disk is read again where memory is
            short. With source images the folder's VAE (float32) and the work on one tile of 512 are planned for too:
            it waits in host memory and comes while no expert works."""),
    ]


def _wrapped(paragraph: str) -> list[str]:
    return [*textwrap.wrap(" ".join(paragraph.split()), 118, break_on_hyphens=False), ""]


def _seconds(files: dict[str, dict[str, int]]) -> Iterator[str]:
    yield "Seconds until every byte was read once (bytes over the disk's rate; a page cache that holds them is faster):"
    yield ""
    yield f"| files | bytes | {' | '.join(DISKS)} |"
    yield "|---|---|---|---|---|"
    for name, sizes in files.items():
        whole = sum(sizes.values())
        for told, num_bytes in ((name, whole), (f"{name}: encoder and first expert", whole - sizes["transformer_2"])):
            times = " | ".join(human_seconds(num_bytes / (rate * GB)) for rate in DISKS.values())
            yield f"| {told} | {human_bytes(num_bytes)} | {times} |"
    yield ""


def _tail() -> list[str]:
    return (
        _wrapped("""
            Once these files were seen, the first forward waits for the encoder and the high-noise
            expert only: the other one comes behind it. An exchange costs the link's time: 28.6 GB at 25 GB/s are
            1.1 s.""")
        + _wrapped("""
            Presets: `configs/harvest/wan22_least_memory.yaml`, `wan22_balanced.yaml`, `wan22_fastest_start.yaml`,
            `wan22_many_gpus.yaml`; `wan22_fp16.yaml` computes in float16.""")[:-1]
    )


def text() -> str:
    return "\n".join(page()) + "\n"


if __name__ == "__main__":
    print(text(), end="")
