"""Prompt files and suites."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from unigrpo_cli.errors import UsageError
from unigrpo_cli.suites import SuiteRegistry, as_prompts, read_prompts
from unigrpo_cli.suites.geneval import geneval_rows


def test_geneval_is_regenerated_byte_for_byte() -> None:
    text = "".join(json.dumps(row) + "\n" for row in geneval_rows())
    official = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert hashlib.sha256(text.encode()).hexdigest() == official


def test_geneval_tasks() -> None:
    counts = Counter(row["tag"] for row in geneval_rows())
    assert counts == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }


def test_repeated_prompts_get_names_of_their_own() -> None:
    ids = [p.id for p in as_prompts([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "a"}])]
    assert ids == ["a", "b", "a#1", "a#2"]


def test_text_files_know_the_shapes_grammar(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("three red circles above a blue square\n\n  a cat  \n")
    first, second = read_prompts(path)
    assert first.metadata["tag"] == "position"
    assert second.text == "a cat"
    assert "include" not in second.metadata


def test_jsonl_keeps_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    row = {"prompt": "two cats", "include": [{"class": "cat", "count": 2}], "mine": [1, 2]}
    path.write_text(json.dumps(row) + "\n")
    assert read_prompts(path)[0].metadata == row


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "\n  \n", "holds no prompt"),
        ("a.jsonl", "", "holds no prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', r"a.jsonl:2: not JSON"),
        ("a.jsonl", '["x"]\n', r"a.jsonl:1: needs an object"),
        ("a.jsonl", '{"text": "x"}\n', 'text "prompt"'),
        ("a.jsonl", '{"prompt": "  "}\n', 'text "prompt"'),
        ("a.jsonl", '{"prompt": 3}\n', 'text "prompt"'),
        ("a.jsonl", '{"prompt": "x", "include": []}\n', "must be a list"),
        ("a.jsonl", '{"prompt": "x", "include": [{"class": "cat"}]}\n', r"include\[0\] needs"),
        (
            "a.jsonl",
            '{"prompt": "x", "include": [{"class": "cat", "count": 1, "position": ["near", 0]}]}\n',
            "position must be",
        ),
        ("a.xlsx", "x", "give `shapes`, `shapes-edit`"),
        ("a.csv", "Prompt,tag\na cat, a dog,x\n", "line 2 has 3 cells for 2 columns"),
        ("a.csv", 'Prompt\n"a cat\n', "not a table"),
        ("a.csv", "Text_\nx\n", "no column prompt, text or caption; it has Text_"),
    ],
)
def test_malformed_files_are_refused_with_their_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=says):
        read_prompts(path)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="not readable text"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(UsageError, match="no prompts file"):
        read_prompts(tmp_path / "none.txt")


def test_unknown_suites() -> None:
    with pytest.raises(UsageError, match="did you mean shapes"):
        SuiteRegistry().prompts("shape")


def test_a_plugin_may_add_a_suite_but_not_replace_one() -> None:
    suites = SuiteRegistry()
    suites.add("mine", lambda: [{"prompt": "x"}])
    assert suites.prompts("mine")[0].text == "x"
    with pytest.raises(UsageError, match="already"):
        suites.add("shapes", lambda: [])


BOM, ZWSP = "\ufeff", "\u200b"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", f"{BOM}a cat\r\na dog\r\n"),
        ("p.txt", f"a cat\n{BOM}a dog\n"),
        ("p.txt", f"a cat\n{BOM}{BOM} a dog{ZWSP}\n"),
        ("p.txt", f"a cat\n{ZWSP}\n \u2060\u3164 \n\u00a0a dog"),
        ("p.jsonl", f'{BOM}{{"prompt": "a cat"}}\r\n{BOM}{{"prompt": "a dog"}}\n'),
        ("p.jsonl", f'{{"prompt": "{BOM}a cat"}}\n{ZWSP}\n{{"prompt": "a dog\u2060"}}\n'),
        ("p.csv", f"{BOM}id,Prompt\r\n1,a cat\r\n2,{BOM}a dog\r\n"),
        ("p.tsv", "caption\tid\na cat\t1\na dog\n"),
    ],
)
def test_marks_and_invisible_characters_make_no_other_prompt(tmp_path: Path, name: str, content: str) -> None:
    """Byte-order marks of concatenated files, Windows line ends, lines that look empty."""
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["a cat", "a dog"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_carriage_returns_that_end_no_line_are_refused(tmp_path: Path, name: str) -> None:
    rows = ("a cat", "a dog\ra bird") if name == "p.txt" else ('{"prompt": "a cat"}', '{"prompt": "a dog"}\r{}')
    (tmp_path / name).write_text("\n".join(rows), newline="")
    with pytest.raises(UsageError, match=rf"{name}:2: it holds a carriage return"):
        read_prompts(tmp_path / name)


def test_characters_inside_a_prompt_stay(tmp_path: Path) -> None:
    """A line separator inside a JSON string, a joiner inside a word."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\u2028two \u200d three"}\n', encoding="utf-8")
    assert [p.text for p in read_prompts(tmp_path / "p.jsonl")] == ["one\u2028two \u200d three"]


