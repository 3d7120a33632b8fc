"""Before a run has begun: who reads a million prompts or pictures is heard, can be stopped, and reads them once."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import BadUsage, Corrupt, Refused, Stopped
from common.shards import RUNS, ShardSet
from harvest import plan, prompts
from harvest.config import ImagesConfig
from harvest.images import read_pictures
from harvest.loading.folder import resolve
from harvest.plan_report import tokens_of
from harvest.running import workers
from harvest.running.check import check
from harvest.running.loop import harvest, may_be_cut
from harvest.running.slices import WHOLE
from harvest.seen import Seen
from harvest.teacher import TeacherFacts
from harvest.teachers import facts_of
from tests.harvest.test_resume import as_file
from tests.made import PROMPTS, harvest_config, harvest_here, planned, started, tree
from tests.micro_sd import write_micro_sd


@dataclass(frozen=True)
class Asked:
    """A teacher of whom only tokens are asked."""

    facts: TeacherFacts
    count_tokens: Callable[[list[str]], list[int]]


def test_a_heartbeat_names_the_plan_while_prompts_are_read(tmp_path: Path, micro_wan: Path, micro_set: Path) -> None:
    """The prompts come through a pipe, and nobody writes: a supervisor that hears nothing would kill for it."""
    config = harvest_config(tmp_path / "set", micro_wan, deadline_s=1)
    assert config.prompts is not None
    config.prompts.file.unlink()
    os.mkfifo(config.prompts.file)
    process = started("harvest", "run", as_file(config, tmp_path / "c.yaml"))
    try:
        deadline, states = time.monotonic() + 60, set[str]()
        while "stalled(plan)" not in states:
            assert time.monotonic() < deadline and process.poll() is None
            states |= {json.loads(beat.read_bytes())["state"] for beat in config.out.glob(f"{RUNS}/*/heartbeat.json")}
            time.sleep(0.02)
        assert "starting(plan)" in states
        config.prompts.file.write_text("\n".join(PROMPTS), encoding="utf-8")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert tree(config.out) == tree(micro_set)


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "deep" / "er" / "set", micro_wan)
    assert config.prompts is not None
    config.prompts.file.write_text("\n \n", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    for begin in (lambda: harvest(config), lambda: workers.supervise(config, WHOLE, 2, strict=False, limit_s=None)):
        with pytest.raises(BadUsage, match="holds no prompt"):
            begin()
        assert sorted(tmp_path.rglob("*")) == before


def test_a_wish_to_stop_is_heard_while_prompts_are_read(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real = [], prompts.clean_prompt

    def cleaned(text: str) -> str:
        read.append(text)
        if len(read) == 10:
            signal.raise_signal(signal.SIGTERM)
        return real(text)

    monkeypatch.setattr(prompts, "clean_prompt", cleaned)
    config = harvest_config(tmp_path / "set", micro_wan)
    assert config.prompts is not None
    config.prompts.file.write_text("\n".join(f"cat {number}" for number in range(5000)), encoding="utf-8")
    with pytest.raises(Stopped, match="SIGTERM"):
        harvest(config)
    assert len(read) <= 2 * prompts.MOVED_EVERY and not config.out.exists()


def test_a_supervisor_reads_the_prompts_once(tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the placement is asked how many workers there are; of one, that it is this very process."""
    made: list[Path] = []
    real_plan, real_start = plan.make_plan, subprocess.Popen

    def counted(config: Any, *others: Any) -> Any:
        made.append(config.out)
        return real_plan(config, *others)

    monkeypatch.setattr("harvest.running.task.make_plan", counted)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda words, **options: real_start(["true"], **options))
        patch.setattr(workers, "placed_workers_asked_apart", lambda config, sizes, heed: 2 * len(sizes))
        config = harvest_config(tmp_path / "two", micro_wan)
        workers.supervise(config, WHOLE, None, strict=False, limit_s=None)
        assert made == [config.out]
    config = harvest_config(tmp_path / "one", micro_wan)
    workers.supervise(config, WHOLE, None, strict=False, limit_s=None)
    assert made[1:] == [config.out] and ShardSet.open(config.out).manifest().num_records == 24


