"""Prompt files as people have them, and what is said of those that cannot be used."""

import html
import json
import random
import re
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


REFUSED = [
    ("p.json", '[\n {"prompt": "a cat"}\n]\n', r"suffix \.json; do: give one of \.txt, \.jsonl"),
    ("p.tsv", "prompt\tseed\na cat\t1\n", r"suffix \.tsv"),
    (
        "p.csv",
        "prompt\na dog\na red cat, sleeping on a sofa\n",
        "line 3 has 2 cells for 1 columns.*put quotes round it",
    ),
    ("p.csv", 'prompt,seed\n"a bird,1\na fish,2\na "big" cat,4\n', "line 4 is not CSV"),
    ("p.csv", 'prompt\n"a bird\na fish\na cow\n', "line 4 is not CSV; found: unexpected end of data"),
    ("p.csv", 'prompt\n"' + "a " * 70_000 + '"\n', "line 2 is not CSV; found: field larger"),
    ("p.csv", "prompt;seed\na cat;7\n", "line 2 has no prompt"),
    ("p.jsonl", '{"prompt": "a", "seed": 1.9}', "whole numbers"),
    ("p.jsonl", '{"prompt": "a", "seed": true}', "whole numbers"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "width": 512.7}', "line 2: .*whole numbers"),
    ("p.jsonl", '{"prompt": "a", "width": 0}', "sizes from 1 on"),
    ("p.csv", "prompt,height\na,-64\n", "line 2: .*sizes from 1 on"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "Seed": 5}', "line 2: unknown column 'Seed'.*call it seed"),
    ("p.csv", "Prompt\na cat\n", "unknown column 'Prompt'.*call it prompt"),
    ("p.jsonl", '{"prompt": "a", "negative_prompt": "b"}', "one for the whole set"),
]


@pytest.mark.parametrize(("name", "text", "what"), REFUSED)
def test_nothing_is_guessed_of_a_row_that_is_not_understood(tmp_path: Path, name: str, text: str, what: str) -> None:
    """Each of these once became prompts that nobody wrote, or lost seeds and sizes in silence."""
    with pytest.raises(BadUsage, match=what):
        read_prompts(written(tmp_path / name, text))


def test_a_suffix_in_capitals_a_space_in_a_header_and_null_are_as_meant(tmp_path: Path) -> None:
    lines = '{"prompt": "a cat", "seed": null, "width": 512.0}\n'
    for name in ("p.JSONL", "p.ndjson"):
        assert read_prompts(written(tmp_path / name, lines))[0] == [Wish(prompt="a cat", width=512)]
    table = ',prompt, seed, width\n0,"a cat, asleep", 7, \n1,a "big" dog\n'
    wishes = [Wish(prompt="a cat, asleep", seed=7), Wish(prompt='a "big" dog')]
    assert read_prompts(written(tmp_path / "p.CSV", table)) == (wishes, f"2 prompts from {tmp_path / 'p.CSV'}")


def test_what_is_left_out_is_told_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "theme": "x", "heigth": 64}, {"prompt": " "}, {"prompt": "", "theme": "y"}]
    _, told = read_prompts(written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert told.endswith(", 2 empty ones left out, not read: theme, heigth (did you mean height?)")
    assert read_prompts(written(tmp_path / "p.txt", "a\n\n  \n"))[1].endswith(
        "1 prompts from " + str(tmp_path / "p.txt")
    )


def test_a_size_that_does_not_divide_is_told_with_its_prompt(tmp_path: Path, micro_wan: Path) -> None:
    prompts = written(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": "a red cat", "width": 72}')
    with pytest.raises(BadUsage, match="width of prompt 'a red cat' does not divide by 16"):
        planned(harvest_config(tmp_path / "set", micro_wan, prompts={"file": prompts}))


def test_plain_ascii_is_cleaned_as_everything_else_is() -> None:
    """The short way and the long way (ftfy, entities, white space) agree on whatever the short way takes."""
    import ftfy

    rng = random.Random(0)
    letters = [chr(code) for code in range(128)]
    pieces = [*letters, "&amp;", "&lt;", "lt;", "<b>", "\\u00e9", "``", "''", "--", "  ", "\x1b[31m", "=C3=A9"]
    for alphabet, longest in ((letters[32:127], 40), (letters, 12), (pieces, 8)):
        for _ in range(3000):
            text = "".join(rng.choices(alphabet, k=rng.randrange(longest)))
            long_way = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip()
            assert clean_prompt(text) == long_way, repr(text)
