"""Commands of the toy model without the modules and signals that Windows lacks, and with its lock.

They run here, in a process where those cannot be imported; what of Windows itself differs else is not tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import command, write_inputs

ROOT = Path(__file__).parents[1]
WITHOUT = """
import builtins, json, os, signal, sys, types

plain_import = builtins.__import__

def import_there(name, globals=None, locals=None, fromlist=(), level=0):
    ours = str((globals or {}).get("__name__")).startswith("unigrpo")  # other packages are not those of Windows
    if ours and name in ("fcntl", "resource", "pwd", "grp", "termios"):
        raise ImportError(name)
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = import_there
for name in ("SIGHUP", "SIGALRM", "SIGUSR1", "pthread_kill"):
    delattr(signal, name)

held = {}

def locking(file, mode, count):
    key = os.fstat(file).st_ino
    if held.setdefault(key, file) != file:
        raise PermissionError(13, "Permission denied")

import subprocess  # which looks for msvcrt itself
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)

import unigrpo_cli.io.atomic as atomic
atomic.WINDOWS = True

def no_links(*arguments, **more):
    raise OSError("[WinError 1314] A required privilege is not held by the client")

os.symlink = no_links
from unigrpo_cli.cli import app
for arguments in json.loads(sys.argv[1]):
    assert not app(arguments, standalone_mode=False), arguments
"""


def test_train_resume_eval_and_generate_work(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = ("train.steps=1", "eval.every=0", "eval.best=''", "doctor.at_start=off")
    line = command(run, write_inputs(tmp_path), short)
    lines = [
        line,
        [*line, "--steps", "2"],
        ["generate", "a red circle", "--model", str(run), "--out", str(tmp_path / "g")],
        ["eval", "--model", str(run), "--set", "eval.limit=1", "--out", str(tmp_path / "e")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(lines)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert not (run / "checkpoints" / "last").exists(), "links need a right that users lack there"
    assert (tmp_path / "g" / "000_00.png").is_file()
    assert any((tmp_path / "e").iterdir())


@pytest.mark.parametrize("module", ["fcntl", "resource"])
def test_no_module_imports_it_at_the_top(module: str) -> None:
    for path in (ROOT / "unigrpo_cli").rglob("*.py"):
        assert not [
            line for line in path.read_text().splitlines() if line.startswith((f"import {module}", f"from {module}"))
        ]
