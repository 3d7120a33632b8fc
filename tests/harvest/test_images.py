"""Pictures instead of walks: what is read, what becomes of it in the teacher's latent space, and what is refused."""

import errno
import io
import json
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from common.errors import BadUsage, Fault, Partial
from common.schedule import contract_grid, renoise_noise
from common.shards import RUNS, ShardSet
from harvest.config import HarvestConfig, ImagesConfig
from harvest.granary.repair import repair
from harvest.images import pictures_of, read_pictures
from harvest.latents import OVERLAP, TILE, encode_in_tiles
from harvest.plan_report import answers_of
from harvest.quarantine import notes_of
from harvest.running.loop import ready_teacher
from harvest.running.task import read_task
from harvest.stills import seed_of_picture, still
from tests.harvest.test_oracle import padded
from tests.made import harvest_config, harvest_here, tree
from tests.micro import write_micro_ti2v

# webdataset leaves a torn tar file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

CAPTION = "a red cat"
EXACT: dict[str, Any] = {
    "latent_dtype": "float32", "encoding": "float32", "source": "images", "prompts": None, "steps": 6, "keep": 3,
    "teacher": {"batched_guidance": False, "collapsed_padding": False},
}  # fmt: skip


def drawn(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, two of one caption; captions as text and as JSON."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.jpg", "deep/c.webp", "deep/d.png", "e.bmp"]):
        file = tmp_path / "pictures" / name
        drawn(number).save(file)
        if number < 2:
            file.with_suffix(".txt").write_text(f" {CAPTION}\n", encoding="utf-8")
        else:
            file.with_suffix(".json").write_text(json.dumps({"caption": f"a picture {number}"}), encoding="utf-8")
    return tmp_path / "pictures"


def seen(images: ImagesConfig, *names: str) -> dict[str, Any]:
    """As they lie there now, 64 pixels wide and high."""
    seeds = {name: seed_of_picture((images.path / name).read_bytes(), images.frame) for name in names}
    return dict(pictures_of(images, seeds, 64, 64))


def config_of(path: Path, teacher: Path, out: Path, **changes: Any) -> HarvestConfig:
    return harvest_config(out, teacher, **{**EXACT, "images": ImagesConfig(path=path), **changes})


