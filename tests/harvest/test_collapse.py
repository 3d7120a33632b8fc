"""Collapsed padding and kept keys: the same sum, fewer operations."""

from pathlib import Path

import pytest
import torch

from common.log import Log
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.loading.folder import resolve
from harvest.teacher import Teacher
from harvest.teachers import load_teacher
from harvest.teachers.wan import keys_of
from harvest.teachers.wan_attention import padding_bias

PROMPTS = ["a red cat", "a", "the large dog in the sea and a small house on the sky with a tree and a star", ""]


def loaded(folder: Path, run_dir: Path, **switches: bool) -> Teacher:
    config = TeacherConfig(folder=folder, dtype="float32", device="cpu", threads=1, **switches)  # type: ignore[arg-type]
    log = Log("test", quiet=True)
    with Watch(run_dir, log) as watch:
        return load_teacher(config, resolve(folder, "auto"), watch, log)


def said(teacher: Teacher, prompts: list[str], t: float, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    latents = torch.randn(len(prompts), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    condition = teacher.condition(teacher.encode(prompts), teacher.encode([""])[0])
    first = teacher.predict(latents, torch.full((len(prompts),), t), condition)
    again = teacher.predict(latents, torch.full((len(prompts),), t), condition)  # from the kept keys
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return first


@pytest.fixture(scope="module")
def plain(micro_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return loaded(micro_wan, tmp_path_factory.mktemp("run"), batched_guidance=False, collapsed_padding=False)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("t", [990.0, 300.0])
def test_collapsed_padding_gives_the_same_sum(
    micro_wan: Path, tmp_path: Path, plain: Teacher, batched: bool, t: float
) -> None:
    teacher = loaded(micro_wan, tmp_path, batched_guidance=batched, collapsed_padding=True)
    for seed, prompts in enumerate([PROMPTS, PROMPTS[::-1], PROMPTS[:1]]):  # other texts: nothing kept serves them
        for mine, theirs in zip(said(teacher, prompts, t, seed=seed), said(plain, prompts, t, seed=seed), strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 5e-6


def test_text_moves_the_prediction(plain: Teacher) -> None:
    cond, uncond = said(plain, PROMPTS, 990.0)
    assert float((cond[0] - uncond[0]).norm() / uncond[0].norm()) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[3, 60], [510, 511], [512, 1], [1]])
def test_two_keys_weigh_as_much_as_all_padding(lengths: list[int], dtype: torch.dtype) -> None:
    rows = max(lengths) + 2
    bias = padding_bias(lengths, rows, 512)[:, 0, 0].to(dtype).double()
    for row, length in zip(bias, lengths, strict=True):
        assert (row[:length] == 0).all()
        weight = float(row[length:].exp().sum())
        assert weight == pytest.approx(512 - length, rel=1e-4 if dtype == torch.bfloat16 else 1e-6, abs=1e-9)


def test_a_harvest_says_how_it_was_computed(micro_set: Path) -> None:
    from common.shards import ShardSet

    (numerics,) = {receipt.numerics for receipt in ShardSet.open(micro_set).manifest().receipts}
    assert numerics.collapsed_padding and numerics.batched_guidance and numerics.threads == 1


def test_keys_come_in_the_multiples_that_kernels_want() -> None:
    for longest in (1, 6, 7, 62, 63, 500, 511, 512):
        plain, gpu, compiled = (
            keys_of(longest, 512, device, compiled=is_compiled)
            for device, is_compiled in (("cpu", False), ("cuda:0", False), ("cpu", True))
        )
        assert plain == longest + 2 and gpu % 8 == 0 and plain <= gpu < plain + 8
        assert compiled == plain if plain > 512 else compiled % 64 == 0 and plain <= compiled <= 512
        for rows in (gpu, compiled):
            bias = padding_bias([longest], rows, 512)[0, 0, 0].double()
            assert torch.isclose(bias.exp().sum(), torch.tensor(512.0, dtype=torch.float64), rtol=1e-5)
