"""Directories of runs as a report reads them: settings, curves, warnings, held-out scores. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unigrpo_cli.config import config_keys
from unigrpo_cli.errors import UsageError
from unigrpo_cli.report.files import EvalFile, SummaryFile, read_json, read_rows, read_settings
from unigrpo_cli.run.config_diff import Effect, effect_of

MOST_POINTS = 2_000
"""Points of a curve on a page; of longer runs every second, third, ... step is shown."""
TRAIN, ROLLOUT, EVAL = "train", "rollout", "eval"
NO_RESULT = (Effect.NONE, Effect.ROUNDING)
FILES = {ROLLOUT: "episodes.json", EVAL: "eval.json", TRAIN: "config.toml"}
"""The file that shows what a directory is; a rollout has a config.toml too, so the order matters."""


@dataclass(frozen=True)
class Span:
    """A warning of the monitor, from its first step to its last."""

    text: str
    first: int
    last: int


@dataclass(frozen=True)
class Curves:
    """Metrics by step: `values` has a list per metric, None where a step did not measure it.

    `stride` is above 1 where only every stride-th step is kept. `times` are seconds since the first line.
    """

    steps: tuple[int, ...] = ()
    times: tuple[float | None, ...] = ()
    values: dict[str, tuple[float | None, ...]] | None = None
    warnings: tuple[Span, ...] = ()
    skipped: tuple[tuple[int, str], ...] = ()
    stride: int = 1


@dataclass(frozen=True)
class Scores:
    """One evaluation: by reward its mean, interval and n, and, against `against`, the paired difference."""

    label: str
    scores: dict[str, dict[str, Any]]
    n: int
    against: str | None = None
    difference: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class ReportRun:
    """A directory that is shown. `settings` are its configuration by dotted keys."""

    name: str
    directory: Path
    kind: str
    settings: dict[str, Any]
    curves: Curves
    scores: tuple[Scores, ...]

    def until(self, step: int) -> ReportRun:
        """The run as it was at a step: without later points, and without scores after later ones."""
        if not self.curves.steps or self.curves.steps[-1] <= step:
            return self
        count = sum(own <= step for own in self.curves.steps)
        curves = replace(
            self.curves,
            steps=self.curves.steps[:count],
            times=self.curves.times[:count],
            values={name: values[:count] for name, values in (self.curves.values or {}).items()},
            warnings=tuple(replace(w, last=min(w.last, step)) for w in self.curves.warnings if w.first <= step),
            skipped=tuple(own for own in self.curves.skipped if own[0] <= step),
        )
        return replace(self, curves=curves, scores=tuple(s for s in self.scores if s.label != "after"))

    @property
    def same_setting(self) -> str:
        """Equal for runs that differ by nothing that changes a result but the seed.

        A setting that is newer than a run has its default there.
        """
        settings = {key: default for key, (_, default) in config_keys().items()} | self.settings
        kept = {k: v for k, v in settings.items() if k != "seed" and effect_of(k) not in NO_RESULT}
        return json.dumps([self.kind, kept], sort_keys=True, default=str)


def read_runs(paths: Sequence[Path]) -> list[ReportRun]:
    """The runs of all directories; a directory of runs stands for each of them."""
    found = run_directories(paths)
    return [_read(path, name) for path, name in zip(found, _names(found), strict=True)]


def run_directories(paths: Sequence[Path]) -> list[Path]:
    found = [own for path in paths for own in _expanded(path)]
    return list({path.resolve(): path for path in found}.values())


def kind_of(directory: Path) -> str | None:
    """What a directory is: train, rollout or eval; None for something else."""
    return next((kind for kind, name in FILES.items() if (directory / name).is_file()), None)


def _expanded(path: Path) -> list[Path]:
    if kind_of(path):
        return [path]
    if not path.is_dir():
        raise UsageError(f"no directory {path}: give a run, e.g. `unigrpo report runs/NAME`")
    inside = sorted(p for p in path.iterdir() if p.is_dir() and kind_of(p))
    if not inside:
        raise UsageError(
            f"{path} is no run: give the --out directory of train, rollout or eval, or a directory of such directories"
        )
    return inside


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that are different."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(directory: Path, name: str) -> ReportRun:
    kind = kind_of(directory)
    assert kind is not None
    curves = read_curves(directory / "metrics.jsonl") if kind == TRAIN else Curves()
    settings = read_settings(directory / "config.toml")
    return ReportRun(name, directory, kind, settings, curves, tuple(_scores(directory, name)))


def read_curves(path: Path, most_points: int = MOST_POINTS) -> Curves:
    """All lines of a metrics.jsonl, thinned to `most_points` steps and the last, besides those with an evaluation."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        rows.setdefault(row["step"], {}).update(row)
    steps = sorted(rows)
    warnings = _spans((step, rows[step].get("warnings", ())) for step in steps)
    skipped = tuple((step, rows[step]["skipped"]) for step in steps if rows[step].get("skipped"))
    stride = max(1, math.ceil(len(steps) / most_points))
    # by the number of a step, so that runs of other lengths keep the same steps
    kept = [s for s in steps if s % stride == 0 or s == steps[-1] or _is_sparse(rows[s])]
    names = dict.fromkeys(k for s in kept for k, v in rows[s].items() if k != "time" and isinstance(v, float))
    values = {name: tuple(rows[s].get(name) for s in kept) for name in names}
    times = [rows[s].get("time") for s in kept]
    start = next((t for t in times if t is not None), 0.0)
    since = tuple(None if t is None else t - start for t in times)
    return Curves(tuple(kept), since, values, tuple(warnings), skipped, stride)


def _is_sparse(row: dict[str, Any]) -> bool:
    """Whether a step has an evaluation, which few have."""
    return any(key.startswith("eval/") for key in row)


def _spans(current: Iterator[tuple[int, Sequence[str]]]) -> Iterator[Span]:
    """Warnings from the lists of those that hold at each step."""
    begun: dict[str, int] = {}
    before = 0
    for step, texts in current:
        for text in [text for text in begun if text not in texts]:
            yield Span(text, begun.pop(text), before)
        for text in texts:
            begun.setdefault(text, step)
        before = step
    for text, first in begun.items():
        yield Span(text, first, before)


def _scores(directory: Path, name: str) -> Iterator[Scores]:
    """Evaluations in a directory: of a run before and after it, of `unigrpo eval` one for each model."""
    difference = read_json(directory / "summary.json", SummaryFile).get("difference")
    for file, label in (("eval_before.json", "before"), ("eval_after.json", "after")):
        if report := read_json(directory / file, EvalFile):
            paired = difference if label == "after" and difference else None
            yield Scores(label, report["scores"], report["n"], "before" if paired else None, paired)
    if report := read_json(directory / "eval.json", EvalFile):
        model = report["model"] or name
        yield Scores(model, report["scores"], report["n"])
        for other in report["compare"]:
            yield Scores(other["model"], other["scores"], other["n"], model, other["difference"])
