"""A run's directory: configuration, environment, metrics, reports. docs/files.md describes each file."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unigrpo_cli.config import Config, to_toml
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.atomic import LOCK, PARTIAL, append_line, on_disk, remove_partial, sync, write_text
from unigrpo_cli.io.json import to_json

PACKAGES = (
    "unigrpo-cli",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "numpy",
)

BY_STEP = ("samples", "bad_steps", "traces")
"""Directories of what a training step leaves besides its metrics: `step_NNNNNN` in them."""


def fresh_directory(out: Path | None, command: str) -> Path:
    """A directory for a new run: `--out`, or runs/<date>-<time>-<command>. It must be empty."""
    if out is not None and os.path.lexists(out) and not os.path.isdir(out):
        raise UsageError(f"{out} is a file: choose another --out")
    path = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
    k = 2
    while out is None and path.exists():
        path, k = path.with_name(f"{path.name.split('.')[0]}.{k}"), k + 1
    if os.path.isdir(path) and not nothing_in(path):
        hint = ", or resume that run with --resume auto" if command in ("train", "sft") and is_begun(path) else ""
        raise UsageError(f"{path} is not empty: choose another --out{hint}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}; choose another --out") from error
    return path


@contextmanager
def new_directory(out: Path | None, command: str) -> Iterator[Path]:
    """As `fresh_directory`; an empty directory is removed again when the body fails."""
    path = fresh_directory(out, command)
    try:
        yield path
    except BaseException:
        if not any(path.iterdir()):
            _remove(path)
        raise


def _remove(directory: Path) -> None:
    """Remove an empty directory, and ./runs when that was its last one."""
    with suppress(OSError):
        directory.rmdir()
        if directory.parent == Path("runs"):
            directory.parent.rmdir()


def nothing_in(directory: Path) -> bool:
    """Whether a directory holds only what a run leaves that was killed before it wrote anything."""
    return all(path.name == LOCK or path.suffix == PARTIAL for path in directory.iterdir())


def is_begun(directory: Path) -> bool:
    """Whether a training run was started in a directory: it has a configuration, and no rollout's episodes."""
    return (directory / "config.toml").is_file() and not (directory / "episodes.json").exists()


@contextmanager
def scratch_directory(checkpoint_names: Sequence[str]) -> Iterator[Path]:
    """A temporary directory for a rank that is not the first, so no other code asks which rank it is.

    Args:
        checkpoint_names: the run's checkpoints; here they are empty directories.
    """
    with TemporaryDirectory(prefix="unigrpo-rank-") as name:
        for checkpoint in checkpoint_names:
            (Path(name) / "checkpoints" / checkpoint).mkdir(parents=True)
        yield Path(name)


def environment() -> dict[str, Any]:
    """Versions that decide numbers."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine()} | found


@cache
def _version(name: str) -> str:
    """Read once: it is parsed from a file."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


class Run:
    """Writes the files of a run."""

    def __init__(self, directory: Path):
        self.directory = directory

    def describe(self, config: Config) -> None:
        """Write `config.toml`, with every setting, and `environment.json`."""
        write_text(self.directory / "config.toml", to_toml(config))
        self.write_json("environment.json", environment())

    def environment_changed(self) -> list[str]:
        """Versions that differ from `environment.json`; nothing where that cannot be read."""
        try:
            before = json.loads((self.directory / "environment.json").read_text(encoding="utf-8"))
            return [f"{n} {before[n]} -> {now}" for n, now in environment().items() if before.get(n, now) != now]
        except (OSError, ValueError, AttributeError):  # it decides nothing and is written again
            return []

    def remove_if_only_described(self) -> None:
        """Remove a directory in which nothing has happened, so that the same --out can be used again."""
        own = {"config.toml", "environment.json", "doctor.json", LOCK}
        if {path.name for path in self.directory.iterdir()} <= own:
            for name in own:
                with suppress(PermissionError):  # Windows: the lock is still open
                    (self.directory / name).unlink(missing_ok=True)
            _remove(self.directory)

    def write_json(self, name: str, content: Any) -> None:
        write_text(self.directory / name, to_json(content, indent=1) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """`summary.json` of a finished run; None where there is none that can be read."""
        try:
            content = json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return content if isinstance(content, dict) and content.get("interrupted") is False else None

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl` with the time of day; a number that is not finite becomes null."""
        append_line(self.metrics, to_json(row | {"time": round(time.time(), 3)}))

    def sync_metrics(self) -> None:
        """Force the lines so far to the disk."""
        if self.metrics.is_file():
            with on_disk(self.metrics):
                sync(self.metrics)

    def forget_after(self, step: int, evaluated: bool = True) -> list[str]:
        """Remove lines, sheets, traces and bad steps of later steps, which a resumed run repeats, and repeated lines.

        Args:
            evaluated: keep the line of this step's own evaluation.

        Returns:
            What is wrong with metrics.jsonl, a sentence each. A last line cut by a kill is normal.
        """
        for path in [p for name in BY_STEP for p in self.directory.glob(f"{name}/step_*")]:
            if path.stem[5:].isdigit() and int(path.stem[5:]) > step:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        data = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.is_file() else ""
        *lines, _ = data.split("\n")  # the last one is empty, or was cut
        kept: dict[tuple[int, bool], str] = {}
        unreadable = repeated = 0
        for line in lines:
            found = _step_and_kind(line)
            unreadable += found is None
            if found is None or found[0] > step or (found == (step, True) and not evaluated):
                continue
            repeated += found in kept
            kept.setdefault(found, line)
        text = "".join(line + "\n" for line in kept.values())
        if text != data:
            write_text(self.metrics, text)
        missing = step - sum(not evaluation for _, evaluation in kept)
        wrong = [
            (unreadable, "has {} unreadable lines, which are removed"),
            (repeated, "had {} lines twice; the copies are removed"),
            (missing, f"lacks {{}} of the {step} steps before this checkpoint: it was cut or emptied"),
        ]
        return [f"{self.metrics} {text.format(count)}" for count, text in wrong if count]

    def remove_partial(self) -> list[Path]:
        """Remove what a killed process left half written, and return it."""
        folders = (self.directory, *(self.directory / name for name in (*BY_STEP, "checkpoints")))
        return [path for folder in folders for path in remove_partial(folder)]

    def trace(self, step: int) -> Path:
        return self.directory / "traces" / f"step_{step:06d}"

    def checkpoint(self, step: int) -> Path:
        return self.directory / "checkpoints" / f"step_{step:06d}"


def _step_and_kind(line: str) -> tuple[int, bool] | None:
    """The step of a metrics line, and whether it is an evaluation's; None for a line that is not a step's."""
    try:
        row = json.loads(line)
        step = row["step"]
        if type(step) is not int or step < 1:
            return None
        return step, all(key in ("step", "time") or key.startswith("eval/") for key in row)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