def test_a_check_refuses_what_a_run_would_refuse(tmp_path: Path, micro_wan: Path) -> None:
    config = harvest_config(tmp_path / "set", micro_wan, prompts={"limit": 1})
    harvest_here(config)
    with pytest.raises(Refused, match=r"guidance: \(4\.0, 3\.0\) \| \(5\.0, 5\.0\)"):
        check(config.model_copy(update={"guidance": (5.0, 5.0)}))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for number, name in enumerate(["a.png", "b.png", "c.png", "sub/d.png", ".thumbs/a.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def test_pictures_that_were_read_before_a_stop_are_not_read_again(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was known of the others is not forgotten meanwhile."""
    images, read, real = ImagesConfig(path=pictures), list[str](), Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    whole, _ = read_pictures(images)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(pictures / name)
    read.clear()

    def stop_at_the_second() -> None:
        if "b.png" in read:
            raise Stopped(wrong="stopped on request", found="SIGTERM", mend="run again")

    with pytest.raises(Stopped):
        read_pictures(images, stop_at_the_second)
    assert "c.png" not in read
    read.clear()
    after, _ = read_pictures(images)
    assert {name for name in read if name.endswith(".png")} == {"b.png"}
    assert after[0].seed != whole[0].seed and [wish.seed for wish in after[2:]] == [wish.seed for wish in whole[2:]]


def test_what_is_seen_is_kept_while_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harvest.seen.KEPT_EVERY_S", -1.0)
    file = tmp_path / "a"
    file.write_bytes(b"x")
    Seen("test", {"of": str(tmp_path)}).of("a", [file], lambda: [1])
    assert Seen("test", {"of": str(tmp_path)}).of("a", [file], lambda: [2]) == [1]


def test_hidden_folders_are_left_out_and_links_are_told(pictures: Path) -> None:
    (pictures / "far").symlink_to(pictures / "sub")
    wishes, told = read_pictures(ImagesConfig(path=pictures))
    assert [wish.picture for wish in wishes] == ["a.png", "b.png", "c.png", "sub/d.png"]
    assert told.endswith("folders behind links are not entered: far")


@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_keys_are_read_once_and_from_one_file(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    """Of shards that the plan does not name: the same that a reader says, at a seventh of its calls."""
    config = harvest_config(tmp_path / "set", micro_wan, container=container)
    shards = ShardSet.open(harvest_here(config))
    assert config.prompts is not None
    config.prompts.file.write_text("\n".join(["one in front", *PROMPTS]), encoding="utf-8")
    opened, real = [], Path.read_bytes

    def counted(path: Path) -> bytes:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    (item, *others) = planned(config).remaining(shards)
    assert [question.prompt for question in item.questions] == ["one in front"] * 2 and not others
    read = [path for path in opened if path.is_relative_to(shards.shards_dir)]
    assert len(read) == len(set(read)) == len(shards.manifest().receipts) == 6
    assert list(planned(config).remaining(shards)) == [item]
    assert len([path for path in opened if path.is_relative_to(shards.shards_dir)]) == 6
    for receipt in shards.manifest().receipts:
        assert shards.keys(receipt) == shards.read(receipt).header.keys


@pytest.mark.parametrize("container", ["zarr", "tar"])
def test_a_header_that_was_altered_gives_no_keys(tmp_path: Path, micro_set: Path, container: str) -> None:
    """A key that is missing there would be harvested twice; one that is not its own, never."""
    shards = ShardSet.create(tmp_path / "set", ShardSet.open(micro_set).contract)
    first = ShardSet.open(micro_set).manifest().receipts[0]
    receipt = shards.commit_packed(ShardSet.open(micro_set).read(first).packed(), container)
    name = ".zarr/zarr.json" if container == "zarr" else ".idx"
    path = receipt.paths(shards.shards_dir)[name]
    text = path.read_text(encoding="utf-8")
    key = ShardSet.open(micro_set).keys(first)[0]
    path.write_text(text.replace(key, key[::-1]), encoding="utf-8")
    with pytest.raises(Corrupt, match=f"{name} is not what was written"):
        shards.keys(receipt)
    path.unlink()
    with pytest.raises(Corrupt, match="No such file"):
        shards.keys(receipt)


def test_no_prompt_that_is_cut_is_taken_for_a_short_one(tmp_path: Path, micro_wan: Path) -> None:
    """Of any plain text a tokenizer makes at most a token for each letter, and its marks."""
    rng, letters = random.Random(0), [chr(code) for code in range(32, 127)]
    texts = ["".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(2000)]
    texts += [" ", "A", "~" * 40, "a " * 30, "<0x41>", "</s>x"]
    for folder in (micro_wan, write_micro_sd(tmp_path / "sd")):
        resolved = resolve(folder, "auto")
        facts, count_tokens = facts_of(resolved), tokens_of(resolved)
        for limit in (5, 30):
            asked = Asked(facts=dataclasses.replace(facts, text_length=limit), count_tokens=count_tokens)
            doubtful = set(may_be_cut(texts, asked))  # type: ignore[arg-type]
            assert all(
                text in doubtful for text, count in zip(texts, count_tokens(texts), strict=True) if count > limit
            )
            assert set(texts) - doubtful
        assert may_be_cut(["日本"], asked) == ["日本"]  # type: ignore[arg-type]
