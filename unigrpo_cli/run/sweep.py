"""A sweep: one run for each combination of settings and each seed, in one directory (docs/files.md).

The runs' own files say what is done, so a sweep that was killed is resumed by the same command.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo_cli.config import Config, load_config, to_toml
from unigrpo_cli.errors import DivergedError, TooLargeError, UnigrpoError, UsageError, one_line, quoted
from unigrpo_cli.io.atomic import locked, write_text
from unigrpo_cli.io.json import to_json
from unigrpo_cli.io.limits import parse_json, read_text
from unigrpo_cli.parallel.ranks import Ranks
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.run.config_diff import Effect, changes, flat
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.directory import Run, fresh_directory, is_begun
from unigrpo_cli.run.signals import interrupts
from unigrpo_cli.run.start import opened_run

SETTINGS, ROWS, TABLE, CLAIMS = "sweep.toml", "sweep.json", "sweep.csv", ".claims"
LONGEST_NAME = 120
"""Bytes of a run's name; file systems take 255."""
LONGEST_WRITE_S = 30.0
"""Seconds until another process has written its rows."""
SCORES = ("eval_before", "eval_after", "intervals", "difference")
"""What a row takes over from a run's summary.json."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        name: its directory inside the sweep's.
        cell: its combination of varied settings, without the seed.
        settings: the varied settings by key.
    """

    name: str
    cell: str
    seed: int
    settings: dict[str, Any]
    config: Config


# ----- which runs


