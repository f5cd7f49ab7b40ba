"""A run's directory: configuration, environment, metrics, reports. What each file is stands in docs/files.md."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unigrpo_cli.config import Config, to_toml
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.atomic import LOCK, PARTIAL, append_line, on_disk, sweep, sync, write_text
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


def fresh_directory(out: Path | None, command: str) -> Path:
    """A directory for a new run: `--out`, or runs/<date>-<time>-<command>. It must be empty.

    Raises:
        UsageError: when it holds something already, or cannot be written.
    """
    if out is not None:
        _refuse_place(out)
    path = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
    k = 2
    while out is None and path.exists():
        path, k = path.with_name(f"{path.name.split('.')[0]}.{k}"), k + 1
    if os.path.isdir(path) and not nothing_in(path):
        begun = command == "train" and is_begun(path)
        hint = ", or go on with that run by --resume auto" if begun else ""
        raise UsageError(f"{path} is not empty: choose another --out{hint}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}; choose another --out") from error
    return path


def _refuse_place(path: Path) -> None:
    """Refuse what cannot be a directory. os.path, for to it a name that no system takes is only not there."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UsageError(f"{path} is a file: choose another --out")


@contextmanager
def new_directory(out: Path | None, command: str) -> Iterator[Path]:
    """As `fresh_directory`; taken back, with parents made for it, when what follows fails and nothing is in it."""
    path = fresh_directory(out, command)
    try:
        yield path
    except BaseException:
        if not any(path.iterdir()):
            path.rmdir()
            if path.parent == Path("runs") and not any(path.parent.iterdir()):
                path.parent.rmdir()
        raise


def nothing_in(directory: Path) -> bool:
    """Whether a directory holds nothing but what a run leaves that was killed before it wrote anything."""
    return all(path.name == LOCK or path.suffix == PARTIAL for path in directory.iterdir())


def is_begun(directory: Path) -> bool:
    """Whether a training run has begun in a directory: its configuration is there, and no rollout's episodes."""
    return (directory / "config.toml").is_file() and not (directory / "episodes.json").exists()


@contextmanager
def scratch_directory(like: Sequence[str]) -> Iterator[Path]:
    """Where a rank that is not the first writes, so that nothing else has to ask which one it is; goes when left.

    Args:
        like: names of the checkpoints that the run has already; here they are empty.
    """
    with TemporaryDirectory(prefix="unigrpo-rank-") as name:
        for checkpoint in like:
            (Path(name) / "checkpoints" / checkpoint).mkdir(parents=True)
        yield Path(name)


def environment() -> dict[str, Any]:
    """Versions that decide numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {"python": platform.python_version(), "machine": platform.machine()} | found


class Run:
    """Writes what a run leaves behind."""

    def __init__(self, directory: Path):
        self.directory = directory

    def describe(self, config: Config) -> None:
        """`config.toml` (resolved, to be used again) and `environment.json`."""
        write_text(self.directory / "config.toml", to_toml(config))
        self.write_json("environment.json", environment())

    def environment_changed(self) -> list[str]:
        """What was another version when the run was last described, in words; nothing where that is not known."""
        try:
            before = json.loads((self.directory / "environment.json").read_text(encoding="utf-8"))
            return [f"{n} {before[n]} -> {now}" for n, now in environment().items() if before.get(n, now) != now]
        except (OSError, ValueError, AttributeError):  # it decides nothing, and is written anew
            return []

    def remove_if_only_described(self) -> None:
        """Take back a directory in which nothing has happened yet, so that the same --out can be used again."""
        own = {"config.toml", "environment.json", "doctor.json", LOCK}
        if {path.name for path in self.directory.iterdir()} <= own:
            for name in own:
                (self.directory / name).unlink(missing_ok=True)
            self.directory.rmdir()
            if self.directory.parent == Path("runs") and not any(self.directory.parent.iterdir()):
                self.directory.parent.rmdir()

    def write_json(self, name: str, content: Any) -> None:
        write_text(self.directory / name, to_json(content, indent=1) + "\n")

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`; a number that is not finite becomes null."""
        append_line(self.metrics, to_json(row))

    def keep_metrics(self) -> None:
        """Force the lines so far to the disk."""
        if self.metrics.is_file():
            with on_disk(self.metrics):
                sync(self.metrics)

    def forget_after(self, step: int, evaluated: bool = True) -> None:
        """Drop what a resumed run will make again: lines, sheets and bad steps of later steps, a line cut short.

        Args:
            evaluated: keep the line of this step's own evaluation.
        """
        if self.metrics.is_file():
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")  # the last may be cut short
            kept = [line for line in lines if 0 < _step_of(line) <= step]
            if not evaluated:
                kept = [line for line in kept if not (_step_of(line) == step and _is_evaluation(line))]
            write_text(self.metrics, "".join(line + "\n" for line in kept))
        made = [*self.directory.glob("samples/step_*"), *self.directory.glob("bad_steps/step_*")]
        for path in made:
            if path.stem[5:].isdigit() and int(path.stem[5:]) > step:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def sweep(self) -> list[Path]:
        """Remove what a killed process left half written; says what it was."""
        folders = (self.directory, *(self.directory / name for name in ("samples", "bad_steps", "checkpoints")))
        return [path for folder in folders for path in sweep(folder)]

    def checkpoint(self, step: int) -> Path:
        return self.directory / "checkpoints" / f"step_{step:06d}"


def _step_of(line: str) -> int:
    """The step of a metrics line, 0 for a line that is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _is_evaluation(line: str) -> bool:
    """Whether a whole line is that of an evaluation and not of a training step."""
    return all(key == "step" or key.startswith("eval/") for key in json.loads(line))