def as_tar(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w") as tar:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            tar.add(file, file.relative_to(folder).as_posix())
    return target


def records_of(shards: ShardSet) -> list[Any]:
    return [
        shards.read(receipt).record(i) for receipt in shards.manifest().receipts for i in range(receipt.num_records)
    ]


@torch.inference_mode()
def test_the_end_point_is_the_stock_vaes_latent_and_the_teacher_is_asked_around_it(
    folder: Path, tmp_path: Path, micro_wan: Path
) -> None:
    """Stock VAE and stock transformers, fed what is stored, say what is stored."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    config = config_of(folder, micro_wan, tmp_path / "set", micro_batch=1)
    shards = ShardSet.open(harvest_here(config))
    (metrics,) = (config.out / RUNS).glob("*/metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[-1])["forwards"] == sum(answers_of(read_task(config))) == 5 * 3
    assert shards.contract.source == "images"
    vae = AutoencoderKLWan.from_pretrained(micro_wan / "vae", torch_dtype=torch.float32)
    experts = [WanTransformer3DModel.from_pretrained(micro_wan / name) for name in ("transformer", "transformer_2")]
    mean, std = (
        np.array(getattr(vae.config, f"latents_{name}"), np.float32)[:, None, None] for name in ("mean", "std")
    )
    records, asked = records_of(shards), set()
    pictures = seen(ImagesConfig(path=folder), "a.png", "b.jpg", "deep/c.webp", "deep/d.png", "e.bmp")
    latents = []
    for picture in pictures.values():
        assert picture.size == (64, 64)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        raw = vae.encode(pixels[None, :, None]).latent_dist.mode()[0, :, 0].numpy()
        latents.append((raw - mean) / std)
    assert len(records) == 5 and sorted(record.prompt for record in records)[-2:] == [CAPTION, CAPTION]
    for record in records:
        assert any(np.array_equal(record.final, latent) for latent in latents)
        grid = contract_grid(shards.contract, int(record.key, 16))
        for point, sigma in enumerate(record.sigmas):
            step = int(np.flatnonzero(grid.sigmas == sigma)[0])
            noise = renoise_noise(record.key, step, record.final.shape)
            np.testing.assert_array_equal((1 - sigma) * record.final + sigma * noise, record.latents[point])
            said = experts[record.expert[point]](
                torch.from_numpy(record.latents[point])[None, :, None], torch.tensor([record.timesteps[point]]),
                padded([record.text]), return_dict=False,
            )[0]  # fmt: skip
            np.testing.assert_array_equal(said[0, :, 0].numpy(), record.cond[point])
            asked.add(int(record.expert[point]))
    assert asked == {0, 1}


def test_folder_manifest_and_webdataset_give_the_same_set(folder: Path, tmp_path: Path, micro_wan: Path) -> None:
    """Names differ, contents do not: the same keys, the same bytes."""
    wishes, summary = read_pictures(ImagesConfig(path=folder))
    assert "5 pictures" in summary and "cut at the centre" in summary
    by_name = sorted(wishes, key=lambda wish: wish.picture)
    lines = [json.dumps({"file": wish.picture, "caption": wish.prompt}) for wish in by_name]
    (folder / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tar = as_tar(folder, tmp_path / "pictures-0.tar")
    sets = []
    for number, path in enumerate([folder, folder / "all.jsonl", tar, tmp_path / "pictures-*.tar"]):
        config = config_of(path, micro_wan, tmp_path / f"set{number}")
        assert sorted((wish.prompt, wish.seed) for wish in read_pictures(config.images)[0]) == sorted(  # type: ignore[arg-type]
            (wish.prompt, wish.seed) for wish in wishes
        )
        if number in (0, 2):
            sets.append(ShardSet.open(harvest_here(config)))
    mine, theirs = ({record.key: record.final.tobytes() for record in records_of(shards)} for shards in sets)
    assert mine == theirs and len(mine) == 5


def test_an_unreadable_picture_is_quarantined_by_name_and_its_neighbours_are_as_before(
    folder: Path, tmp_path: Path, micro_wan: Path
) -> None:
    whole = ShardSet.open(harvest_here(config_of(folder, micro_wan, tmp_path / "whole")))
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:200])
    (folder / "deep" / "d.png").write_bytes(b"no picture at all")
    config = config_of(folder, micro_wan, tmp_path / "set")
    for _ in range(2):  # read, then remembered
        assert read_task(config).plan.summary.endswith("; 2 or more cannot be read: b.jpg ...")
    with pytest.raises(Partial, match=r"2 records were set aside.*mend the pictures"):
        harvest_here(config)
    notes = [fault for note in notes_of(config.out) for fault in note.faults]
    assert {note["what"] for note in notes} == {"unreadable"}
    assert sorted(note["where"].split(":")[0] for note in notes) == ["picture b.jpg", "picture deep/d.png"]
    held = {record.key: record for record in records_of(ShardSet.open(config.out))}
    before = {record.key: record for record in records_of(whole)}
    assert len(held) == 3 and held.keys() < before.keys()
    for key, record in held.items():
        np.testing.assert_array_equal(record.final, before[key].final)
    state = tree(config.out)
    assert harvest_here(config) == config.out and tree(config.out) == state  # and it is not asked for again
    drawn(1).save(folder / "b.jpg")
    drawn(3).save(folder / "deep" / "d.png")
    assert all("no more" in line for line in repair(config, config.out))
    harvest_here(config)  # mended: asked for as what they are now
    assert {record.prompt for record in records_of(ShardSet.open(config.out))} == {
        record.prompt for record in before.values()
    }
    assert ShardSet.open(config.out).manifest().num_records == 5


def test_a_picture_that_is_replaced_during_the_harvest_is_not_stored_under_the_old_ones_key(
    folder: Path, tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then(*arguments: Any) -> Any:
        drawn(77).save(folder / "b.jpg")
        return ready_teacher(*arguments)

    config = config_of(folder, micro_wan, tmp_path / "set")
    before = {wish.picture: wish for wish in read_pictures(ImagesConfig(path=folder))[0]}
    with monkeypatch.context() as patch:
        patch.setattr("harvest.running.loop.ready_teacher", then)
        with pytest.raises(Partial, match="1 records were set aside"):
            harvest_here(config)
    (fault,) = (fault for note in notes_of(config.out) for fault in note.faults)
    assert fault["where"] == "picture b.jpg: it has changed since the plan"
    assert before["b.jpg"].seed not in {record.seed for record in records_of(ShardSet.open(config.out))}
    harvest_here(config)  # asked for as what it is now
    assert ShardSet.open(config.out).manifest().num_records == 5


@pytest.mark.parametrize("as_shard", [False, True])
def test_a_disk_that_fails_for_a_while_quarantines_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_shard: bool
) -> None:
    """The worker ends, and is started again; a picture that is gone is quarantined."""
    path = as_tar(folder, tmp_path / "p.tar") if as_shard else folder
    names = {wish.picture: wish.seed for wish in read_pictures(ImagesConfig(path=path))[0]}

    def failing(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("tarfile.TarFile.next" if as_shard else "pathlib.Path.read_bytes", failing)
        with pytest.raises(Fault, match=r"cannot be read now; found: .*Input/output error") as caught:
            dict(pictures_of(ImagesConfig(path=path), names, 64, 64))
        assert caught.value.exit_code == 1
    if not as_shard:
        (folder / "b.jpg").unlink()
        found = dict(pictures_of(ImagesConfig(path=path), names, 64, 64))
        assert [name for name in found if isinstance(found[name], str)] == ["b.jpg"]


def test_what_is_no_still_picture_with_a_caption_is_refused(folder: Path, tmp_path: Path, micro_wan: Path) -> None:
    film = [drawn(number) for number in range(3)]
    film[0].save(folder / "film.gif", save_all=True, append_images=film[1:])
    (folder / "film.txt").write_text("a film", encoding="utf-8")
    with pytest.raises(BadUsage, match=r"film\.gif has several frames.*images\.frame"):
        read_pictures(ImagesConfig(path=folder))
    seeds = {wish.seed for frame in (0, 2) for wish in read_pictures(ImagesConfig(path=folder, frame=frame))[0]}
    assert len(seeds) == 12
    second, first, beyond = (
        seen(ImagesConfig(path=folder, frame=frame), "film.gif")["film.gif"] for frame in (2, 0, 3)
    )
    assert np.abs(np.array(first, int) - np.array(second, int)).mean() > 10 and "EOFError" in beyond
    (folder / "film.gif").rename(folder / "film.mp4")
    with pytest.raises(BadUsage, match=r"a video; found: film\.mp4"):
        read_pictures(ImagesConfig(path=folder, frame=0))
    (folder / "film.mp4").unlink()
    (folder / "e.json").unlink()
    with pytest.raises(BadUsage, match=r"1 of 5 pictures have no caption; found: e\.bmp"):
        read_pictures(ImagesConfig(path=folder))
    (folder / "e.txt").write_bytes(b"\xff\xfe caption")
    with pytest.raises(BadUsage, match=r"caption of .*e\.txt cannot be read"):
        read_pictures(ImagesConfig(path=folder))
    (tmp_path / "torn.tar").write_bytes(as_tar(folder, tmp_path / "whole.tar").read_bytes()[:3000])
    for path, what in [("torn.tar", "cannot be read"), ("none-*.tar", "names no file"), ("nowhere", "nothing that is"),
                       ("none.jsonl", "names what cannot be read")]:  # fmt: skip
        with pytest.raises(BadUsage, match=what):
            read_pictures(ImagesConfig(path=tmp_path / path))
    with pytest.raises(BadUsage, match="brings its own captions"):
        config_of(folder, micro_wan, tmp_path / "set", prompts={"file": "p.txt"})
    with pytest.raises(BadUsage, match="takes prompts alone"):
        config_of(folder, micro_wan, tmp_path / "set", source="renoise")


def test_transparent_turned_and_grey_pictures_are_seen_as_people_see_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 64, 0).repeat(64, 1))
    wide.convert("RGB").save(tmp_path / "turned.jpg", exif=exif, quality=100)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "glass.png")
    Image.fromarray(np.full((64, 64), 1000, np.uint16)).save(tmp_path / "deep.png")
    images = ImagesConfig(path=tmp_path)
    found = seen(images, "turned.jpg", "glass.png", "deep.png")
    turned = np.array(found["turned.jpg"]).astype(int)
    assert turned[:8].mean() < 20 and turned[-8:].mean() > 235  # upright: dark above light, where it was dark beside it
    assert np.array(found["glass.png"]).min() == 255
    assert "more than 8 bits" in found["deep.png"]


Point = tuple[float, ...]


def profile(red: Point, green: Point, blue: Point, gray: Point, name: str) -> bytes:
    """An ICC profile (version 2, matrix and curves): primaries as XYZ under D50; one gamma, or the curve itself."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    points = [round(gray[0] * 256)] if len(gray) == 1 else [round(65535 * value) for value in gray]
    curve = b"curv\0\0\0\0" + struct.pack(f">I{len(points)}H", len(points), *points)
    curve += b"\0" * (-len(curve) % 4)
    said = name.encode() + b"\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(said)) + said + b"\0" * 78, b"cprt": b"text\0\0\0\0x\0",
            b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue),
            b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}  # fmt: skip
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s4sI4sI8sI", 128 + len(table + data), b"none", 0x02100000, b"mntr", b"RGB ",
                       b"XYZ ", b"", b"acsp", b"", 0, b"", 0, b"", 0)  # fmt: skip
    return head + b"".join(map(number, (0.9642, 1.0, 0.8249))) + b"\0" * 48 + table + data


