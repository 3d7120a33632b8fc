"""Where states come from: the folder's own scheduler walks as the stock pipeline does; renoised states are redrawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import Refused
from common.schedule import contract_grid, renoise_noise
from common.shards import ShardSet
from tests.harvest.test_oracle import EXACT, MICRO_BATCH, padded
from tests.made import harvest_config, harvest_here
from tests.micro import write_micro_wan

WHOLE: dict[str, Any] = {"latent_dtype": "float32", "encoding": "float32", "micro_batch": MICRO_BATCH,
                         "records_per_shard": 8, "teacher": EXACT, "prompts": {"limit": 4}}  # fmt: skip


def with_scheduler(folder: Path, class_name: str, **settings: Any) -> Path:
    import diffusers

    scheduler = getattr(diffusers, class_name)(**settings)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", class_name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


UNIPC = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [("UniPCMultistepScheduler", UNIPC), ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0})],
)
def test_the_folders_scheduler_draws_the_stock_pipelines_latents(
    tmp_path: Path, class_name: str, settings: dict[str, Any]
) -> None:
    """Two micro-batches go through the first expert before either goes through the second: each keeps its solver."""
    from diffusers import WanPipeline

    folder = with_scheduler(write_micro_wan(tmp_path / "wan"), class_name, **settings)
    config = harvest_config(tmp_path / "set", folder, **WHOLE, solver="checkpoint", jitter=False, steps=8, keep=8,
                            guidance=(4.0, 3.0))  # fmt: skip
    shards = ShardSet.open(harvest_here(config))
    (receipt,) = shards.manifest().receipts
    records = [shards.read(receipt).record(i) for i in range(receipt.num_records)]
    assert len(records) == 2 * MICRO_BATCH and {0, 1} == set(records[0].expert.tolist())
    np.testing.assert_array_equal(contract_grid(shards.contract, seed=0).sigmas[:-1], records[0].sigmas)
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    negative = np.load(shards.path / "assets" / "negative.npy", allow_pickle=False)
    for start in (0, MICRO_BATCH):
        group = records[start : start + MICRO_BATCH]
        drawn = pipeline(
            prompt_embeds=padded([record.text for record in group]),
            negative_prompt_embeds=padded([negative] * MICRO_BATCH),
            latents=torch.from_numpy(np.stack([record.latents[0] for record in group])).unsqueeze(2),
            height=64, width=64, num_frames=1, num_inference_steps=8, guidance_scale=4.0, guidance_scale_2=3.0,
            output_type="latent",
        ).frames  # fmt: skip
        np.testing.assert_array_equal(drawn.squeeze(2).numpy(), np.stack([record.final for record in group]))


def test_a_scheduler_that_is_not_known_is_refused_before_loading(tmp_path: Path) -> None:
    folder = with_scheduler(write_micro_wan(tmp_path / "wan"), "DPMSolverMultistepScheduler")
    config = harvest_config(tmp_path / "set", folder, solver="checkpoint", jitter=False)
    with pytest.raises(Refused, match=r"DPMSolverMultistepScheduler.*solver: euler"):
        harvest_here(config)


def test_a_scheduler_that_walks_another_grid_is_refused(tmp_path: Path) -> None:
    folder = with_scheduler(write_micro_wan(tmp_path / "wan"), "FlowMatchEulerDiscreteScheduler", shift_terminal=0.1)
    with pytest.raises(Refused, match="walks another grid"):
        harvest_here(harvest_config(tmp_path / "set", folder, **WHOLE, solver="checkpoint", jitter=False))


def test_renoised_states_are_the_end_point_under_fresh_noise(tmp_path: Path, micro_wan: Path) -> None:
    """Same paths as `trajectory`; each state is redrawn from its key, and each answer is the teacher's own there."""
    from diffusers import WanTransformer3DModel

    walked = ShardSet.open(harvest_here(harvest_config(tmp_path / "walked", micro_wan, **WHOLE)))
    asked = ShardSet.open(harvest_here(harvest_config(tmp_path / "asked", micro_wan, **WHOLE, source="renoise")))
    assert asked.contract.difference(walked.contract) == ["source: 'renoise' | 'trajectory'"]
    experts = [
        WanTransformer3DModel.from_pretrained(micro_wan / name).eval() for name in ("transformer", "transformer_2")
    ]
    seen: set[int] = set()
    for receipt in asked.manifest().receipts:
        for i in range(receipt.num_records):
            record, path = asked.read(receipt).record(i), walked.read(walked.manifest().by_item[receipt.item]).record(i)
            np.testing.assert_array_equal(record.final, path.final)
            np.testing.assert_array_equal(record.sigmas, path.sigmas)
            grid = contract_grid(asked.contract, int(record.key, 16))
            for point, sigma in enumerate(record.sigmas):
                step = int(np.flatnonzero(grid.sigmas == sigma)[0])
                noise = renoise_noise(record.key, step, record.final.shape)
                np.testing.assert_array_equal((1 - sigma) * record.final + sigma * noise, record.latents[point])
                with torch.inference_mode():
                    said = experts[record.expert[point]](
                        torch.from_numpy(record.latents[point])[None, :, None],
                        torch.tensor([record.timesteps[point]]), padded([record.text]), return_dict=False,
                    )[0]  # fmt: skip
                np.testing.assert_allclose(said[0, :, 0].numpy(), record.cond[point], atol=2e-5)
                seen.add(int(record.expert[point]))
    assert seen == {0, 1}


def test_segment_edges_are_kept_unless_told_otherwise(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, steps=12, keep=6, jitter=False, prompts={"limit": 4})
    shards = ShardSet.open(harvest_here(config))
    assert shards.contract.keep_at == (0, 3, 6, 9)
    grid = contract_grid(shards.contract, seed=0)
    for receipt in shards.manifest().receipts:
        for sigmas in shards.read(receipt).header.sigmas:
            assert set(grid.sigmas[[0, 3, 6, 9]]) <= set(sigmas)
    assert harvest_config(tmp_path / "few", micro_wan, keep=3).pinned_steps == (0,)
