"""The environment that torch will find, and the user's own word before ours."""

import os

import pytest

from common.environment import prepare_environment

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "OMP_WAIT_POLICY")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_both_names_of_the_allocators_variable_are_set() -> None:
    prepare_environment()
    ours = ["expandable_segments:True", "expandable_segments:True", "false", "passive"]
    assert [os.environ[name] for name in NAMES] == ours


@pytest.mark.parametrize("name", NAMES[:2])
def test_what_the_user_said_stands_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    prepare_environment()
    other = NAMES[1] if name == NAMES[0] else NAMES[0]
    assert os.environ[name] == "max_split_size_mb:64" and other not in os.environ
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true" and os.environ["OMP_WAIT_POLICY"] == "active"
