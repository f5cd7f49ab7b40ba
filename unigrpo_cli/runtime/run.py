"""A run's directory: configuration, environment, metrics, reports. What each file is stands in docs/files.md."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from unigrpo_cli.config import Config, to_toml
from unigrpo_cli.errors import UsageError
from unigrpo_cli.jsontext import to_json

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
    path = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
    k = 2
    while out is None and path.exists():
        path, k = path.with_name(f"{path.name.split('.')[0]}.{k}"), k + 1
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: choose another --out")
    if path.exists() and any(path.iterdir()):
        resumable = command == "train" and any(path.glob("checkpoints/step_*/state.json"))
        hint = ", or go on with that run by --resume auto" if resumable else ""
        raise UsageError(f"{path} is not empty: choose another --out{hint}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}; choose another --out") from error
    return path


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
        (self.directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
        self.write_json("environment.json", environment())

    def remove_if_only_described(self) -> None:
        """Take back a directory in which nothing has happened yet, so that the same --out can be used again."""
        own = {"config.toml", "environment.json", "doctor.json"}
        if {path.name for path in self.directory.iterdir()} <= own:
            for name in own:
                (self.directory / name).unlink(missing_ok=True)
            self.directory.rmdir()
            if self.directory.parent == Path("runs") and not any(self.directory.parent.iterdir()):
                self.directory.parent.rmdir()

    def write_json(self, name: str, content: Any) -> None:
        (self.directory / name).write_text(to_json(content, indent=1) + "\n")

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`; a number that is not finite becomes null."""
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(to_json(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop metric lines of steps that a resumed run will do again, and one that a crash cut short."""
        path = self.directory / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if 0 < _step_of(line) <= step]
            path.write_text("".join(line + "\n" for line in kept))

    def checkpoint(self, step: int) -> Path:
        return self.directory / "checkpoints" / f"step_{step:06d}"


def _step_of(line: str) -> int:
    """The step of a metrics line, 0 for a line that is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
