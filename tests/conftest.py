"""Fixtures: a micro teacher on disk, micro sets harvested from it by the real harvest, a micro student."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is remembered of teachers' files: of this run alone, and never the user's.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="wan-lite-tests-")

from harvest.config import HarvestConfig
from tests.made import harvest_config, harvest_here, write_student_json

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def micro_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, random micro weights, the true layout."""
    from tests.micro import write_micro_wan

    return write_micro_wan(tmp_path_factory.mktemp("teacher") / "wan")


@pytest.fixture(scope="session")
def micro_config(tmp_path_factory: pytest.TempPathFactory, micro_wan: Path) -> HarvestConfig:
    return harvest_config(tmp_path_factory.mktemp("set") / "set", micro_wan)


@pytest.fixture(scope="session")
def micro_set(micro_config: HarvestConfig) -> Path:
    """12 prompts x 2 seeds in shards of 4, 3 kept of 6 steps: 24 records, 72 points. Read-only by agreement."""
    return harvest_here(micro_config)


@pytest.fixture(scope="session")
def micro_init(tmp_path_factory: pytest.TempPathFactory, micro_wan: Path) -> Path:
    """A student of its teacher's size."""
    from train.student.network import read_student_json
    from train.student.projection import project

    folder = tmp_path_factory.mktemp("student")
    project(micro_wan, read_student_json(write_student_json(folder / "student.json")), folder / "init", experts="low")
    return folder / "init"
