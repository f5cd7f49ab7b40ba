"""Prompts to train on and suites to evaluate on: names, files, and what is in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import UsageError, suggest
from unigrpo_cli.io.limits import LineError, parse_json, read_lines, refuse_odd_text
from unigrpo_cli.suites.geneval import geneval_rows
from unigrpo_cli.suites.readers import READERS, read_foreign
from unigrpo_cli.toy.prompts import held_out_prompts, parse_prompt, train_prompts

TASKLESS = "all"


@dataclass(frozen=True)
class Suite:
    """A named list of prompts; `load` gives rows of metadata with at least a `prompt` each."""

    name: str
    summary: str
    load: Callable[[], list[dict[str, Any]]]


class SuiteRegistry:
    """Suites by name. Plugins add theirs through `unigrpo_register_suites`."""

    def __init__(self) -> None:
        self.suites: dict[str, Suite] = {}
        self.add("shapes", held_out_prompts, summary="240 held-out prompts of the shapes world, six tasks")
        self.add("geneval", geneval_rows, summary="GenEval's 553 prompts, regenerated")

    def add(self, name: str, load: Callable[[], list[dict[str, Any]]], *, summary: str = "") -> None:
        """Add a suite under a new name."""
        if name in self.suites:
            raise UsageError(f"there is a suite {name!r} already; choose another name")
        self.suites[name] = Suite(name, summary, load)

    def prompts(self, name: str) -> list[Prompt]:
        """Prompts of a suite by name, or of a file by path.

        Raises:
            UsageError: when it is neither.
        """
        if name in self.suites:
            rows = self.suites[name].load()
            if not rows or not all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows):
                raise UsageError(f"suite {name!r} must give rows with a text `prompt` each, and at least one")
            return as_prompts(rows)
        foreign = read_foreign(name)
        if foreign is not None:
            return as_prompts(foreign[1])
        if Path(name).suffix in (".txt", ".jsonl"):
            return read_prompts(Path(name))
        raise UsageError(
            f"unknown suite {name!r}: {suggest(name, self.suites)} (or a .txt or .jsonl file, or KIND:PATH, kinds "
            f"being {', '.join(READERS)})"
        )


def training_prompts(name: str) -> list[Prompt]:
    """The shapes world's training prompts, or those of a file."""
    return as_prompts(train_prompts()) if name == "shapes" else read_prompts(Path(name))


def as_prompts(rows: Sequence[dict[str, Any]]) -> list[Prompt]:
    """Prompts from metadata rows; ids are the texts, numbered where a text comes again."""
    seen: Counter[str] = Counter()
    taken: set[str] = set()  # a list may also spell such a number out
    prompts = []
    for row in rows:
        text = row["prompt"]
        while (own := f"{text}#{seen[text]}" if seen[text] else text) in taken:
            seen[text] += 1
        taken.add(own)
        prompts.append(Prompt(own, text, row, row.get("image")))
    return prompts


def typed_prompt(text: str) -> dict[str, Any]:
    """Metadata of a prompt that somebody typed: GenEval's clauses where the text is in the shapes grammar."""
    return parse_prompt(text) or {"prompt": text}


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a .txt file (one a line) or a .jsonl file (objects with `prompt`, kept as metadata).

    `image` in an object is the file of a picture to start from, relative to the prompts' own file.

    Raises:
        UsageError: when the file is missing, empty, of another kind, or a row is malformed (with its line).
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"prompts {path}: give `shapes`, a .txt file (a prompt a line) or a .jsonl file")
    try:
        lines = [(number, line) for number, line in read_lines(path) if line.strip()]
    except FileNotFoundError as error:
        raise UsageError(f"no prompts file {path}: give `shapes`, a .txt file or a .jsonl file") from error
    except OSError as error:
        raise UsageError(f"prompts file {path} is not readable text: {error.strerror}; give a file") from error
    except LineError as error:
        raise UsageError(f"{path}:{error.number}: {error}") from error
    rows = [_typed(path, *line) if path.suffix == ".txt" else _row(path, *line) for line in lines]
    if not rows:
        raise UsageError(f"prompts file {path} holds no prompt")
    return as_prompts(rows)


def _typed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        refuse_odd_text(line)
    except ValueError as error:
        raise UsageError(f"{path}:{number}: {error}") from error
    return typed_prompt(line.strip())


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
        refuse_odd_text(row)
    except ValueError as error:
        raise UsageError(f"{path}:{number}: {error}; each line is one object") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UsageError(f'{path}:{number}: needs an object with a text "prompt", e.g. {{"prompt": "a cat"}}')
    image = row.get("image")
    if image is not None:
        if not isinstance(image, str) or not os.path.isfile(path.parent / image):
            raise UsageError(f"{path}:{number}: image {image!r} is no file beside {path}")
        row["image"] = str((path.parent / image).resolve())
    if "include" not in row:
        row = typed_prompt(row["prompt"]) | row
    if "include" in row or "exclude" in row:
        _check_clauses(f"{path}:{number}", row)
    return row


def _check_clauses(where: str, row: dict[str, Any]) -> None:
    """GenEval's clauses in a row, malformed ones found before they reach a reward."""
    for kind in ("include", "exclude"):
        items = row.get(kind, [])
        if not isinstance(items, list) or (kind == "include" and not items):
            raise UsageError(f"{where}: {kind!r} must be a list of objects with class and count")
        for index, item in enumerate(items):
            good = (
                isinstance(item, dict)
                and isinstance(item.get("class"), str)
                and type(item.get("count")) is int
                and item["count"] >= 1
            )
            if not good:
                raise UsageError(f'{where}: {kind}[{index}] needs "class" (text) and "count" (1 or more)')
            if not isinstance(item.get("color", ""), str):
                raise UsageError(f"{where}: {kind}[{index}].color must be text")
            position = item.get("position")
            if "position" in item and not (
                isinstance(position, list)
                and len(position) == 2
                and position[0] in ("left of", "right of", "above", "below")
                and type(position[1]) is int
                and 0 <= position[1] < index
            ):
                raise UsageError(
                    f'{where}: {kind}[{index}].position must be ["left of|right of|above|below", an earlier index]'
                )


def task_of(prompt: Prompt) -> str:
    """The task a prompt belongs to, for per-task scores."""
    return str(prompt.metadata.get("tag", TASKLESS))