def runs_of(
    vary: Sequence[str], seeds: Sequence[int], configure: Callable[[list[str], int | None], Config]
) -> list[SweepRun]:
    """All runs: the product of the values of each key, and of the seeds.

    Args:
        vary: `section.key=value`; the same key several times gives its values.
        seeds: empty for the seed of the settings.
        configure: the configuration of `--set` texts and a seed.
    """
    values = _values_of(vary)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {','.join(map(str, seeds))}: give each seed once")
    labels = _labels(list(values))
    runs: list[SweepRun] = []
    cells: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*values.values()):
        texts = [f"{key}={value}" for key, value in zip(values, combination, strict=True)]
        for seed in seeds or (None,):
            config = configure(texts, seed)
            plain = flat(config.model_dump(mode="json"))
            settings = {key: plain.get(key, text) for key, text in zip(values, combination, strict=True)}
            cell = "_".join(f"{labels[key]}={_readable(value)}" for key, value in settings.items())
            if cells.setdefault(cell.casefold(), settings) != settings:  # other values that read alike
                cell = f"{cell}_{_digest(to_json(settings))}"
            name = _short("_".join(filter(None, (cell, f"seed={config.seed}"))))
            runs.append(SweepRun(name, cell or "all", config.seed, settings, config))
    names = [run.name for run in runs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--vary: two runs are named {repeated}; give each value once")
    return runs


def _values_of(vary: Sequence[str]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for text in vary:
        key, found, value = (part.strip() for part in text.partition("="))
        if not found or not key:
            raise UsageError(f"--vary {text}: write it as section.key=value, e.g. --vary train.lr_image=1e-4")
        if key == "seed":
            raise UsageError(f"--vary {text}: give seeds as --seeds 0,1,2")
        values.setdefault(key, []).append(value)
    return values


def seeds_of(text: str | None) -> list[int]:
    """Seeds as they are typed: `0,1,2`."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UsageError(f"--seeds {text}: write whole numbers with commas, e.g. --seeds 0,1,2") from error


def _labels(keys: list[str]) -> dict[str, str]:
    """Short names of keys: the last part, or where two keys share it, all of it."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: key if last.count(short) > 1 or short == "seed" else short for key, short in zip(keys, last, strict=True)
    }


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "-".join(map(_readable, value))
    return "-".join(re.sub(r"[^\w.+-]+", " ", str(value)).split()) or "none"


def _short(name: str) -> str:
    """The name, or for one that is too long for a file system its beginning and a digest."""
    content = name.encode()
    if len(content) <= LONGEST_NAME:
        return name
    return f"{content[:LONGEST_NAME].decode(errors='ignore')}_{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ----- the directory


def sweep_directory(out: Path | None, base: Config) -> Path:
    """The directory of a new sweep, or of one that is resumed."""
    if out is None or not (out / SETTINGS).is_file():
        directory = fresh_directory(out, "sweep")
        write_text(directory / SETTINGS, to_toml(base))
        return directory
    _rows_in(out)
    before = load_config(file=out / SETTINGS, whole=True).model_dump(mode="json")
    begun = any(path.is_dir() and path.name != CLAIMS for path in out.iterdir())
    harmless = (Effect.NONE, Effect.ROUNDING)
    changed = [str(change) for change in changes(before, base) if change.effect not in harmless]
    if changed and begun:
        raise UsageError(f"{out} holds a sweep with other settings ({'; '.join(changed)}); choose another --out")
    write_text(out / SETTINGS, to_toml(base))
    return out


def row_of(run: SweepRun, directory: Path, error: str | None = None) -> dict[str, Any]:
    """What `sweep.json` says of a run: its settings, its state and, once it is finished, its scores."""
    summary = Run(directory / run.name).summary()
    steps = None if summary is None else summary.get("steps")
    finished = isinstance(steps, int) and steps >= run.config.train.steps
    state = "failed" if error else "finished" if finished else "unfinished"
    row = {"run": run.name, "cell": run.cell, "seed": run.seed, "settings": run.settings, "state": state}
    scores = {key: _table(summary.get(key)) for key in SCORES} if summary is not None and finished else {}
    return row | scores | ({"error": error} if error else {})


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rows_in(directory: Path) -> list[dict[str, Any]]:
    """The rows of `sweep.json` whose run directories are there."""
    path = directory / ROWS
    try:
        rows = parse_json(read_text(path))["runs"]
        for row in rows:
            scores = [row[key] for key in SCORES[:2]] if row["state"] == "finished" else []
            if not all(isinstance(table, dict) for table in (row["settings"], *scores)):
                raise ValueError(f"the row of {row['run']} has no table of settings or scores")
            if not (isinstance(row["run"], str) and isinstance(row["cell"], str) and isinstance(row["seed"], int)):
                raise ValueError(f"the row of {row['run']} has no name, cell and seed")
        return [row for row in rows if (directory / row["run"]).is_dir()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it, and the same command writes it again") from error


def cells_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per combination: its finished runs, and of each reward mean and standard deviation over the seeds."""
    cells = []
    for name in dict.fromkeys(row["cell"] for row in rows):
        finished = [row for row in rows if row["cell"] == name and row["state"] == "finished"]
        scores = {}
        for reward in dict.fromkeys(reward for row in finished for reward in row["eval_after"]):
            values = [v for row in finished if isinstance(v := row["eval_after"].get(reward), int | float)]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                scores[reward] = {"mean": statistics.fmean(values), "std": deviation, "n": len(values)}
        cells.append({"cell": name, "finished": len(finished), "scores": scores})
    return cells


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line per run: cell, seed, the varied settings, and the scores before and after training."""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    names = list(dict.fromkeys(name for row in rows for name in row.get("eval_after", {})))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    scores = [f"{when}/{name}" for when in ("before", "after") for name in names]
    lines.writerow(["cell", "seed", "run", "state", *keys, *scores])
    for row in rows:
        values = [row.get(f"eval_{when}", {}).get(name) for when in ("before", "after") for name in names]
        lines.writerow(
            [row["cell"], row["seed"], row["run"], row["state"], *(row["settings"].get(k) for k in keys), *values]
        )
    return text.getvalue()


def show(cells: Sequence[dict[str, Any]], display: Display) -> None:
    """A row per combination: its finished runs and the scores after training."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["scores"]))
    rows = []
    for cell in cells:
        scores = [_cell_text(cell["scores"].get(name)) for name in names]
        rows.append([cell["cell"], str(cell["finished"]), *scores])
    title = "held-out scores after training: mean over seeds, standard deviation"
    display.table(title, ["cell", "runs", *names], rows, set(range(1, len(names) + 2)))


def _cell_text(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{score['mean']:.3f}" + ("" if score["std"] is None else f" ± {score['std']:.3f}")


# ----- train


def train_all(
    runs: Sequence[SweepRun], directory: Path, plugins: Plugins, display: Display, ranks: Ranks
) -> tuple[dict[str, Any], bool]:
    """Train what is not finished, one run after the other; the content of `sweep.json`, and whether it was interrupted.

    Several processes may share a directory: each run is trained by the one that claims it first. A run that diverges
    or does not fit in memory fails alone; other errors end the sweep, as they would meet every run.
    """
    failed: dict[str, str] = {}
    interrupted = False
    for number, run in enumerate(runs, 1):
        with ExitStack() as held:
            if not _claimed(run, directory, ranks, held):
                continue
            display.say(f"run {number} of {len(runs)}: {run.name}", style="bold")
            place = directory / run.name
            begun = ranks.from_first(place.is_dir() and is_begun(place))
            try:
                with interrupts() as listener:
                    resumed = place if begun else None
                    with opened_run(run.config, plugins, display, place, resumed, None, listener, ranks) as trainer:
                        summary = trainer.run()
                interrupted = summary["interrupted"]
            except (DivergedError, TooLargeError) as error:
                if not (ranks.alone or error.everywhere):
                    raise
                failed[run.name] = one_line(str(error))
                display.warn(f"{run.name} failed: {failed[run.name]}")
            except UnigrpoError:
                display.warn(
                    f"the sweep stops at {run.name}; the same command with --out {quoted(directory)} resumes it"
                )
                raise
        gc.collect()  # a trainer and its listener hold each other, and with them the weights
        _write(runs, directory, failed, ranks)
        if interrupted:
            break
    return _write(runs, directory, failed, ranks), interrupted


def _claimed(run: SweepRun, directory: Path, ranks: Ranks, held: ExitStack) -> bool:
    """Whether a run is to be trained, and by this process; then it holds the claim."""
    claim = False
    with ranks.together():
        if ranks.first and row_of(run, directory)["state"] != "finished":
            place = directory / CLAIMS / run.name
            place.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(locked(place))
                claim = row_of(run, directory)["state"] != "finished"  # another process may just have finished it
            except UsageError:  # held by another process, which trains it
                claim = False
    return ranks.from_first(claim)


def _write(runs: Sequence[SweepRun], directory: Path, failed: dict[str, str], ranks: Ranks) -> dict[str, Any]:
    """Write `sweep.json` and `sweep.csv`, on the first rank: the rows of these runs, and of those of other commands."""
    content: dict[str, Any] = {}
    with ranks.together():
        if ranks.first:
            with _writing(directory):
                own = {run.name for run in runs}
                earlier = [row for row in _rows_in(directory) if row["run"] not in own]
                rows = [*earlier, *(row_of(run, directory, failed.get(run.name)) for run in runs)]
                content = {"directory": str(directory), "runs": rows, "cells": cells_of(rows)}
                write_text(directory / ROWS, to_json(content, indent=1) + "\n")
                write_text(directory / TABLE, to_csv(rows))
    return content


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Hold `sweep.json` from its reading to its writing: another process may add its rows."""
    place = directory / CLAIMS / ROWS
    place.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LONGEST_WRITE_S
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(place))
                break
            except UsageError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield
