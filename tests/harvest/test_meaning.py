"""What the records mean is what the folder and stock pipelines say: nothing is guessed, dropped or read otherwise."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common.cleaning import clean_prompt
from common.errors import BadUsage, Refused
from common.record import Contract
from common.shards import ShardSet
from harvest.config import HarvestConfig, ImagesConfig
from harvest.granary.verify import verify
from harvest.loading.folder import resolve
from harvest.teachers import facts_of
from tests.harvest.test_arrivals import prints
from tests.harvest.test_images import P3
from tests.made import harvest_config, harvest_here
from tests.micro import write_micro_wan

NEGATIVE = "过曝，静态，低质量 &amp; bad  hands"


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def test_the_negative_prompt_is_cleaned_as_stock_wan_does(tmp_path: Path, micro_wan: Path) -> None:
    """Wan's own negative is full of fullwidth commas, which cleaning turns into plain ones."""
    from diffusers import WanPipeline

    assert clean_prompt(NEGATIVE) != NEGATIVE
    config = harvest_config(tmp_path / "set", micro_wan, negative_prompt=NEGATIVE, prompts={"limit": 1},
                            encoding="float32", teacher={"collapsed_padding": False})  # fmt: skip
    rows = np.load(harvest_here(config) / "assets" / "negative.npy", allow_pickle=False)
    pipeline = WanPipeline.from_pretrained(micro_wan, torch_dtype=torch.float32)
    with torch.inference_mode():
        _, stock = pipeline.encode_prompt("a cat", NEGATIVE, max_sequence_length=512)
    stock_rows = stock[0][stock[0].abs().sum(dim=1) > 0].numpy()
    assert rows.shape == stock_rows.shape
    np.testing.assert_allclose(rows, stock_rows, atol=1e-5)


def test_two_experts_without_a_boundary_are_refused(tmp_path: Path) -> None:
    """Else the high-noise one walks everything, and nobody hears of it."""
    folder = write_micro_wan(tmp_path / "wan")
    assert facts_of(resolve(folder, "auto")).boundary == 0.875
    edit(folder / "model_index.json", boundary_ratio=None)
    with pytest.raises(Refused, match="no boundary_ratio"):
        facts_of(resolve(folder, "auto"))
    one = write_micro_wan(tmp_path / "one", experts=1)
    assert facts_of(resolve(one, "auto")).boundary is None


@pytest.mark.parametrize(
    ("keep", "keep_at", "mend"), [(1, None, "keep: 2"), (2, [0, 1], "keep: 3"), (1, [5], "keep: 2")]
)
def test_keeping_nothing_of_an_expert_is_refused_before_it_begins(
    tmp_path: Path, micro_wan: Path, keep: int, keep_at: list[int] | None, mend: str
) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, steps=6, keep=keep, keep_at=keep_at, prompts={"limit": 1})
    with pytest.raises(BadUsage, match=f"-noise expert would be kept.*{mend}"):
        harvest_here(config)
    assert not (config.out / "contract.json").exists()


def test_what_lies_about_in_a_tokenizers_folder_is_not_the_tokenizer(tmp_path: Path, micro_wan: Path) -> None:
    folder = shutil.copytree(micro_wan, tmp_path / "wan")
    before, _ = prints(folder, tmp_path)
    for name in (".DS_Store", ".nfs0001", "README.md"):
        (folder / "tokenizer" / name).write_text("x")
    assert prints(folder, tmp_path)[0] == before
    (folder / "tokenizer" / "added_tokens.json").write_text("{}")
    assert prints(folder, tmp_path)[0].tokenizer != before.tokenizer


