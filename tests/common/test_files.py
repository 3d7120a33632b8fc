"""The seam to the disk: whole or not at all, whichever call fails."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import files
from common.files import TEMPORARY_PREFIX, sweep, write_atomic, write_folder, write_new


class FailingAt:
    """The n-th call of the disk fails; a torn write writes half first."""

    def __init__(self, number: int, monkeypatch: pytest.MonkeyPatch, *, torn: bool) -> None:
        self.calls, self.number, self.torn = 0, number, torn
        for name in ("_write", "_fsync", "_rename", "_link"):
            monkeypatch.setattr(files, name, self._failing(getattr(files, name), is_write=name == "_write"))

    def _failing(self, real: Callable[..., Any], *, is_write: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.number:
                if is_write and self.torn:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(errno.ENOSPC, "no space left")
            return real(*arguments)

        return call


def num_calls(action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        counter = FailingAt(0, patch, torn=False)
        action()
    return counter.calls


@pytest.mark.parametrize("torn", [False, True])
def test_a_file_is_old_or_new_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    path = tmp_path / "f"
    total = num_calls(lambda: write_atomic(path, [b"old" * 100, b"er"]), monkeypatch)
    old, new = path.read_bytes(), b"new" * 200
    for number in range(1, total + 1):
        with monkeypatch.context() as patch:
            FailingAt(number, patch, torn=torn)
            with pytest.raises(OSError, match="no space"):
                write_atomic(path, [new, b"er"])
        assert path.read_bytes() in (old, new + b"er")
        assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
        write_atomic(path, old)


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_there_or_not_whatever_fails_and_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refused(*_: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(files, "_link", refused)
    total = num_calls(lambda: write_new(tmp_path / "probe", b"first"), monkeypatch)
    for number in range(1, total + 1):
        path = tmp_path / str(number)
        with monkeypatch.context() as patch:
            FailingAt(number, patch, torn=True)
            with pytest.raises(OSError, match="no space"):
                write_new(path, b"first")
        assert not path.exists() or path.read_bytes() == b"first"
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "probe", b"second")
    assert (tmp_path / "probe").read_bytes() == b"first" and (tmp_path / "probe").stat().st_nlink == 1
    assert total >= 4 and not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far").write_bytes(b"linked")
    parts = {"a/x": b"1" * 10, "a/l": tmp_path / "far", "a/y": b"2" * 20, "z": b"3"}
    wanted = {name: b"linked" if isinstance(part, Path) else part for name, part in parts.items()}
    total = num_calls(lambda: write_folder(tmp_path / "probe", parts), monkeypatch)
    for number in range(1, total + 1):
        target = tmp_path / f"t{number}"
        with monkeypatch.context() as patch:
            FailingAt(number, patch, torn=True)
            with pytest.raises(OSError, match="no space"):
                write_folder(target, parts)
        whole = target.exists() and {name: (target / name).read_bytes() for name in parts} == wanted
        assert whole or not target.exists()
        assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))
    assert total >= 8 and (tmp_path / "probe/a/l").readlink() == tmp_path / "far"


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", {"a": b"1"})
    with pytest.raises(FileExistsError):
        write_folder(tmp_path / "f", {"a": b"2"})
    assert (tmp_path / "f" / "a").read_bytes() == b"1"


def test_sweep_spares_the_young(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}dead").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}dead" / "part").write_bytes(b"x")
    (tmp_path / "mine").write_bytes(b"x")
    assert sweep(tmp_path, older_than_s=60) == 0
    assert sweep(tmp_path, older_than_s=-1) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
