"""Foreign suites in their own formats, made up here, come out in one form; what is of another form is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unigrpo_cli.errors import UsageError
from unigrpo_cli.suites import SuiteRegistry
from unigrpo_cli.suites.readers import READERS, read_foreign


def _lines(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def _rows(name: str) -> list[dict]:
    found = read_foreign(name)
    assert found is not None
    return found[1]


def test_geneval_plus(tmp_path: Path) -> None:
    row = {"tag": "count", "include": [{"class": "cat", "count": 3}], "prompt": "three cats"}
    assert _rows(f"geneval++:{_lines(tmp_path / 'g.jsonl', row)}") == [row]


def test_geneval2_has_questions_with_skills(tmp_path: Path) -> None:
    row = {"prompt": "two cats", "atom_count": 2, "vqa_list": [["Are there cats?", "Yes"], ["How many?", "two"]]}
    path = _lines(tmp_path / "g.jsonl", row | {"skills": ["object", "count"]}, row)
    first, second = _rows(f"geneval2:{path}")
    assert first["tag"] == "2 atoms"
    assert first["questions"][1] == {"question": "How many?", "answer": "two", "skill": "count"}
    assert second["questions"][1]["skill"] == "all"


def test_a_list_in_one_json_file_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    path.write_text(json.dumps([{"prompt": "a cat", "vqa_list": [["A cat?", "yes"]]}]))
    assert len(_rows(f"geneval2:{path}")) == 1


def test_t2i_compbench_takes_its_category_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a red cat\n\na blue dog\n")
    (tmp_path / "shape_val.txt").write_text("a round box\n")
    (tmp_path / "color_train.txt").write_text("a green bus\n")
    assert [(r["tag"], r["prompt"]) for r in _rows(f"t2i-compbench:{tmp_path}")] == [
        ("color", "a red cat"),
        ("color", "a blue dog"),
        ("shape", "a round box"),
    ]
    assert _rows(f"t2i-compbench:{tmp_path / 'color_train.txt'}")[0]["tag"] == "color"


def test_dpg_with_and_without_its_table(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "7.txt").write_text("A long\nprompt. ")
    (row,) = _rows(f"dpg:{folder}")
    assert row == {"prompt": "A long prompt.", "tag": "dpg", "item": "7"}
    (tmp_path / "dpg.csv").write_text(
        "item_id,text,category_broad,question_natural_language\n7,x,entity,Is there a prompt?\n8,x,entity,No?\n"
    )
    (row,) = _rows(f"dpg:{folder}")
    assert row["questions"] == [{"question": "Is there a prompt?", "answer": "yes", "skill": "entity"}]


def test_parti_is_averaged_by_category(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\tChallenge\na cat\tAnimals\tBasic\n")
    assert _rows(f"parti:{tmp_path / 'p.tsv'}") == [{"prompt": "a cat", "tag": "Animals"}]


def test_a_tab_separated_table_has_no_quoting(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text(
        'Prompt\tCategory\n"Hello" painted on a wall\tWords\n"unclosed sign\tWords\na cat\tAnimals\na dog\tAnimals\n'
    )
    rows = _rows(f"parti:{tmp_path / 'p.tsv'}")
    assert [row["prompt"] for row in rows] == ['"Hello" painted on a wall', '"unclosed sign', "a cat", "a dog"]
    (tmp_path / "p.csv").write_text('Prompt,Category\n"a cat,\u2028 a dog\nand a bird",Animals\n')
    (row,) = _rows(f"parti:{tmp_path / 'p.csv'}")
    assert row == {"prompt": "a cat,\u2028 a dog\nand a bird", "tag": "Animals"}


def test_lines_of_other_readers_end_at_newlines_only(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a red\u2028cat\n\ufeffa blue dog\n\u200b\n")
    assert [r["prompt"] for r in _rows(f"t2i-compbench:{tmp_path}")] == ["a red\u2028cat", "a blue dog"]


@pytest.mark.parametrize(
    ("kind", "name", "content", "says"),
    [
        ("geneval++", "a.jsonl", '{"prompt": "x"}', r'a\.jsonl:1: needs "include"'),
        ("geneval2", "a.jsonl", '{"prompt": "x", "vqa_list": ["q"]}', r'a\.jsonl:1: needs "vqa_list"'),
        ("geneval2", "a.jsonl", '{"vqa_list": []}', 'needs an object with a text "prompt"'),
        ("geneval2", "a.jsonl", "not json", "not JSON"),
        ("geneval2", "a.jsonl", "", "holds no prompt"),
        ("t2i-compbench", "a.txt", "\n", "no prompts"),
        ("dpg", "a.txt", "x", "give the directory"),
        ("parti", "a.tsv", "Text\nx\n", r"a\.tsv:2: needs a column Prompt"),
        ("parti", "a.tsv", "", "holds no prompt"),
    ],
)
def test_another_form_is_one_line(tmp_path: Path, kind: str, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=says):
        read_foreign(f"{kind}:{tmp_path / name}")


def test_suites_are_asked_for_by_kind_and_path(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na cat\tWorld\n")
    prompts = SuiteRegistry().prompts(f"parti:{tmp_path / 'p.tsv'}")
    assert [p.metadata["tag"] for p in prompts] == ["Animals", "World"]
    assert prompts[0].id != prompts[1].id
    with pytest.raises(UsageError, match="no such file"):
        SuiteRegistry().prompts("dpg:/nowhere")
    with pytest.raises(UsageError, match=r"KIND:PATH, kinds being geneval\+\+"):
        SuiteRegistry().prompts("nothing")
    assert all(reader.licence for reader in READERS.values())