def test_the_hubs_cache_gives_what_its_main_branch_is_at(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--Somebody--Wan-Diffusers"
    for number, name in enumerate(("aaaa", "bbbb")):
        shutil.copytree(micro_wan, cache / "snapshots" / name)
        os.utime(cache / "snapshots" / name / "model_index.json", (number, number))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    source = Path("Somebody/Wan-Diffusers")
    assert resolve(source, "auto").folder.name == "bbbb"
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaaa\n")
    assert resolve(source, "auto").folder.name == "aaaa"


class TestTheVaeOfPictures:
    """States and end points come from it: another one means something else."""

    @pytest.fixture
    def config(self, tmp_path: Path, micro_wan: Path) -> HarvestConfig:
        folder, pictures = shutil.copytree(micro_wan, tmp_path / "wan"), tmp_path / "pictures"
        pictures.mkdir()
        self.add(pictures, 2)
        return harvest_config(tmp_path / "set", folder, source="images", prompts=None, records_per_shard=2,
                              images=ImagesConfig(path=pictures), steps=6, keep=3)  # fmt: skip

    @staticmethod
    def add(pictures: Path, count: int) -> None:
        for number in range(len(list(pictures.glob("*.png"))), count):
            pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(pictures / f"{number}.png")
            (pictures / f"{number}.txt").write_text(f"a cat {number}")

    @staticmethod
    def disturb(folder: Path) -> None:
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        name = min(name for name in tensors if tensors[name].ndim > 3)
        save_file(tensors | {name: tensors[name] + 0.1}, path, metadata={"format": "pt"})

    def test_another_one_is_refused(self, config: HarvestConfig) -> None:
        assert config.images is not None
        contract = ShardSet.open(harvest_here(config)).contract
        assert len(contract.vae) == 64
        self.add(config.images.path, 4)
        self.disturb(config.teacher.folder)
        with pytest.raises(Refused, match=f"vae: '{contract.vae}'"):
            harvest_here(config)

    def test_a_set_that_does_not_say_goes_on(self, config: HarvestConfig) -> None:
        assert config.images is not None
        contract = ShardSet.open(harvest_here(config)).contract
        shutil.rmtree(config.out)
        older = dataclasses.replace(contract, vae="")
        assert "vae" not in json.loads(older.to_json()) and Contract.from_json(older.to_json()) == older
        ShardSet.create(config.out, older)
        assert ShardSet.open(harvest_here(config)).manifest().num_records == 2
        assert list(verify(ShardSet.open(config.out))) == []

    @pytest.mark.parametrize("is_older", [False, True])
    def test_a_set_that_was_begun_without_profiles_goes_on_without(self, config: HarvestConfig, is_older: bool) -> None:
        assert config.images is not None
        plain = ShardSet.open(harvest_here(config))
        before = plain.read(plain.manifest().receipts[0]).record(0).final
        shutil.rmtree(config.out)
        if is_older:
            ShardSet.create(config.out, dataclasses.replace(plain.contract, vae=""))
        for path in config.images.path.glob("*.png"):
            Image.open(path).save(path, icc_profile=P3)
        shards = ShardSet.open(harvest_here(config))
        after = shards.read(shards.manifest().receipts[0]).record(0).final
        assert np.array_equal(before, after) == is_older

    def test_a_set_of_walks_says_none(self, tmp_path: Path, micro_set: Path) -> None:
        assert "vae" not in json.loads((micro_set / "contract.json").read_bytes())


class TestStableDiffusion:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        from tests.micro_sd import write_micro_sd

        return write_micro_sd(tmp_path / "sd")

    def test_an_old_vae_folder_has_the_old_scale(self, folder: Path) -> None:
        edit(folder / "vae" / "config.json", scaling_factor=...)
        assert facts_of(resolve(folder, "auto")).latent_std[0] == 1 / 0.18215

    @pytest.mark.parametrize("odd", [{"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 0.2]},
                                     {"beta_schedule": "squaredcos_cap_v2"}])  # fmt: skip
    def test_noise_levels_that_are_not_known_are_refused(self, folder: Path, odd: dict[str, Any]) -> None:
        edit(folder / "scheduler" / "scheduler_config.json", **odd)
        with pytest.raises(Refused, match=next(iter(odd))):
            facts_of(resolve(folder, "auto"))

    def test_a_walk_begins_at_the_seeds_noise_and_says_so(self, tmp_path: Path, folder: Path) -> None:
        config = harvest_config(tmp_path / "set", folder, prompts={"limit": 2}, guidance=(5.0,), steps=4, keep=4)
        assert ShardSet.open(harvest_here(config)).contract.noise.startswith("vp1 scaled_linear ")