P3 = profile((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), (2.2,), "P3")
SRGB = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)
CURVE = tuple(np.where((x := np.linspace(0, 1, 40)) <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4))


def taken(image: Image.Image, **how: Any) -> Any:
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | how))
    found = still(file.getvalue(), None, 16, 16)
    assert not isinstance(found, str), found
    return np.asarray(found).astype(int)


def test_a_pictures_colours_are_those_that_a_viewer_shows() -> None:
    """A phone's red is a stronger red than the same numbers mean to the VAE; what is transparent stays so."""
    red = Image.new("RGB", (16, 16), (230, 60, 40))
    shown = taken(red, icc_profile=P3)
    assert shown[0, 0, 0] >= 249 and shown[0, 0, 1] < 45  # 230 60 40 of P3 is past what sRGB has of red
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    for same in (red.convert("RGBA"), palette):
        assert np.abs(taken(same, icc_profile=P3) - shown).max() <= 1
    assert np.abs(taken(red, icc_profile=P3, format="JPEG", quality=100) - shown).max() <= 4
    assert taken(Image.new("RGBA", (16, 16), (230, 60, 40, 0)), icc_profile=P3).min() == 255
    half = taken(Image.new("RGBA", (16, 16), (230, 60, 40, 128)), icc_profile=P3)
    assert np.abs(half - (255 + shown) / 2).max() <= 2


