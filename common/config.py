"""A YAML file becomes a typed, frozen value, once, at the door.

    config = load_config(HarvestConfig, Path("configs/harvest/demo.yaml"), overrides=["steps=20"])
    save_config(config, run_dir / "config.yaml")

Defaults < file < `--set a.b=c`. An unknown key is refused with the nearest known one, a key given twice is refused,
and `1e-4` is a number (YAML 1.1 as PyYAML reads it calls it a string).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import BadUsage
from common.files import write_atomic


class Section(BaseModel):
    """A part of a configuration: frozen, no key beyond those declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML with numbers as people write them and without silent duplicates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise BadUsage(
                wrong=f"key '{key}' stands twice",
                found=f"line {node.value[index][0].start_mark.line + 1}",
                mend="keep one of the two",
            )
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise BadUsage(
            wrong=f"{source} is not YAML", found=" ".join(str(error).split()), mend="mend the file at that line"
        ) from None


def load_config(model: type[ConfigT], path: Path, *, overrides: Iterable[str] = ()) -> ConfigT:
    """Read `path`, lay the overrides (`a.b=c`) over it and check the whole against `model`."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
    except OSError as error:
        raise BadUsage(
            wrong="the configuration cannot be read",
            found=f"{path}: {error.strerror}",
            mend="give a file that exists, e.g. one of configs/",
        ) from None
    except UnicodeDecodeError as error:
        raise BadUsage(wrong=f"{path} is not UTF-8", found=str(error), mend="save it as UTF-8") from None
    if not isinstance(values, dict):
        raise BadUsage(
            wrong=f"{path} is no configuration", found=type(values).__name__, mend="write `key: value` lines"
        )
    for override in overrides:
        _lay_over(values, override)
    return check(model, values, source=str(path))


def check(model: type[ConfigT], values: Mapping[str, Any], *, source: str) -> ConfigT:
    """`values` as a `model`, or a BadUsage naming the first wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known_keys(model, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
            hint = f"did you mean '{near[0]}'? known: {', '.join(sorted(known))}" if near else "remove it"
            raise BadUsage(wrong=f"{source}: unknown key '{where}'", found=repr(first["input"]), mend=hint) from None
        found = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise BadUsage(
            wrong=f"{source}: '{where}'" if where else source,
            found=found,
            mend=first["msg"].removeprefix("Value error, "),
        ) from None


def save_config(config: Section, path: Path) -> None:
    """Write the resolved configuration: what a run really used, defaults included."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomic(path, text.encode())


def _lay_over(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise BadUsage(wrong="--set takes a.b=value", found=override, mend="e.g. --set steps=20")
    *parents, leaf = name.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise BadUsage(
                wrong=f"--set {name}: '{parent}' is no section",
                found=repr(values[parent]),
                mend="name a key that it has",
            )
        values = values[parent]
    values[leaf] = parse_yaml(text, source=f"--set {name}")


def _known_keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)
