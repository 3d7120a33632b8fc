"""The recipe of configs/teachers/shapes: a small trained teacher in the true Wan 2.2 layout.

    python -m tests.shapes.make_teacher --out configs/teachers/shapes --minutes 242    # what the project ships
    python -m tests.shapes.make_teacher --out out/try --work out/try-work --minutes 3  # does the recipe run at all?

    draw -> VAE (flat, 2D) -> latents of 24,576 scenes -> text encoder + transformer (joint) -> two experts
         -> the VAE's decoder once more -> folder

The minutes are those of one core; they are shared out as in SHARES. Each stage leaves its file in --work and goes on
from it: run the same command again after a stop. `--stage` runs one stage alone; `assemble` may be run at any time
after the joint run has saved once, and then takes the joint run for an expert that does not exist yet.

Where fresh memory is slow, let the allocator keep what it has (encoding was 3 times faster):
    export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=8589934592
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.shapes.flat_vae import new_vae, restore
from tests.shapes.text import write_tokenizer
from tests.shapes.train_flow import SHIFT, train_expert, train_joint, trained
from tests.shapes.train_vae import encode_pool, train_decoder, train_vae, trained_vae

STAGES = ("vae", "encode", "joint", "high", "low", "decoder", "assemble")
SHARES = {"vae": 0.079, "joint": 0.144, "high": 0.265, "low": 0.388, "decoder": 0.124}
NUM_ENCODED = 24576
SERVED_BOUNDARY = 0.8
"""Below the one that the experts were trained at, 0.875: from the joint run the high-noise one knows what lies between,
and it draws shapes better there (0.93 of captions right instead of 0.91, all else equal; docs/log.md)."""


def run_stage(stage: str, work_dir: Path, out_dir: Path, minutes: float) -> None:
    if stage == "vae":
        train_vae(work_dir, minutes * SHARES["vae"])
    elif stage == "encode":
        if not (work_dir / "latents.safetensors").exists():
            encode_pool(work_dir, NUM_ENCODED)
    elif stage == "joint":
        train_joint(work_dir, minutes * SHARES["joint"])
    elif stage in ("high", "low"):
        train_expert(work_dir, stage, minutes * SHARES[stage])
    elif stage == "decoder":
        train_decoder(work_dir, minutes * SHARES[stage])
    else:
        assemble(work_dir, out_dir)


def assemble(work_dir: Path, out_dir: Path) -> None:
    """A folder that stock WanPipeline opens with variant="fp16"."""
    statistics = load_file(work_dir / "latents.safetensors")
    mean, std = ([round(v, 6) for v in statistics[key].tolist()] for key in ("mean", "std"))
    flat = trained_vae(work_dir).state_dict()
    joint = work_dir / "joint.safetensors"
    expert = {name: work_dir / f"{name}.safetensors" for name in ("high", "low")}
    high, low = (trained(path if path.exists() else joint, joint)[0] for path in expert.values())
    shutil.rmtree(out_dir, ignore_errors=True)
    write_tokenizer(out_dir / "tokenizer")
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(out_dir / "tokenizer"),
        text_encoder=trained(joint)[1].half(),
        vae=restore(flat, new_vae(mean=mean, std=std)).half(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
        ),
        transformer=high.half(),
        transformer_2=low.half(),
        boundary_ratio=SERVED_BOUNDARY,
    )
    pipeline.save_pretrained(out_dir, variant="fp16", safe_serialization=True)
    # As we wrote it, and under the name that every version of the library knows.
    write_tokenizer(out_dir / "tokenizer")
    index = json.loads((out_dir / "model_index.json").read_text(encoding="utf-8"))
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    (out_dir / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write (replaced)")
    parser.add_argument("--work", type=Path, default=Path("out/teacher"), help="where stages leave their files")
    parser.add_argument("--minutes", type=float, default=242, help="training time in all, on one core")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in [arguments.stage] if arguments.stage else STAGES:
        run_stage(stage, arguments.work, arguments.out, arguments.minutes)


if __name__ == "__main__":
    main()
