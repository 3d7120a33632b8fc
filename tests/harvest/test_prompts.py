"""Prompt files as people have them, and what is said of those that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.cleaning import clean_prompt
from common.errors import BadUsage
from harvest.prompts import Wish, read_prompts, seed_of
from tests.made import harvest_config, planned


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_cleaning_is_stock_wans() -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in [
        "  a  red\tcat ",
        "caf\u0065\u0301 &amp;amp; more",
        "schÃ¶n",
        "&lt;b&gt; x",
        "日本の 庭\u3000園",
        "“quoted”",
    ]:
        assert clean_prompt(text) == prompt_clean(text)


def test_lines_are_cleaned_merged_and_kept_in_order(tmp_path: Path) -> None:
    wishes, summary = read_prompts(written(tmp_path / "p.txt", "\ufeffa  cat\n\na dog\na cat \n日本\n"))
    assert [wish.prompt for wish in wishes] == ["a cat", "a dog", "日本"]
    assert "3 prompts" in summary and "1 duplicates merged" in summary
    assert len(read_prompts(tmp_path / "p.txt", limit=2)[0]) == 2


ROWS: list[dict[str, Any]] = [
    {"prompt": "a, cat", "seed": 7, "width": 128, "height": 64},
    {"prompt": "a dog"},
    {"prompt": "a dog", "seed": 1},
]
WISHES = [Wish(prompt="a, cat", seed=7, width=128, height=64), Wish(prompt="a dog"), Wish(prompt="a dog", seed=1)]


def test_jsonl_csv_and_parquet_say_the_same(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    assert read_prompts(written(tmp_path / "p.jsonl", lines + "\n\n"))[0] == WISHES
    table = 'seed,prompt,width,height,theme\n7,"a, cat",128,64,x\n,a dog,,,y\n1,a dog,,,\n'
    assert read_prompts(written(tmp_path / "p.csv", table))[0] == WISHES
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet")[0] == WISHES


@pytest.mark.parametrize(("name", "text", "what"), [
    ("p.txt", "", "holds no prompt"), ("p.txt", " \n\t\n", "holds no prompt"),
    ("p.txt", b"fine\nbad \xff\n", r"byte 0xff in line 2"), ("p.jsonl", '{"prompt": "a"}\n{', "line 2 is not JSON"),
    ("p.jsonl", '{"text": "a"}', "has no prompt"), ("p.csv", "text\na\n", "line 2 has no prompt"),
    ("p.jsonl", '{"prompt": "a", "seed": "x"}', "whole numbers"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str | bytes, what: str) -> None:
    with pytest.raises(BadUsage, match=what):
        read_prompts(written(tmp_path / name, text))
    with pytest.raises(BadUsage, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")


def test_sizes_go_into_items_of_their_own(tmp_path: Path, micro_wan: Path) -> None:
    rows = [{"prompt": f"p{n}", "width": 64 if n % 2 else 128, "height": 64} for n in range(10)]
    prompts = written(tmp_path / "p.jsonl", "\n".join(json.dumps(row) for row in rows))
    config = harvest_config(tmp_path / "set", micro_wan, prompts={"file": prompts, "seeds_per_prompt": 1})
    plan = planned(config)
    assert sorted((item.width, len(item.questions)) for item in plan.items) == [(64, 1), (64, 4), (128, 1), (128, 4)]
    written(prompts, json.dumps({"prompt": "p", "width": 72, "height": 64}))
    with pytest.raises(BadUsage, match="take 64 or 80"):
        planned(config)


def test_seeds_belong_to_prompts(tmp_path: Path, micro_wan: Path) -> None:
    assert seed_of("a", 0) != seed_of("b", 0) != seed_of("b", 1) and 0 <= seed_of("a", 0) < 2**63
    rows = [{"prompt": "a", "seed": 3}, {"prompt": "a"}, {"prompt": "a", "seed": 3, "height": 64, "width": 64}]
    prompts = written(tmp_path / "p.jsonl", "\n".join(json.dumps(row) for row in rows))
    plan = planned(harvest_config(tmp_path / "set", micro_wan, prompts={"file": prompts, "seeds_per_prompt": 2}))
    assert [question.seed for item in plan.items for question in item.questions] == [
        3,
        seed_of("a", 0),
        seed_of("a", 1),
    ]


def test_remarks_are_no_prompts(tmp_path: Path) -> None:
    wishes, _ = read_prompts(written(tmp_path / "p.txt", "# a theme\na cat\n#1 fan of dogs\n"))
    assert [wish.prompt for wish in wishes] == ["a cat", "#1 fan of dogs"]
    ours, _ = read_prompts(Path("configs/prompts/static.txt"))
    assert len(ours) == 200 and not any(wish.prompt.startswith("# ") for wish in ours)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    """Unicode has other separators, and captions from the web have them all; a quoted cell may hold a line feed."""
    assert [w.prompt for w in read_prompts(written(tmp_path / "p.txt", "a cat\u2028 asleep\r\nb\n"))[0]] == [
        "a cat asleep",
        "b",
    ]
    jsonl = json.dumps({"prompt": "a\u2028dog"}, ensure_ascii=False)
    assert [w.prompt for w in read_prompts(written(tmp_path / "p.jsonl", jsonl))[0]] == ["a dog"]
    cell = 'prompt,seed\n"a cat\nsits",3\n'
    assert read_prompts(written(tmp_path / "p.csv", cell))[0] == [Wish(prompt="a cat sits", seed=3)]
    with pytest.raises(BadUsage, match="whole numbers"):
        read_prompts(written(tmp_path / "q.jsonl", json.dumps({"prompt": "a", "seed": 2**64})))
