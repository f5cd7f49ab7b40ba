"""Traces on disk: `traces/step_NNNNNN/trace.json` and `trace.safetensors`, checked when they are read. No torch.

The JSON holds everything but arrays. An array is named after its group, episode and segment: `0.3.1.log_ratio_L`.
"""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.atomic import new_directory
from unigrpo_cli.io.json import to_json
from unigrpo_cli.io.limits import parse_json, read_text, reason_of, refuse_odd_text, refuse_special
from unigrpo_cli.run.trace_types import StepTrace

FORMAT = 1
JSON, ARRAYS = "trace.json", "trace.safetensors"
REMOVE = "remove that directory to see the other steps"


@cache
def _schema() -> TypeAdapter[StepTrace]:
    return TypeAdapter(StepTrace)


# ----- write


def save_trace(trace: StepTrace, directory: Path) -> None:
    """Write `trace.json` and `trace.safetensors` as a whole; a trace of the same step is replaced."""
    arrays: dict[str, NDArray[Any]] = {}
    for g, group in enumerate(trace.groups):
        for e, episode in enumerate(group.episodes):
            for s, segment in enumerate(episode.segments):
                arrays |= _arrays_of(segment, f"{g}.{e}.{s}")
    with new_directory(directory, sums=False) as unfinished:
        (unfinished / JSON).write_text(to_json({"format": FORMAT} | _plain(trace)) + "\n", encoding="utf-8")
        save_file(arrays, unfinished / ARRAYS)


def _arrays_of(value: Any, name: str) -> dict[str, NDArray[Any]]:
    """The arrays of a segment by their names in the file; those of a move are `update.NAME`, `after.NAME`."""
    if isinstance(value, np.ndarray):
        return {name: np.ascontiguousarray(value)}
    inside = vars(value) if is_dataclass(value) else {}
    return {key: array for own, v in inside.items() for key, array in _arrays_of(v, f"{name}.{own}").items()}


def _plain(value: Any) -> Any:
    """Dataclasses as tables; null where an array is."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, np.ndarray) else value


# ----- read


def trace_directories(run: Path) -> list[Path]:
    return sorted(p for p in run.glob("traces/step_*") if p.name[5:].isdigit())


def load_traces(run: str | Path) -> list[StepTrace]:
    """What the updates of a run saw, step by step; of a rollout's directory its episodes, as step 0.

    Raises:
        UsageError: when the directory is neither, or a file in it is damaged.
    """
    directory = Path(run)
    if os.path.isfile(directory / "episodes.json"):
        from unigrpo_cli.run.traces import rollout_trace  # loads torch

        return [rollout_trace(directory)]
    if not os.path.isfile(directory / "config.toml") and not os.path.isdir(directory / "traces"):
        raise UsageError(f"{directory} is no run: give a directory that `unigrpo train` or `unigrpo rollout` wrote")
    return [load_trace(path) for path in trace_directories(directory)]


def load_trace(directory: Path) -> StepTrace:
    try:
        content = parse_json(read_text(directory / JSON))
        refuse_odd_text(content)
        if (found := content.pop("format")) != FORMAT:
            raise UsageError(f"{directory}: a trace of format {found}, this version reads {FORMAT}")
        refuse_special(directory / ARRAYS)
        for name, array in load_file(directory / ARRAYS).items():
            g, e, s, *inner, own = name.split(".")
            table = content["groups"][int(g)]["episodes"][int(e)]["segments"][int(s)]
            for part in inner:
                table = table[part]
            table[own] = array
        return _schema().validate_python(content)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UsageError(f"{directory}: damaged trace ({reason_of(error)}); {REMOVE}") from error
