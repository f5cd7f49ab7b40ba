"""What was measured, what was not and why, beside the goals; on the screen, as JSON and as Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import GIB, NotMeasuredError
from unigrpo_cli.errors import TooLargeError

NOT_REACHED = "not reached"
LIBRARIES = ("torch", "numpy", "transformers", "diffusers", "accelerate")


def environment() -> dict[str, Any]:
    """What any number depends on: machine, threads, libraries, commit, date. No name of a machine."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: torch.__version__ if name == "torch" else _installed(name) for name in LIBRARIES},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def _installed(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def commit() -> str:
    """The commit of this clone, marked when files differ from it."""
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Goal:
    """A number that a measurement is to stay under, or over."""

    limit: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One number. Without a value, `note` says why there is none."""

    part: str
    name: str
    unit: str
    goal: Goal | None = None
    value: float | None = None
    note: str = NOT_REACHED

    def json(self) -> dict[str, Any]:
        known = asdict(self) | {"goal": None if self.goal is None else str(self.goal)}
        if self.goal is not None and self.value is not None:
            known["met"] = self.goal.met(self.value)
        return known

    def markdown(self) -> str:
        """A line of a table: part, what, value, goal, remark."""
        value = "" if self.value is None else f"{number(self.value)} {self.unit}"
        goal = ""
        if self.goal is not None:
            verdict = "" if self.value is None else (" met" if self.goal.met(self.value) else " missed")
            goal = f"{self.goal}{verdict}"
        return f"| {self.part} | {self.name} | {value} | {goal} | {self.note} |"


def number(value: float) -> str:
    """Three digits, no exponent where none is needed."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-3 else f"{value:.2e}"


class Report:
    """Rows that are expected, filled as they are measured. Written after each, so that a killed run leaves them."""

    head = ("| part | | value | goal | |", "|---|---|---|---|---|")

    def __init__(self, setting: dict[str, Any], rows: Sequence[Row], path: Path | None):
        self.setting, self.path = setting, path
        self.rows = {(row.part, row.name): row for row in rows}
        print("\n".join([self.line_of_settings(), "", *self.head]), flush=True)

    def add(self, part: str, name: str, value: float, note: str = "") -> float:
        """Fill a row.

        Raises:
            ValueError: when the number is none that can be true.
        """
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{part}, {name}: measured {value}")
        self._put(replace(self.rows[part, name], value=float(value), note=note))
        return value

    def value(self, part: str, name: str) -> float | None:
        """A number measured earlier, or None."""
        return self.rows[part, name].value

    def _put(self, row: Row) -> None:
        self.rows[row.part, row.name] = row
        print(row.markdown(), flush=True)
        self.write()

    @contextmanager
    def attempt(self, parts: Sequence[str]) -> Iterator[None]:
        """Go on after what does not fit into memory or time: its rows say so. Other errors pass."""
        reason = None
        try:
            yield
        except (torch.OutOfMemoryError, TooLargeError) as error:
            reason = f"did not fit: needs {needed_gib(str(error)):.1f} GiB"
        except NotMeasuredError as error:
            reason = str(error)
        if reason is not None:
            for row in [r for r in self.rows.values() if r.part in parts and r.value is None]:
                self._put(replace(row, note=reason))

    def json(self) -> dict[str, Any]:
        rows = self.rows.values()
        missing = [{"part": r.part, "name": r.name, "reason": r.note} for r in rows if r.value is None]
        return {
            "setting": self.setting,
            "rows": [row.json() for row in rows if row.value is not None],
            "not_run": missing,
        }

    def write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.json(), indent=1) + "\n")

    def line_of_settings(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.setting.items() if value is not None)

    def markdown(self) -> str:
        """The whole report: settings and table."""
        return "\n".join([self.line_of_settings() + ".", "", *self.head, *(r.markdown() for r in self.rows.values())])


def needed_gib(message: str) -> float:
    """Memory that was in use and asked for when there was not enough: the least that the measurement needs."""
    asked = re.search(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB)", message)
    more = 0.0 if asked is None else float(asked[1]) / {"KiB": 2**20, "MiB": 2**10, "GiB": 1}[asked[2]]
    return more + (torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0)


def put_into(document: Path, mark: str, text: str) -> None:
    """Replace what lies between the document's comments `mark` and `end mark`; append both where missing."""
    begin, end = f"<!-- {mark} -->", f"<!-- end {mark} -->"
    whole = document.read_text() if document.is_file() else ""
    if begin not in whole:
        whole = f"{whole.rstrip()}\n\n## {mark}\n\n{begin}\n{end}\n".lstrip()
    before, rest = whole.split(begin, 1)
    after = rest.split(end, 1)[1]
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")
