"""A run outlives its terminal, its log and a pipe's reader; hanging up stops it as Ctrl-C does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import command, write_inputs
from tests.commands import Process, command_line
from unigrpo_cli.run.checkpoint import checkpoints

ROOT = Path(__file__).parents[1]
UNIGRPO = [sys.executable, "-c", "from unigrpo_cli.cli import main; main()"]
SETTINGS = ("train.steps=2", "eval.every=0", "eval.best=''", "train.samples_every=0", "doctor.at_start=off")
POSIX = pytest.mark.skipif(os.name == "nt", reason="pipes, /dev/full and SIGHUP of POSIX")


@pytest.fixture
def run(tmp_path: Path, small_model: Path) -> Path:
    """Where a run shall be, with its inputs beside it."""
    write_inputs(tmp_path)
    (tmp_path / "model").symlink_to(small_model)
    return tmp_path / "run"


def start(run: Path, *settings: str, **files: Path) -> Process:
    small = (f"model={run.with_name('model')}", *SETTINGS, *settings)
    return Process(command_line, *command(run, run.with_name("moody.py"), small), **files)


@POSIX
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_pipe_that_closes_and_a_full_log_do_not_stop_a_run(run: Path) -> None:
    pipe = run.with_name("pipe")
    os.mkfifo(pipe)
    process = start(run, stdout=pipe, stderr=Path("/dev/full"))
    with pipe.open() as output:
        output.readline()
    assert process.ended()[0] == 0
    assert (run / "checkpoints" / "step_000002" / "SHA256SUMS").is_file()
    assert (run / "summary.json").is_file()


@POSIX
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stdout_is_said_once() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*UNIGRPO, "rewards", "list"], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    warning = "warning: standard output: No space left on device; the command continues without it\n"
    assert (done.returncode, done.stderr) == (0, warning)


@POSIX
def test_json_to_a_closed_pipe(tmp_path: Path) -> None:
    """The object is lost, the command is not a failure, and stderr has no traceback."""
    process = subprocess.Popen(
        [*UNIGRPO, "rewards", "list", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        threading.Event().wait(0.05)


@POSIX
@pytest.mark.parametrize("ignored", [False, True])
def test_hanging_up_saves_a_checkpoint(run: Path, ignored: bool) -> None:
    """As Ctrl-C: the step is finished. Under nohup the run continues."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    process = start(run, "train.steps=400", "train.checkpoint_every=0")
    signal.signal(signal.SIGHUP, before)
    metrics = run / "metrics.jsonl"
    _wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0, 120)
    process.send(signal.SIGHUP)
    if ignored:
        size = metrics.stat().st_size
        _wait_for(lambda: metrics.stat().st_size > size, 60)
        process.send(signal.SIGTERM)
    code, _, errors = process.ended()
    assert code == 130, errors
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert checkpoints(run)[-1].name == f"step_{last:06d}"
