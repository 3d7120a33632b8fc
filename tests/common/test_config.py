"""Configuration: what is typed is what is used, and a mistake is named."""

from pathlib import Path

import pytest
import yaml

from common.config import Section, load_config, parse_yaml, save_config
from common.errors import BadUsage


class Inner(Section):
    width: int = 3
    rate: float = 1e-3


class Outer(Section):
    name: str
    inner: Inner = Inner()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "name: x\ninner: {width: 4}\n")
    config = load_config(Outer, path, overrides=["inner.rate=2e-5", "name=y"])
    assert (config.name, config.inner.width, config.inner.rate) == ("y", 4, 2e-5)


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), ("2E5", 2e5), ("1.", 1.0), (".5", 0.5), ("-3e+2", -300.0),
                                              ("7", 7), ("1_000", 1000)])  # fmt: skip
def test_numbers_as_people_write_them(text: str, number: float) -> None:
    value = parse_yaml(f"a: {text}", source="t")["a"]
    assert value == number and type(value) is type(number)


@pytest.mark.parametrize("text", ["e4", "1e", "v1.5", "1e-4x", "fp16", "."])
def test_words_stay_words(text: str) -> None:
    assert parse_yaml(f"a: {text}", source="t")["a"] == text


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match=r"unknown key 'inner\.widht'.*did you mean 'width'"):
        load_config(Outer, written(tmp_path, "name: x\ninner: {widht: 4}\n"))


@pytest.mark.parametrize(("text", "what"), [("name: x\nname: y\n", "stands twice"), ("inner: {}\n", "'name'"),
                                            ("- a\n", "no configuration"), ("a: [\n", "not YAML"),
                                            ("name: x\ninner: {width: wide}\n", r"inner\.width")])  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(BadUsage, match=what):
        load_config(Outer, written(tmp_path, text))


@pytest.mark.parametrize("override", ["rate", "=3", "name.deep=3"])
def test_a_bad_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(BadUsage, match="--set"):
        load_config(Outer, written(tmp_path, "name: x\n"), overrides=[override])


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    with pytest.raises(BadUsage):
        load_config(Outer, written(tmp_path, "name: !!python/object/apply:os.getcwd []\n"))


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(Outer, written(tmp_path, "name: 1e-4x\ninner: {rate: 1e-7}\n"))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Outer, tmp_path / "saved.yaml") == config
    assert set(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == {"name", "inner"}


@pytest.mark.parametrize("path", sorted(Path("configs/harvest").glob("*.yaml")), ids=str)
def test_harvest_presets_are_valid(path: Path) -> None:
    from harvest.config import HarvestConfig

    load_config(HarvestConfig, path)


@pytest.mark.parametrize("path", sorted(Path("configs/train").glob("*.yaml")), ids=str)
def test_train_presets_are_valid(path: Path) -> None:
    from train.config import TrainConfig

    load_config(TrainConfig, path)
