"""A harvest of any number of workers, killed at any moments, ends as an undisturbed one does."""

import json
from pathlib import Path

import pytest

from tests.faults.harvests import digest
from tests.harvest.test_resume import as_file
from tests.made import command, harvest_config


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.full)])
def test_killed_at_random_moments_then_done_equals_an_undisturbed_set(
    tmp_path: Path, micro_wan: Path, micro_set: Path, kills: int
) -> None:
    """One worker, and three at once."""
    config = as_file(harvest_config(tmp_path / "set", micro_wan), tmp_path / "c.yaml")
    done = command("tests.faults.harvests", config, str(kills), "11", "1", "3", timeout=900)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert found["kills"] >= kills and set(found["ends"]) == {digest(micro_set)}
        assert found["in_the_middle"] > 0 or kills < 10, "the kills came too early or too late to mean anything"
    assert len(done.stdout.splitlines()) == 2


def test_ten_times_the_prompts_take_no_more_memory(tmp_path: Path, micro_wan: Path) -> None:
    """120 records of 0.8 MB: what kept them would show."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red cat number {number}" for number in range(120)))
    config = harvest_config(tmp_path / "set", micro_wan, height=256, width=256, steps=4, keep=4,
                            prompts={"file": prompts, "seeds_per_prompt": 1}, micro_batch=4)  # fmt: skip
    done = command("tests.faults.peak", as_file(config, tmp_path / "c.yaml"), "12", "120")
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout).values()
    assert many - few <= 20e6, f"{few / 1e6:.1f} MB for 12 prompts, {many / 1e6:.1f} MB for 120"