def test_a_table_has_quotes_where_its_kind_has_them(tmp_path: Path) -> None:
    """Quotes in a comma-separated table may span lines; in a tab-separated one they are text."""
    (tmp_path / "p.csv").write_text('prompt,tag\n"a ""red"" cat,\nasleep",x\na dog,y\n')
    first, second = read_prompts(tmp_path / "p.csv")
    assert (first.text, first.metadata["tag"], second.text) == ('a "red" cat,\nasleep', "x", "a dog")
    (tmp_path / "p.tsv").write_text('prompt\ttag\n"Hello" on a wall\tx\n"unclosed\tx\na cat\ty\n')
    assert [p.text for p in read_prompts(tmp_path / "p.tsv")] == ['"Hello" on a wall', '"unclosed', "a cat"]
    (tmp_path / "bad.csv").write_text("prompt\n" + "\n".join(["a", " "]))
    with pytest.raises(UsageError, match=r'bad\.csv:3: needs an object with a text "prompt"'):
        read_prompts(tmp_path / "bad.csv")


def test_columns_of_a_table_are_metadata(tmp_path: Path) -> None:
    clause = '[{""class"": ""cat"", ""count"": 2}]'
    (tmp_path / "p.csv").write_text(f'Prompt,include,mine,image\ntwo cats,"{clause}",7,\n')
    (prompt,) = read_prompts(tmp_path / "p.csv")
    assert prompt.metadata == {"prompt": "two cats", "include": [{"class": "cat", "count": 2}], "mine": "7"}


def test_parquet_and_a_data_set_of_the_hub_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists and numbers of other columns stay, images are dropped without being decoded."""
    datasets = pytest.importorskip("datasets", reason='needs pip install "unigrpo-cli[datasets]"')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    import pyarrow.parquet

    columns = {
        "caption": ["two cats", "a dog\ufeff"],
        "include": [[{"class": "cat", "count": 2}], [{"class": "dog", "count": 1}]],
        "score": [0.5, 1.0],
        "image": [{"bytes": b"no picture", "path": None}] * 2,
    }
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    features = datasets.Features.from_arrow_schema(table.schema)
    features["image"] = datasets.Image()
    first, second = read_prompts(tmp_path / "p.parquet")
    assert first.metadata == {"prompt": "two cats", "include": [{"class": "cat", "count": 2}], "score": 0.5}
    assert (second.text, second.image) == ("a dog", None)
    asked = []
    local = datasets.load_dataset

    def load(name: str, **how: object) -> object:
        asked.append((name, how))
        return local("parquet", data_files=str(tmp_path / "p.parquet"), split="train", features=features)

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_prompts("hf:org/name")[0] == first
    assert len(read_prompts("hf:org/name:test[:10]:caption")) == 2
    assert asked == [("org/name", {"split": "train"}), ("org/name", {"split": "test[:10]"})]
    with pytest.raises(UsageError, match=r"hf:org/name:test:captoin: no column 'captoin'; did you mean caption"):
        read_prompts("hf:org/name:test:captoin")
    with pytest.raises(UsageError, match="write it as hf:ORG/NAME"):
        read_prompts("hf:")


def test_a_data_set_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=re.escape('pip install "unigrpo-cli[datasets]"')):
        read_prompts("hf:org/name")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"include": [{"class": "heart", "count": 1, "position": None}]}, "position"),
        ({"include": [{"class": "heart", "count": 1, "color": None}]}, "color"),
        ({"exclude": [{"class": "heart", "count": "two"}]}, "exclude"),
    ],
)
def test_malformed_clauses_are_found_on_reading(tmp_path: Path, row: dict, says: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a heart"} | row))
    with pytest.raises(UsageError, match=says):
        read_prompts(tmp_path / "p.jsonl")


def test_a_plugins_suite_is_checked() -> None:
    suites = SuiteRegistry()
    suites.add("empty", list)
    suites.add("odd", lambda: [{"text": "x"}])
    for name in ("empty", "odd"):
        with pytest.raises(UsageError, match="rows with a text `prompt`"):
            suites.prompts(name)
