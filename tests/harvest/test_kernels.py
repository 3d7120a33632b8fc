"""How forwards are computed: attention kernels that are asked for, blocks that are compiled, and what receipts say."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common.errors import Refused
from common.manifest import Receipt
from common.record import Numerics
from common.shards import ShardSet
from common.watch import Watch
from harvest.activations import Listener
from harvest.config import TeacherConfig
from harvest.loading import reading
from harvest.loading.folder import resolve
from harvest.loading.kernels import Ask, choose_kernels, require_compilable
from harvest.meaning import make_numerics, say_numerics
from harvest.placing.places import Place, Placement
from harvest.teacher import Work
from harvest.teachers import load_teacher
from tests.harvest.test_arrivals import Heard
from tests.harvest.test_placement import loaded, predicted
from tests.made import harvest_config
from tests.micro_sd import write_micro_sd

WORK = Work(records=2, height=64, width=64)
MOST_APART = 5e-6
"""Relative L2 of float32 predictions: fused sums are added up in another order."""


def kernels_of(**teacher: Any) -> Any:
    config = TeacherConfig(folder=Path(), **teacher)
    ask = Ask(rows=2, queries=16, keys=16, heads=4, dim=12)
    return choose_kernels(config, "cpu", torch.float32, [ask, dataclasses.replace(ask, biased=True)])


def test_kernels_that_are_asked_for_are_those_that_compute(micro_wan: Path, tmp_path: Path) -> None:
    """Each says other last bits; what torch chooses by itself is said, and is what it says when asked for."""
    told = {name: loaded(micro_wan, tmp_path, WORK, attention=name) for name in ("auto", "math", "flash")}
    answers = {name: torch.cat(predicted(teacher)) for name, teacher in told.items()}
    assert told["math"].sdpa == "math" and told["auto"].sdpa == "flash"
    assert torch.equal(answers["auto"], answers["flash"]) and not torch.equal(answers["math"], answers["flash"])
    assert float((answers["math"] - answers["flash"]).norm() / answers["flash"].norm()) < MOST_APART
    query = torch.randn(1, 2, 8, 4)
    F.scaled_dot_product_attention(query, query, query)
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()  # nothing stays switched


def test_kernels_that_this_device_lacks_are_refused_before_a_weight_is_read(
    micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match=r"cudnn cannot compute.*on cpu.*auto or one of math, flash$"):
        kernels_of(attention="cudnn")
    monkeypatch.setattr(reading, "read_tensor", lambda *_: pytest.fail("a weight is read"))
    with pytest.raises(Refused, match="efficient cannot compute"):
        loaded(micro_wan, tmp_path, WORK, attention="efficient")


def test_the_unets_attention_is_asked_about_too(tmp_path: Path) -> None:
    folder = write_micro_sd(tmp_path / "sd")
    assert (
        loaded(folder, tmp_path, WORK).sdpa == "flash"
        and loaded(folder, tmp_path, WORK, attention="math").sdpa == "math"
    )


def test_a_moved_block_is_not_compiled() -> None:
    place = Place(name="transformer", num_bytes=1, how="stream", device="cuda:0")
    plan = Placement(strategy="stream", workers=1, device="cuda:0", places=(place,), peaks={}, budgets={})
    with pytest.raises(Refused, match="transformer: stream"):
        require_compilable(TeacherConfig(folder=Path(), compile=True), plan)
    require_compilable(TeacherConfig(folder=Path()), plan)
    require_compilable(
        TeacherConfig(folder=Path(), compile=True),
        dataclasses.replace(plan, places=(dataclasses.replace(place, how="turns"),)),
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler on the CPU")
def test_compiled_blocks_say_the_same_listened_to_or_not(micro_wan: Path, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain = loaded(micro_wan, tmp_path, WORK)
    expected = predicted(plain)
    log = Heard()
    with Watch(tmp_path / "run", log) as watch:
        config = TeacherConfig(folder=micro_wan, dtype="float32", device="cpu", compile=True)
        teacher = load_teacher(config, resolve(micro_wan, "auto"), watch, log, WORK)
    assert any("compiled and warmed up in" in line for line in log.lines)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled == 2  # before and after the text is attended to: one code for every block of both experts
    answers = predicted(teacher)
    assert counters["stats"]["unique_graphs"] == compiled  # the warm-up met what is asked for
    for mine, other in zip(answers, expected, strict=True):
        assert 0 < float((mine - other).norm() / other.norm()) < MOST_APART
    teacher.listener = listener = Listener()
    for mine, other in zip(predicted(teacher), answers, strict=True):
        assert torch.equal(mine, other)
    assert not any(module._forward_hooks for module in teacher._networks.model("transformer").modules())  # type: ignore[attr-defined]
    teacher.listener, plain.listener = None, (reference := Listener())
    predicted(plain)
    assert listener.means().keys() == reference.means().keys()
    assert {"transformer.blocks.1.ffn", "transformer_2.blocks.0.attn2"} <= listener.means().keys()
    for name, mean in listener.means().items():
        torch.testing.assert_close(mean, reference.means()[name], rtol=1e-3, atol=1e-3)


def test_a_compiler_that_is_not_there_is_said(micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(Refused, match=r"cannot be compiled here.*compile: false"):
        loaded(micro_wan, tmp_path, WORK, compile=True)


def test_receipts_of_before_mean_the_defaults(micro_set: Path) -> None:
    """And where one side does not say its kernels, no difference is known."""
    (numerics,) = {receipt.numerics for receipt in ShardSet.open(micro_set).manifest().receipts}
    assert (numerics.sdpa, numerics.encoder, numerics.compiled) == ("flash", "", False)
    old = {name: value for name, value in dataclasses.asdict(numerics).items()
           if name not in ("sdpa", "encoder", "compiled")}  # fmt: skip
    before = Numerics(**json.loads(json.dumps(old)))
    assert (
        before == dataclasses.replace(numerics, sdpa="")
        and before.difference(numerics) == numerics.difference(before) == []
    )
    other = dataclasses.replace(numerics, sdpa="math", encoder="cpu", compiled=True)
    assert numerics.difference(other) == ["sdpa: 'flash' | 'math'", "encoder: '' | 'cpu'", "compiled: False | True"]


def test_a_set_of_before_is_gone_on_with_in_silence(micro_set: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(shutil.copytree(micro_set, tmp_path / "set"))
    now = shards.manifest().receipts[0].numerics
    for path in (shards.path / "receipts").iterdir():
        receipt = Receipt.read(path)
        path.write_bytes(
            dataclasses.replace(receipt, numerics=dataclasses.replace(receipt.numerics, sdpa="")).to_json()
        )
    log = Heard()
    say_numerics(shards, now, log, strict=True)
    assert not log.lines
    with pytest.raises(Refused, match=r"compiled: True \| False"):
        say_numerics(shards, dataclasses.replace(now, compiled=True), log, strict=True)


def test_the_encoders_device_is_told_where_it_is_another(micro_wan: Path, tmp_path: Path) -> None:
    teacher, config = loaded(micro_wan, tmp_path, WORK), harvest_config(tmp_path / "set", micro_wan)
    assert make_numerics(config, teacher).encoder == ""
    teacher.encoder_device = "cuda:1"
    assert make_numerics(config, teacher).encoder == "cuda"


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_compiled_blocks_say_the_same(micro_wan: Path, tmp_path: Path) -> None:
    told = {"device": "cuda:0", "dtype": "float32", "placement": "gpu0"}
    expected = torch.cat(predicted(loaded(micro_wan, tmp_path, WORK, **told)))
    for changes in ({"attention": "math"}, {"attention": "efficient"}, {"compile": True}):
        answer = torch.cat(predicted(loaded(micro_wan, tmp_path, WORK, **told, **changes)))
        torch.testing.assert_close(answer, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(Refused, match="collapsed_padding: false"):
        loaded(micro_wan, tmp_path, WORK, **told, attention="flash")
