"""Prompt files: one prompt per line, JSON objects, tables; and the tenth of them that is held out."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.limits import parse_json, read_lines, refuse_odd_prompt, refuse_odd_text, trimmed
from unigrpo_cli.suites.tables import HUB, read_prompt_table
from unigrpo_cli.toy.edits import train_edits
from unigrpo_cli.toy.prompts import parse_prompt, train_prompts
from unigrpo_cli.toy.restores import train_restores

SHAPES, SHAPES_EDIT, SHAPES_RESTORE = "shapes", "shapes-edit", "shapes-restore"
TRAINING = {SHAPES: train_prompts, SHAPES_EDIT: train_edits, SHAPES_RESTORE: train_restores}
"""Training splits of the shapes world, each by the name of its suite."""
HELD_OUT = "held-out:"
FEWEST_TO_SPLIT = 20
LINES, TABLES = (".txt", ".jsonl"), (".csv", ".tsv", ".parquet")
ACCEPTED = (
    "`shapes`, `shapes-edit`, `shapes-restore`, a .txt file (one prompt per line), a .jsonl, .csv, .tsv or .parquet "
    "file, or hf:ORG/NAME"
)


def training_prompts(source: str, suite: str = SHAPES) -> list[Prompt]:
    """The prompts to train on; without the held-out tenth when that is the suite."""
    prompts = as_prompts(TRAINING[source]()) if source in TRAINING else read_prompts(source)
    return split(prompts)[0] if suite == HELD_OUT + source else prompts


def default_suite(source: str) -> str:
    """What `eval.suite=auto` is for these training prompts: their suite, their held-out tenth, or all of too few."""
    if source in TRAINING:
        return source
    return HELD_OUT + source if split(read_prompts(source))[1] else source


def split(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and a tenth that is held out: the texts with the smallest hashes, whatever their order.

    Equal texts stay together. Fewer than FEWEST_TO_SPLIT texts are not split.
    """
    texts = sorted({prompt.text for prompt in prompts}, key=lambda text: hashlib.sha256(text.encode()).digest())
    chosen = set(texts[: len(texts) // 10]) if len(texts) >= FEWEST_TO_SPLIT else set()
    held_out = [prompt for prompt in prompts if prompt.text in chosen]
    return [prompt for prompt in prompts if prompt.text not in chosen], held_out


def as_prompts(rows: Sequence[dict[str, Any]]) -> list[Prompt]:
    """Prompts from metadata rows; ids are the texts (without one, the task), numbered where they repeat.

    A picture given as pixels is no metadata: that is written to files.
    """
    seen: Counter[str] = Counter()
    taken: set[str] = set()  # a text may also look like a numbered id
    prompts = []
    for row in rows:
        name, image = row["prompt"] or row.get("tag", ""), row.get("image")
        while (own := f"{name}#{seen[name]}" if seen[name] else name) in taken:
            seen[name] += 1
        taken.add(own)
        metadata = {k: v for k, v in row.items() if k != "image"} if isinstance(image, np.ndarray) else row
        prompts.append(Prompt(own, row["prompt"], metadata, tuple(image) if isinstance(image, list) else image))
    return prompts


def typed_prompt(text: str) -> dict[str, Any]:
    """Metadata of a typed prompt: GenEval's clauses where the text follows the shapes grammar."""
    return parse_prompt(text) or {"prompt": text}


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts from a file or a data set of the hub. All but `prompt` of an object or a table row is metadata.

    `image` in an object is an image file to start from, or a list of them, relative to the prompts file.
    """
    source = str(source)
    path = Path(source)
    try:
        if source.startswith(HUB) or path.suffix in TABLES:
            rows = [_checked(place, path, row) for place, row in read_prompt_table(source)]
        elif path.suffix in LINES:
            read = _line if path.suffix == ".txt" else _object
            rows = [read(path, number, line) for number, line in read_lines(path)]
        else:
            raise UsageError(f"prompts {source}: give {ACCEPTED}")
    except FileNotFoundError as error:
        raise UsageError(f"no prompts file {source}: give {ACCEPTED}") from error
    except OSError as error:
        raise UsageError(f"prompts file {source} is not readable text: {error.strerror}; give a file") from error
    if not rows:
        raise UsageError(f"prompts file {source} holds no prompt")
    return as_prompts(rows)


def _line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        refuse_odd_prompt(line)
    except ValueError as error:
        raise UsageError(f"{path}:{number}: {error}") from error
    return typed_prompt(line)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{path}:{number}: {error}; each line is one object") from error
    return _checked(f"{path}:{number}", path, row)


def _checked(place: str, path: Path, row: Any) -> dict[str, Any]:
    """A row with its prompt, image and clauses checked before a reward gets them."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not trimmed(row["prompt"]):
        raise UsageError(f'{place}: needs an object with a text "prompt", e.g. {{"prompt": "a cat"}}')
    row["prompt"] = trimmed(row["prompt"])
    try:
        refuse_odd_prompt(row["prompt"])
        refuse_odd_text(row)
    except ValueError as error:
        raise UsageError(f"{place}: {error}") from error
    image = row.get("image")
    if image is not None:
        names = image if isinstance(image, list) and image else [image]
        for name in names:
            if not isinstance(name, str) or not os.path.isfile(path.parent / name):
                raise UsageError(f"{place}: image {name!r} is not a file next to {path}")
        found = [str((path.parent / name).resolve()) for name in names]
        row["image"] = found if len(found) > 1 else found[0]
    if "include" not in row:
        row = typed_prompt(row["prompt"]) | row
    if "include" in row or "exclude" in row:
        _check_clauses(place, row)
    return row


def _check_clauses(place: str, row: dict[str, Any]) -> None:
    for kind in ("include", "exclude"):
        items = row.get(kind, [])
        if not isinstance(items, list) or (kind == "include" and not items):
            raise UsageError(f"{place}: {kind!r} must be a list of objects with class and count")
        for index, item in enumerate(items):
            good = (
                isinstance(item, dict)
                and isinstance(item.get("class"), str)
                and type(item.get("count")) is int
                and item["count"] >= 1
            )
            if not good:
                raise UsageError(f'{place}: {kind}[{index}] needs "class" (text) and "count" (1 or more)')
            if not isinstance(item.get("color", ""), str):
                raise UsageError(f"{place}: {kind}[{index}].color must be text")
            position = item.get("position")
            if "position" in item and not (
                isinstance(position, list)
                and len(position) == 2
                and position[0] in ("left of", "right of", "above", "below")
                and type(position[1]) is int
                and 0 <= position[1] < index
            ):
                raise UsageError(
                    f'{place}: {kind}[{index}].position must be ["left of|right of|above|below", an earlier index]'
                )
