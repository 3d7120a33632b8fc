"""The walls of the house: who may import whom, and what a process has loaded when it answers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.made import ROOT, command

ALLOWED = {"common": {"common"}, "harvest": {"common", "harvest"}, "train": {"common", "train"}}
FORBIDDEN = {
    "common": {"torch", "diffusers", "transformers", "peft"},
    "harvest": {"peft"},
    "train": {"diffusers", "transformers", "webdataset", "peft"},
}
ALL_THE_SAME = {"texts.py": {"transformers"}, "lora.py": {"peft"}}  # `train sample --text-encoder`, `lora: {...}`
FILES = [path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py"))]
MAX_LINES = 260


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    parts = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}  # a module out of a package
    return names | parts | {str(node.module) for node in froms}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_stands_on(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops & ALLOWED.keys() <= ALLOWED[room]
    assert not tops & FORBIDDEN.get(room, set()) - ALL_THE_SAME.get(path.name, set())
    assert "tests" not in tops


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_import_circle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    arrows = {name: {other for other in imported(path) if other in modules} - {name} for name, path in modules.items()}
    while arrows:
        leaves = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}


@pytest.mark.parametrize("words", [("harvest", "--help"), ("train", "--help"), ("harvest", "status", "{set}"),
                                   ("harvest", "verify", "{set}"), ("train", "plan", "{config}")])  # fmt: skip
def test_light_commands_do_without_torch(
    words: tuple[str, ...], micro_set: Path, micro_init: Path, tmp_path: Path
) -> None:
    config = {"set": str(micro_set), "init": str(micro_init), "out": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_module(sys.argv[0], run_name='__main__')\n" \
           "except SystemExit: pass\nprint('torch' in sys.modules, 'zarr' in sys.modules)"  # fmt: skip
    places = {"set": micro_set, "config": tmp_path / "config.yaml"}
    filled = [word.format(**places) for word in words]
    done = subprocess.run([sys.executable, "-c", code, *filled], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert len(done.stdout.splitlines()) > 1, done.stderr


@pytest.mark.parametrize("room", ["harvest", "train"])
def test_help_answers_at_once(room: str) -> None:
    import time

    def seconds() -> float:
        began = time.perf_counter()
        assert command(room, "--help").returncode == 0
        return time.perf_counter() - began

    assert min(seconds() for _ in range(4)) < 0.5


@pytest.mark.parametrize(("module", "is_error"), [("train.feed.order", True), ("common", True), ("commonplace", False)])
def test_a_warning_of_our_own_is_an_error(module: str, is_error: bool) -> None:
    import warnings

    code = compile("import warnings; warnings.warn('probe', UserWarning)", "probe", "exec")
    expected = pytest.raises(UserWarning, match="probe") if is_error else warnings.catch_warnings(record=True)
    with expected:
        exec(code, {"__name__": module})
