"""Prompt files and suites."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from unigrpo_cli.errors import UsageError
from unigrpo_cli.suites import SuiteRegistry, as_prompts, read_prompts
from unigrpo_cli.suites.geneval import OFFICIAL_SHA256, geneval_file, geneval_rows


def test_geneval_is_regenerated_byte_for_byte() -> None:
    text = geneval_file()
    assert len(text.encode()) == 85_209
    assert hashlib.sha256(text.encode()).hexdigest() == OFFICIAL_SHA256


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
        ("a.csv", "x", "give `shapes`, a .txt file"),
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


def test_files_from_other_editors(tmp_path: Path) -> None:
    """A byte-order mark, Windows line ends, and a line separator inside a JSON string."""
    (tmp_path / "p.txt").write_bytes("\ufeffa red circle\r\na heart\r\n".encode())
    assert [p.text for p in read_prompts(tmp_path / "p.txt")] == ["a red circle", "a heart"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    assert [p.text for p in read_prompts(tmp_path / "p.jsonl")] == ["one\u2028two"]


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
