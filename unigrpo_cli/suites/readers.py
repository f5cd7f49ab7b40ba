"""Suites of other projects, read from a path: `--suite geneval2:/data/geneval2.jsonl`.

None is shipped: their licences differ, and each reader names its own. All give rows of one form: `prompt`, a `tag`
to average by, and what a reward may need (GenEval's clauses, or `questions` for a judge). A question is
{"question": text, "answer": text, "skill": text}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.limits import (
    parse_json,
    read_lines,
    read_text,
    refuse_odd_prompt,
    refuse_odd_text,
    trimmed,
)
from unigrpo_cli.suites.tables import Row, read_text_table


@dataclass(frozen=True)
class Reader:
    """The format of a suite. `read` raises UsageError with file and line on another format."""

    name: str
    summary: str
    licence: str
    read: Callable[[Path], list[Row]]


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        return list(read_lines(path))
    except OSError as error:
        raise UsageError(f"{path} is not readable text ({error.strerror}); give the suite's own file") from error


def _objects(path: Path) -> list[tuple[int, Row]]:
    """Line numbers and objects of a .jsonl file, or positions and objects of a JSON list."""
    try:
        text = read_text(path)
        listed = trimmed(text).startswith("[")
        rows = list(enumerate(parse_json(text), 1)) if listed else _objects_by_line(path)
    except OSError as error:
        raise UsageError(f"{path} is not readable text ({error.strerror}); give the suite's own file") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}; give the suite's own .jsonl or .json file") from error
    for number, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not trimmed(row["prompt"]):
            raise UsageError(f'{path}:{number}: needs an object with a text "prompt"')
        row["prompt"] = trimmed(row["prompt"])
        _refuse_odd(f"{path}:{number}", row["prompt"], row)
    if not rows:
        raise UsageError(f"{path} holds no prompt")
    return rows


def _objects_by_line(path: Path) -> list[tuple[int, Any]]:
    rows = []
    for number, line in _lines(path):
        try:
            rows.append((number, parse_json(line)))
        except ValueError as error:
            raise UsageError(f"{path}:{number}: {error}; give the suite's own .jsonl or .json file") from error
    return rows


def _refuse_odd(place: str, prompt: str, rest: Any = None) -> str:
    """The prompt, if it and the rest of its row can be used."""
    try:
        refuse_odd_prompt(prompt)
        refuse_odd_text(rest)
    except ValueError as error:
        raise UsageError(f"{place}: {error}") from error
    return prompt


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
        rows += [{"prompt": _refuse_odd(f"{file}:{number}", line), "tag": tag} for number, line in _lines(file)]
    if not rows:
        raise UsageError(f"{path}: no prompts; give a category's .txt file, or the directory of them")
    return rows


def dpg(path: Path) -> list[Row]:
    """DPG-Bench: a directory of prompts, a .txt file each, and optionally a .csv of questions on them."""
    if not path.is_dir():
        raise UsageError(f"{path}: give the directory that holds DPG-Bench's prompts, a .txt file each")
    files = sorted([*path.glob("*.txt"), *path.glob("prompts/*.txt")])
    if not files:
        raise UsageError(f"{path}: no .txt files in it")
    tables = sorted([*path.glob("*.csv"), *path.parent.glob("*.csv")])
    questions = _dpg_questions(tables[0]) if tables else {}
    rows: list[Row] = []
    for file in files:
        prompt = " ".join(" ".join(line.split()) for _, line in _lines(file))
        row: Row = {"prompt": _refuse_odd(str(file), prompt), "tag": "dpg", "item": file.stem}
        if file.stem in questions:
            row["questions"] = questions[file.stem]
        rows.append(row)
    return rows


def _dpg_questions(path: Path) -> dict[str, list[dict[str, str]]]:
    """Questions by prompt; the expected answer is yes."""
    found: dict[str, list[dict[str, str]]] = {}
    for number, row in read_text_table(path, ","):
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
    for number, row in read_text_table(path, separator):
        prompt = trimmed(row.get("Prompt") or "")
        if not prompt:
            raise UsageError(f"{path}:{number}: needs a column Prompt; give PartiPrompts' .tsv file")
        _refuse_odd(f"{path}:{number}", prompt, row)
        rows.append({"prompt": prompt, "tag": row.get("Category") or "all"})
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
    """The reader and rows of `kind:path`, or None when `name` is not of that form."""
    kind, colon, where = name.partition(":")
    if not colon or kind not in READERS:
        return None
    path = Path(where).expanduser()
    if not path.exists():
        raise UsageError(f"suite {name}: no such file or directory {path}")
    return READERS[kind], READERS[kind].read(path)
