"""A command of `unigrpo` in this process, or in a fork of it where signals, descriptors or ranks are tested."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from unigrpo_cli.cli import app, main


def unigrpo(*arguments: object) -> Result:
    """What `unigrpo ARGUMENTS` prints, and its exit code."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command_line(*arguments: object) -> None:
    """The entry point, as the installed script calls it."""
    sys.argv = ["unigrpo", *map(str, arguments)]
    main()


class Process:
    """`run(*given)` in a fork of this process, which has imported what takes a fresh one seconds.

    With a GPU it is a fresh one: CUDA does not survive a fork. Give a command `threads=1`: OpenMP does not, either.

    Args:
        stdout, stderr: files for its output, if `ended` is not to return it.
        environment: variables besides those of this process.
    """

    def __init__(
        self,
        run: Callable[..., None],
        *given: Any,
        stdout: Path | None = None,
        stderr: Path | None = None,
        fresh: bool = False,
        **environment: str,
    ):
        import torch._dynamo  # which an optimizer imports, in seconds

        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        self.files = stdout or place / "stdout", stderr or place / "stderr"
        method = multiprocessing.get_context("spawn" if fresh or torch.cuda.is_available() else "fork")
        self.process = method.Process(target=_begin, args=(run, given, self.files, environment), daemon=True)
        self.process.start()

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid or 0, number)

    def ended(self, seconds: float = 120) -> tuple[int, str, str]:
        """Exit code, output and errors; it is killed when it takes longer."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        output, errors = (file.read_text() if file.is_file() else "" for file in self.files)
        assert self.code is not None
        return self.code, output, errors


def _begin(run: Callable[..., None], given: tuple, files: tuple[Path, Path], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    run(*given)
