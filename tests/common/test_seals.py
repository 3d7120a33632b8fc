"""What stands beside shards is known to be what was left there."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from common.errors import Corrupt
from common.files import TEMPORARY_PREFIX, write_folder
from common.seals import damage_of, leave, remove, replace, sealed, seals_of, sound

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    leave(tmp_path, "vae/config.json", b"{}")
    leave(tmp_path, "vae/weights", [CONTENT[:5000], CONTENT[5000:]])
    leave(tmp_path, "negative.npy", CONTENT)
    return tmp_path


def test_every_flipped_bit_is_found_where_it_is_read(folder: Path) -> None:
    for bit in range(0, 8 * len(CONTENT), 1009):
        flip_bit(folder / "vae/weights", bit)
        with pytest.raises(Corrupt, match="altered"):
            sound(folder, "vae")
        sound(folder, "negative.npy")
        flip_bit(folder / "vae/weights", bit)
    assert sound(folder, "vae") == folder / "vae"


@pytest.mark.parametrize("length", [0, 1, 4096, len(CONTENT) - 1])
def test_torn_and_missing_are_told_apart(folder: Path, length: int) -> None:
    (folder / "negative.npy").write_bytes(CONTENT[:length])
    assert damage_of(folder, "negative.npy") == ("torn", f"{length} bytes of {len(CONTENT)}")
    (folder / "negative.npy").unlink()
    assert damage_of(folder, "negative.npy") == ("missing", "No such file or directory")


def test_a_damaged_seal_is_named_and_hides_nothing(folder: Path) -> None:
    (folder / "seals/negative.npy.json").write_bytes(b'{"bytes": ')
    kind, found = damage_of(folder, "negative.npy") or ("", "")
    assert kind == "altered" and "seals/negative.npy.json cannot be read" in found
    with pytest.raises(Corrupt, match="cannot be read"):
        sound(folder, "negative.npy")


def test_what_is_there_is_kept_and_what_has_no_seal_gets_one(folder: Path) -> None:
    leave(folder, "negative.npy", b"another")
    assert (folder / "negative.npy").read_bytes() == CONTENT
    (folder / "theirs").write_bytes(CONTENT)
    assert sound(folder, "theirs") and damage_of(folder, "theirs") is None
    leave(folder, "theirs", b"another")
    flip_bit(folder / "theirs", 7)
    assert damage_of(folder, "theirs")


def test_another_content_has_another_seal(folder: Path) -> None:
    replace(folder, "negative.npy", b"another")
    assert sound(folder, "negative.npy").read_bytes() == b"another"


def test_names_are_those_of_files_also_below_folders(folder: Path) -> None:
    (folder / "seals" / f"{TEMPORARY_PREFIX}1-x.json").write_text("{")
    assert sealed(folder) == ["negative.npy", "vae/config.json", "vae/weights"]
    assert sealed(folder, "vae") == ["vae/config.json", "vae/weights"]
    assert sealed(folder, "negative.npy") == ["negative.npy"] and sealed(folder, "neg") == []
    (folder / "negative.npy").unlink()
    assert sealed(folder, "negative.npy") == ["negative.npy"]
    remove(folder, "vae")
    assert sealed(folder) == ["negative.npy"] and not (folder / "vae/weights").exists()


def test_of_several_at_once_one_has_left_it_whole(tmp_path: Path) -> None:
    together = Barrier(8)

    def leave_mine(number: int) -> None:
        together.wait(30)
        leave(tmp_path, "heard", bytes([number]) * 300_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave_mine, range(8)))
    data = sound(tmp_path, "heard").read_bytes()
    assert damage_of(tmp_path, "heard") is None and len(set(data)) == 1 and len(data) == 300_000


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_folder_that_appears_whole_is_sealed_as_one_that_grew(tmp_path: Path) -> None:
    files = {"vae/config.json": b"{}", "negative.npy": CONTENT}
    for name, data in files.items():
        leave(tmp_path / "grew", name, data)
    write_folder(tmp_path / "whole", {**files, **seals_of(files)})
    assert sealed(tmp_path / "whole") == sorted(files)
    for name in ("seals/vae/config.json.json", "seals/negative.npy.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "grew" / name).read_bytes()
