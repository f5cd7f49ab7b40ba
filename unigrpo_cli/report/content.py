"""What the first level of a page shows of all runs, as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unigrpo_cli import __version__
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.pictures import read_picture
from unigrpo_cli.report.pictures import data_uri
from unigrpo_cli.report.runs import EVAL, ROLLOUT, Curves, ReportRun

PROGRESS_SIDE = 1600
"""Largest side of the picture of samples over a run."""


def runs_content(runs: Sequence[ReportRun], traced: Sequence[Sequence[int]], notes: Sequence[str]) -> dict[str, Any]:
    """All runs; `traced` are the steps of each whose traces can be opened."""
    settings = list(dict.fromkeys(run.same_setting for run in runs))
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    return {
        "runs": [_run(run, steps, settings) for run, steps in zip(runs, traced, strict=True)],
        "settings": list(range(len(settings))),
        "differences": [key for key in keys if len({repr(run.settings.get(key)) for run in runs if run.settings}) > 1],
        "notes": [*(_thinned(run) for run in runs if run.curves.stride > 1), *notes],
        "footer": f"unigrpo {__version__}. This page holds all its data and fetches nothing.",
    }


def _run(run: ReportRun, traced: Sequence[int], settings: list[str]) -> dict[str, Any]:
    return {
        "name": run.name,
        "kind": run.kind,
        "setting": settings.index(run.same_setting),
        "settings": run.settings,
        "state": _state(run),
        "traced": list(traced),
        "curves": _curves(run.curves),
        "scores": [vars(scores) for scores in run.scores],
        "progress": _progress(run.directory / "samples" / "progress.png"),
    }


def _state(run: ReportRun) -> str:
    if run.kind in (ROLLOUT, EVAL):
        return {ROLLOUT: "episodes", EVAL: "evaluation"}[run.kind]
    done = run.curves.steps[-1] if run.curves.steps else 0
    wanted = run.settings.get("train.steps", done)
    return f"{done} steps" if done >= wanted else f"{done} of {wanted} steps"


def _curves(curves: Curves) -> dict[str, Any]:
    return {
        "steps": curves.steps,
        "times": [_short(t) for t in curves.times],
        "values": {name: [_short(v) for v in values] for name, values in (curves.values or {}).items()},
        "warnings": [vars(span) for span in curves.warnings],
        "skipped": curves.skipped,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _thinned(run: ReportRun) -> str:
    return f"Curves of {run.name} show every {run.curves.stride}th step; metrics.jsonl has all of them."


def _progress(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return data_uri(read_picture(path), largest=PROGRESS_SIDE)
    except UsageError:  # a run that still trains may be writing it
        return None
