"""What is stored is what a stock diffusers transformer says at the stored state, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.schedule import euler_grid, seeded_noise
from common.shards import ShardSet
from tests.made import harvest_config, harvest_here

MICRO_BATCH = 4
EXACT = {"batched_guidance": False, "collapsed_padding": False}


@pytest.fixture(scope="module")
def exact_set(tmp_path_factory: pytest.TempPathFactory, micro_wan: Path) -> ShardSet:
    """Every step kept in float32, branches apart, so that each stored micro-batch can be asked again whole."""
    out = tmp_path_factory.mktemp("exact") / "set"
    config = harvest_config(out, micro_wan, latent_dtype="float32", encoding="float32", keep=6, micro_batch=MICRO_BATCH,
                            records_per_shard=8, teacher=EXACT)  # fmt: skip
    return ShardSet.open(harvest_here(config))


def padded(rows: list[np.ndarray], length: int = 512) -> torch.Tensor:
    out = torch.zeros(len(rows), length, rows[0].shape[1])
    for i, text in enumerate(rows):
        out[i, : len(text)] = torch.from_numpy(text)
    return out


def test_stored_predictions_are_the_stock_transformers_bitwise(exact_set: ShardSet, micro_wan: Path) -> None:
    from diffusers import WanTransformer3DModel

    experts = [
        WanTransformer3DModel.from_pretrained(micro_wan / name).eval() for name in ("transformer", "transformer_2")
    ]
    negative = np.load(exact_set.path / "assets" / "negative.npy", allow_pickle=False)
    asked = [0, 0]
    for receipt in exact_set.manifest().receipts[:2]:
        records = [exact_set.read(receipt).record(i) for i in range(receipt.num_records)]
        for start in range(0, len(records), MICRO_BATCH):
            group = records[start : start + MICRO_BATCH]
            for point in range(receipt.num_points):
                t = torch.tensor([record.timesteps[point] for record in group])
                which = 0 if bool((t >= 875).all()) else 1
                assert all(record.expert[point] == which for record in group)
                asked[which] += 1
                video = torch.from_numpy(np.stack([record.latents[point] for record in group])).unsqueeze(2)
                for texts, field in (([record.text for record in group], "cond"), ([negative] * len(group), "uncond")):
                    with torch.inference_mode():
                        said = experts[which](video, t, padded(texts), return_dict=False)[0].squeeze(2).numpy()
                    stored = np.stack([getattr(record, field)[point] for record in group])
                    np.testing.assert_array_equal(said, stored)
    assert min(asked) > 0


def test_the_path_from_noise_to_final_is_the_eulers(exact_set: ShardSet) -> None:
    contract = exact_set.contract
    record = exact_set.read(exact_set.manifest().receipts[0]).record(0)
    state = seeded_noise(record.seed, record.final.shape)
    grid = euler_grid(contract.steps, contract.shift, boundary=contract.boundary, jitter_seed=int(record.key, 16))
    np.testing.assert_array_equal(grid.sigmas[:-1], record.sigmas)
    for point in range(contract.steps):
        np.testing.assert_array_equal(state, record.latents[point])
        w = np.float32(contract.guidance[record.expert[point]])
        guided = record.uncond[point] + w * (record.cond[point] - record.uncond[point])
        state = state + (grid.sigmas[point + 1] - grid.sigmas[point]) * guided
    np.testing.assert_allclose(state, record.final, atol=1e-5)


def test_keeping_fewer_steps_never_changes_the_path(exact_set: ShardSet, micro_wan: Path, tmp_path: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, latent_dtype="float32", encoding="float32", keep=2,
                            micro_batch=MICRO_BATCH, records_per_shard=8, teacher=EXACT,
                            prompts={"limit": 4})  # fmt: skip
    sparse = ShardSet.open(harvest_here(config))
    (receipt,) = sparse.manifest().receipts
    dense = exact_set.read(exact_set.manifest().by_item[receipt.item])
    for i in range(receipt.num_records):
        few, all_of_them = sparse.read(receipt).record(i), dense.record(i)
        np.testing.assert_array_equal(few.final, all_of_them.final)
        at = [int(np.flatnonzero(all_of_them.sigmas == sigma)[0]) for sigma in few.sigmas]
        np.testing.assert_array_equal(few.cond, all_of_them.cond[at])


def test_half_storage_is_the_same_path_rounded(micro_set: Path) -> None:
    """With latent_dtype float16 the teacher saw the rounded state, so that the stored one is exactly what it saw."""
    shards = ShardSet.open(micro_set)
    record = shards.read(shards.manifest().receipts[0]).record(0)
    assert record.latents.dtype == record.cond.dtype == np.float16 and record.timesteps.dtype == np.float32
    noise = seeded_noise(record.seed, record.final.shape)
    np.testing.assert_array_equal(record.latents[0], noise.astype(np.float16))


def asked_again(shards: ShardSet, ask) -> int:  # type: ignore[no-untyped-def]
    """Every stored prediction against what `ask(latents, timesteps, texts)` says of the same micro-batch."""
    negative = np.load(shards.path / "assets" / "negative.npy", allow_pickle=False)
    num_asked = 0
    for receipt in shards.manifest().receipts:
        records = [shards.read(receipt).record(i) for i in range(receipt.num_records)]
        for start in range(0, len(records), MICRO_BATCH):
            group = records[start : start + MICRO_BATCH]
            for point in range(receipt.num_points):
                t = torch.tensor([record.timesteps[point] for record in group])
                latents = torch.from_numpy(np.stack([record.latents[point] for record in group]))
                for texts, field in (([record.text for record in group], "cond"), ([negative] * len(group), "uncond")):
                    with torch.inference_mode():
                        said = ask(latents, t, texts).numpy()
                    np.testing.assert_array_equal(said, np.stack([getattr(record, field)[point] for record in group]))
                    num_asked += 1
    return num_asked


def exactly(out: Path, teacher: Path) -> ShardSet:
    config = harvest_config(out, teacher, latent_dtype="float32", encoding="float32", keep=6, micro_batch=MICRO_BATCH,
                            records_per_shard=8, teacher=EXACT,
                            prompts={"limit": 4})  # fmt: skip
    return ShardSet.open(harvest_here(config))


def test_a_teacher_with_a_timestep_per_token_passes_the_oracle(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    from tests.micro import write_micro_ti2v

    folder = write_micro_ti2v(tmp_path / "ti2v")
    shards = exactly(tmp_path / "set", folder)
    assert (shards.contract.latent_channels, shards.contract.latent_stride, shards.contract.boundary) == (48, 16, None)
    model = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()

    def ask(latents: torch.Tensor, t: torch.Tensor, texts: list[np.ndarray]) -> torch.Tensor:
        tokens = t[:, None].expand(-1, latents.shape[2] * latents.shape[3] // 4)
        out: torch.Tensor = model(latents.unsqueeze(2), tokens, padded(texts), return_dict=False)[0].squeeze(2)
        return out

    assert asked_again(shards, ask) == 2 * 2 * 6


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_stable_diffusion_passes_the_same_oracle(tmp_path: Path, kind: str) -> None:
    """And its path is DDIM's: the stock pipeline draws the same latents from the same noise."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from tests.micro_sd import write_micro_sd

    folder = write_micro_sd(tmp_path / "sd", prediction_type=kind)  # type: ignore[arg-type]
    config = harvest_config(tmp_path / "set", folder, latent_dtype="float32", encoding="float32", keep=5, steps=5,
                            jitter=False, micro_batch=MICRO_BATCH, records_per_shard=8, prompts={"limit": 4},
                            guidance=(5.0,), teacher=EXACT)  # fmt: skip
    shards = ShardSet.open(harvest_here(config))
    assert shards.contract.prediction == {"v_prediction": "v", "epsilon": "epsilon"}[kind]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def ask(latents: torch.Tensor, t: torch.Tensor, texts: list[np.ndarray]) -> torch.Tensor:
        embeds = torch.from_numpy(np.stack(texts))
        out: torch.Tensor = pipeline.unet(latents, t, encoder_hidden_states=embeds, return_dict=False)[0]
        return out

    assert asked_again(shards, ask) == 2 * 2 * 5
    ours = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipeline.scheduler = DDIMScheduler.from_config(dict(pipeline.scheduler.config) | ours)
    records = [shards.read(shards.manifest().receipts[0]).record(i) for i in range(MICRO_BATCH)]
    noise = torch.from_numpy(np.stack([seeded_noise(record.seed, record.final.shape) for record in records]))
    settings = {"height": 64, "width": 64, "num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
    prompts = [record.prompt for record in records]
    drawn = pipeline(prompt=prompts, negative_prompt=[""] * MICRO_BATCH, latents=noise, **settings).images
    final = torch.from_numpy(np.stack([record.final for record in records]))
    torch.testing.assert_close(drawn, final, rtol=1e-3, atol=1e-3)
