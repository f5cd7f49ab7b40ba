"""Other people's suites, read from a path that the user gives: `--suite geneval2:/data/geneval2.jsonl`.

None is shipped: their licences differ, and each reader names its own. All come out in one form: rows with `prompt`,
a `tag` to average by, and what a reward may need (GenEval's clauses, or `questions` for a judge). A question is
{"question": text, "answer": text, "skill": text}.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.limits import parse_json, read_text, refuse_odd_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """A foreign suite's format. `read` raises UsageError, with file and line, on what is not of that format."""

    name: str
    summary: str
    licence: str
    read: Callable[[Path], list[Row]]


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise UsageError(f"{path} is not readable text ({error.strerror}); give the suite's own file") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _table(path: Path, separator: str = ",") -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a table, by the names in its first line."""
    try:
        rows = list(enumerate(csv.DictReader(_text(path).splitlines(), delimiter=separator), 2))
        for _, row in rows:
            refuse_odd_text(list(row.values()))
    except (csv.Error, ValueError) as error:
        raise UsageError(f"{path} is no table ({error}); give the suite's own file") from error
    return rows


def _objects(path: Path) -> list[tuple[int, Row]]:
    """Line numbers and objects of a .jsonl file, or those of a JSON list."""
    text = _text(path)
    try:
        if text.lstrip().startswith("["):
            rows = list(enumerate(parse_json(text), 1))
        else:
            rows = [(k, parse_json(line)) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
    except ValueError as error:
        raise UsageError(f"{path}: {error}; give the suite's own .jsonl or .json file") from error
    for number, row in rows:
        try:
            refuse_odd_text(row)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise UsageError(f'{path}:{number}: needs an object with a text "prompt"')
    if not rows:
        raise UsageError(f"{path} holds no prompt")
    return rows


def geneval_plus(path: Path) -> list[Row]:
    """GenEval++: GenEval's own form with three and more objects."""
    rows = []
    for number, row in _objects(path):
        if not isinstance(row.get("include"), list) or not row["include"]:
            raise UsageError(f'{path}:{number}: needs "include", a list of objects, as GenEval has it')
        rows.append(row)
    return rows


def geneval2(path: Path) -> list[Row]:
    """GenEval 2: `vqa_list` of [question, answer], `skills` beside it, `atom_count` to average by."""
    rows = []
    for number, row in _objects(path):
        asked = row.get("vqa_list")
        if not isinstance(asked, list) or not asked or not all(isinstance(q, list) and len(q) == 2 for q in asked):
            raise UsageError(f'{path}:{number}: needs "vqa_list", a list of [question, answer]')
        skills = row.get("skills") or []
        questions = [
            {"question": str(q), "answer": str(a), "skill": str(skills[k]) if k < len(skills) else "all"}
            for k, (q, a) in enumerate(asked)
        ]
        rows.append(
            {"prompt": row["prompt"], "tag": f"{row.get('atom_count', len(asked))} atoms", "questions": questions}
        )
    return rows


def t2i_compbench(path: Path) -> list[Row]:
    """T2I-CompBench: a prompt a line, a file per category (`color_val.txt`); a directory takes all `*_val.txt`."""
    files = sorted(path.glob("*_val.txt")) or sorted(path.glob("*.txt")) if path.is_dir() else [path]
    rows = []
    for file in files:
        tag = file.stem.removesuffix("_val").removesuffix("_train")
        rows += [{"prompt": line.strip(), "tag": tag} for line in _text(file).split("\n") if line.strip()]
    if not rows:
        raise UsageError(f"{path}: no prompts; give a category's .txt file, or the directory of them")
    return rows


def dpg(path: Path) -> list[Row]:
    """DPG-Bench: a directory of prompts, a .txt file each, and if it is there the .csv of questions on them."""
    if not path.is_dir():
        raise UsageError(f"{path}: give the directory that holds DPG-Bench's prompts, a .txt file each")
    files = sorted([*path.glob("*.txt"), *path.glob("prompts/*.txt")])
    if not files:
        raise UsageError(f"{path}: no .txt files in it")
    tables = sorted([*path.glob("*.csv"), *path.parent.glob("*.csv")])
    questions = _dpg_questions(tables[0]) if tables else {}
    rows: list[Row] = []
    for file in files:
        prompt = " ".join(_text(file).split())
        if not prompt:
            raise UsageError(f"{file} is empty")
        row: Row = {"prompt": prompt, "tag": "dpg", "item": file.stem}
        if file.stem in questions:
            row["questions"] = questions[file.stem]
        rows.append(row)
    return rows


def _dpg_questions(path: Path) -> dict[str, list[dict[str, str]]]:
    """Questions by prompt; each expects a yes."""
    found: dict[str, list[dict[str, str]]] = {}
    for number, row in _table(path):
        try:
            item, question = row["item_id"], row["question_natural_language"]
        except KeyError as error:
            raise UsageError(f"{path}:{number}: column {error} is missing; give DPG-Bench's own table") from error
        skill = row.get("category_broad") or "all"
        found.setdefault(item, []).append({"question": question, "answer": "yes", "skill": skill})
    return found


def parti(path: Path) -> list[Row]:
    """PartiPrompts: a table with Prompt, Category and Challenge, separated by tabs (or commas)."""
    separator = "\t" if path.suffix != ".csv" else ","
    rows = []
    for number, row in _table(path, separator):
        if not (row.get("Prompt") or "").strip():
            raise UsageError(f"{path}:{number}: needs a column Prompt; give PartiPrompts' .tsv file")
        rows.append({"prompt": row["Prompt"].strip(), "tag": row.get("Category") or "all"})
    if not rows:
        raise UsageError(f"{path} holds no prompt")
    return rows


READERS = {
    reader.name: reader
    for reader in (
        Reader("geneval++", "GenEval's form with three and more objects", "Apache-2.0", geneval_plus),
        Reader("geneval2", "800 prompts with questions for a judge", "CC BY-NC 4.0, not for commercial use", geneval2),
        Reader("t2i-compbench", "eight categories of compositions", "MIT", t2i_compbench),
        Reader("dpg", "1,065 long prompts, with questions for a judge", "Apache-2.0", dpg),
        Reader("parti", "1,600 prompts in categories (PartiPrompts)", "Apache-2.0", parti),
    )
}


def read_foreign(name: str) -> tuple[Reader, list[Row]] | None:
    """The reader and rows of `kind:path`, or None when `name` is not of that form.

    Raises:
        UsageError: when the path is missing or not of that kind.
    """
    kind, colon, where = name.partition(":")
    if not colon or kind not in READERS:
        return None
    path = Path(where).expanduser()
    if not path.exists():
        raise UsageError(f"suite {name}: no such file or directory {path}")
    return READERS[kind], READERS[kind].read(path)
