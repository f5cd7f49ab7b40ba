"""Prompts to train on and suites to evaluate on: by name, from files, and from plugins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import UsageError, suggest
from unigrpo_cli.suites.geneval import geneval_rows
from unigrpo_cli.suites.prompts import (
    HELD_OUT,
    LINES,
    SHAPES,
    SHAPES_EDIT,
    SHAPES_RESTORE,
    TABLES,
    as_prompts,
    default_suite,
    read_prompts,
    split,
    training_prompts,
    typed_prompt,
)
from unigrpo_cli.suites.readers import READERS, read_foreign
from unigrpo_cli.suites.tables import HUB
from unigrpo_cli.toy.edits import held_out_edits
from unigrpo_cli.toy.prompts import held_out_hard_prompts, held_out_prompts
from unigrpo_cli.toy.restores import held_out_restores

__all__ = [
    "SHAPES",
    "SHAPES_EDIT",
    "SHAPES_RESTORE",
    "Suite",
    "SuiteRegistry",
    "as_prompts",
    "default_suite",
    "read_prompts",
    "split",
    "task_of",
    "training_prompts",
    "typed_prompt",
]

NO_TASK = "all"


@dataclass(frozen=True)
class Suite:
    """A named list of prompts; `load` gives rows of metadata with at least a `prompt` each.

    `image` of a row is a source picture: a file, or pixels, uint8 [h, w, 3].
    """

    name: str
    summary: str
    load: Callable[[], list[dict[str, Any]]]


class SuiteRegistry:
    """Suites by name. Plugins add theirs through `unigrpo_register_suites`."""

    def __init__(self) -> None:
        self.suites: dict[str, Suite] = {}
        self.add(SHAPES, held_out_prompts, summary="240 held-out prompts of the shapes world, six tasks")
        self.add("shapes-reflect", held_out_hard_prompts, summary="240 of them about several things, four tasks")
        self.add(SHAPES_EDIT, held_out_edits, summary="200 held-out edits of pictures of shapes, five kinds")
        self.add(SHAPES_RESTORE, held_out_restores, summary="200 degraded pictures of shapes, four faults")
        self.add("geneval", geneval_rows, summary="GenEval's 553 prompts, regenerated")

    def add(self, name: str, load: Callable[[], list[dict[str, Any]]], *, summary: str = "") -> None:
        if name in self.suites:
            raise UsageError(f"there is a suite {name!r} already; choose another name")
        self.suites[name] = Suite(name, summary, load)

    def prompts(self, name: str) -> list[Prompt]:
        """Prompts of a suite by name, of a file by path, or the held-out tenth of a file."""
        if name in self.suites:
            rows = self.suites[name].load()
            if not rows or not all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows):
                raise UsageError(f"suite {name!r} must give rows with a text `prompt` each, and at least one")
            return as_prompts(rows)
        if name.startswith(HELD_OUT):
            held_out = split(read_prompts(name.removeprefix(HELD_OUT)))[1]
            if not held_out:
                raise UsageError(f"suite {name}: too few prompts to hold some out; give a file of prompts")
            return held_out
        foreign = read_foreign(name)
        if foreign is not None:
            return as_prompts(foreign[1])
        if Path(name).suffix in LINES + TABLES or name.startswith(HUB):
            return read_prompts(name)
        raise UsageError(
            f"unknown suite {name!r}: {suggest(name, self.suites)} (or a .txt or .jsonl file, or KIND:PATH, kinds "
            f"being {', '.join(READERS)})"
        )


def task_of(prompt: Prompt) -> str:
    """The task a prompt belongs to, for per-task scores."""
    return str(prompt.metadata.get("tag", NO_TASK))
