"""What is frozen is what was named: a part of the student, and no other whose name begins alike."""

from typing import Any

import pytest

from common.config import check
from common.errors import BadUsage
from train.config import TrainConfig
from train.plan import trained
from train.start import _freeze
from train.student.network import StudentConfig, WanLite

DEEP = {"num_layers": 12, "num_heads": 2, "head_dim": 12, "in_channels": 4, "out_channels": 4, "patch": 2,
        "text_dim": 8, "ffn_dim": 32, "freq_dim": 16}  # fmt: skip


def config(*frozen: str) -> TrainConfig:
    values: dict[str, Any] = {"set": "s", "init": "i", "out": "o", "frozen": frozen}
    return check(TrainConfig, values, source="test")


@pytest.mark.parametrize(("named", "belongs"), [
    ("blocks.1", "blocks.1."),
    ("blocks.1.", "blocks.1."),
    ("blocks.11.attn2", "blocks.11.attn2."),
    ("blocks", "blocks."),
    ("scale_shift_table", "scale_shift_table"),
    ("blocks.0.ffn.net.2.bias", "blocks.0.ffn.net.2.bias"),
])  # fmt: skip
def test_the_named_part_alone_stays_and_is_planned_so(named: str, belongs: str) -> None:
    student = WanLite(StudentConfig(**DEEP))  # type: ignore[arg-type]
    shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    _freeze(student, config(named).frozen)
    held = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert held == {name for name in shapes if name.startswith(belongs)} != set()
    assert trained(config(named), shapes).keys() == shapes.keys() - held


@pytest.mark.parametrize("named", ["block", "blocks.12", "patch", "blocks.1.attn", ""])
def test_what_is_no_part_is_named(named: str) -> None:
    with pytest.raises(BadUsage, match=f"'{named}'"):
        _freeze(WanLite(StudentConfig(**DEEP)), config(named).frozen)  # type: ignore[arg-type]
