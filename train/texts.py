"""Pictures of any words, where a text encoder is at hand: the one place in train/ that imports transformers.

    pictures = draw_words(run_dir, ["a small red star ..."], teacher_dir, seed=0, steps=None)      [N, H, W, 3] bytes

The encoder must be the set's own: it is asked for the set's negative text first, and refused if it says another one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cleaning import clean_prompt
from common.errors import BadUsage, Refused
from common.record import Array, Contract
from common.schedule import seeded_noise
from common.seals import sound
from common.shards import ASSETS
from common.tensor_file import weight_files
from train.dist import HOST
from train.sample import drawn_from, open_run, padded, pictures
from train.vae.network import load_vae

MOST_OFF = 0.02
"""Of the negative text's size: what storage and another compute dtype may change."""


@torch.inference_mode()
def draw_words(run_dir: Path, prompts: Sequence[str], encoder_dir: Path, *, seed: int, steps: int | None,
               device: torch.device = HOST, guidance: float | None = None,
               size: tuple[int, int] | None = None) -> np.ndarray:  # fmt: skip
    """`size` (height, width): None takes the set's first. The encoder computes on the CPU."""
    run = open_run(run_dir, device)
    contract, first = run.shards.contract, run.shards.manifest().receipts[0]
    height, width = size or (first.height, first.width)
    texts = encode(encoder_dir, [contract.negative_prompt, *map(clean_prompt, prompts)], contract)
    _require_same(texts[0], np.load(sound(run.shards.path / ASSETS, "negative.npy"), allow_pickle=False), encoder_dir)
    stride = contract.latent_stride
    shape = (contract.latent_channels, height // stride, width // stride)
    noise = np.stack([seeded_noise(seed + number, shape) for number in range(len(prompts))])
    rows, lengths = padded([text[: run.student.config.text_max_length] for text in texts[1:]])
    answer, state = run.answer(guidance), torch.from_numpy(noise).to(device)
    latents = drawn_from(answer, state, rows.to(device), lengths.to(device), run.objective.grid(steps))
    return pictures(load_vae(sound(run.shards.path / ASSETS, "vae")).to(device).decode(latents.to(device)))


@torch.inference_mode()
def encode(folder: Path, prompts: Sequence[str], contract: Contract) -> list[Array]:
    """Each prompt's rows [L, D] in the set's storage dtype, each computed alone, as the harvest does."""
    if contract.text_padding != "zeros":
        raise Refused(wrong="--text-encoder knows Wan's encoder only", found=f"a set of {contract.teacher}",
                      mend="draw prompts that the set holds")  # fmt: skip
    tokenizer, encoder = _open(folder)
    texts = []
    for prompt in prompts:
        tokens = tokenizer([prompt], max_length=contract.text_length, truncation=True, return_tensors="pt")
        rows = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
        texts.append(rows.float().numpy().astype(contract.storage_dtype))
    return texts


def _open(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, UMT5EncoderModel

    part = folder / "text_encoder"
    variant = None if weight_files(part, None) else "fp16"
    if not weight_files(part, variant):
        raise BadUsage(wrong="--text-encoder has no text encoder", found=f"no safetensors in {part}",
                       mend="give the teacher's folder")  # fmt: skip
    encoder = UMT5EncoderModel.from_pretrained(part, variant=variant, dtype=torch.float32, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), encoder.eval()


def _require_same(mine: Array, theirs: Array, folder: Path) -> None:
    """A wrong encoder, or one whose embeddings did not load, draws nonsense in silence."""
    off = np.inf
    if mine.shape == theirs.shape:
        off = np.abs(mine.astype(np.float32) - theirs).max() / max(float(np.abs(theirs).max()), 1e-6)
    if not off <= MOST_OFF:
        raise Refused(
            wrong="--text-encoder is not the one that the set was harvested with",
            found=f"{folder} says something else of the set's negative prompt (off by {off:.2g} of its size)",
            mend="give the teacher's own folder",
        )