def test_a_profile_that_says_srgb_or_nothing_leaves_every_byte_as_it_is() -> None:
    """Most cameras write one: whether by name, or by numbers that come near it, or torn."""
    everything = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    bare = taken(everything)
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    near, named = profile(*SRGB, CURVE, "a web site's"), profile(*SRGB, (1.8,), "sRGB of a camera")
    for icc in (built_in, near, named, P3[:200], b"no profile"):
        np.testing.assert_array_equal(taken(everything, icc_profile=icc), bare)
    grey = everything.convert("L")
    np.testing.assert_array_equal(taken(grey, icc_profile=P3), taken(grey))  # a profile of other channels
    for other, least in (
        (P3, 20),
        (profile(*SRGB, (1.8,), "a screen's"), 10),
        (profile(*SRGB, (2.2,), "another's"), 4),
    ):
        assert np.abs(taken(everything, icc_profile=other) - bare).max() > least


@torch.inference_mode()
def test_a_large_picture_on_the_stride_16_vae_is_bounded_and_moves(tmp_path: Path) -> None:
    """1280x704 in six tiles: no encoder call sees more than one tile, and each one is a sign of life."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(write_micro_ti2v(tmp_path / "ti2v") / "vae", torch_dtype=torch.float32)
    pixels = torch.from_numpy(np.array(drawn(0, 1280, 704))).permute(2, 0, 1).float() / 127.5 - 1
    beats: list[float] = []
    sizes: list[tuple[int, ...]] = []
    whole = vae.encode(pixels[None, :, None]).latent_dist.mode()[0, :, 0]
    vae.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    began = time.monotonic()
    latent = encode_in_tiles(vae, pixels, 16, lambda: beats.append(time.monotonic()))
    assert latent.shape == (48, 44, 80) and torch.isfinite(latent).all()
    assert len(beats) == len(sizes) == 6 and time.monotonic() - began < 60
    assert all(size[-1] * size[-2] <= (TILE // 2) ** 2 and size[2] == 1 for size in sizes)  # patches of two
    error = (latent - whole).norm() / whole.norm()
    assert error < 0.35  # the micro encoder attends over all it sees, so tiles differ; a shifted one differs by 1.4
    assert encode_in_tiles(vae, pixels[:, :TILE, :TILE], 16, lambda: None).equal(
        vae.encode(pixels[None, :, None, :TILE, :TILE]).latent_dist.mode()[0, :, 0]
    )
    assert OVERLAP < TILE


def test_pictures_that_look_as_they_did_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one changes, or its caption does: then that one alone is."""
    images = ImagesConfig(path=folder)
    before, _ = read_pictures(images)
    read: list[str] = []
    real = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    assert read_pictures(images)[0] == before and not {"a.png", "a.txt"} & set(read)
    (folder / "a.txt").write_text("another caption", encoding="utf-8")
    drawn(9).save(folder / "b.jpg")
    read.clear()
    after = {wish.picture: wish for wish in read_pictures(images)[0]}
    assert {"a.png", "b.jpg"} <= set(read) and not {"e.bmp", "d.png"} & set(read)
    assert after["a.png"].prompt == "another caption" and after["a.png"].seed == before[0].seed
    assert after["b.jpg"].seed != before[1].seed


def test_a_launchers_environment_does_not_hide_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """webdataset by itself refuses one shard for two nodes."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert len(read_pictures(ImagesConfig(path=as_tar(folder, tmp_path / "p.tar")))[0]) == 5
