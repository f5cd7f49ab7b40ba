"""Commands of the toy model without the modules and signals that Windows lacks, and with its lock.

They run here, in a process where those cannot be imported; what of Windows itself differs else is not tested.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import command, import_everything, write_inputs
from tests.commands import Process

ROOT = Path(__file__).parents[1]


def _there(lines: list[list[str]]) -> None:
    """Run commands in a process that has none of it; what the parent had imported of this package is imported anew."""
    plain_import, held = builtins.__import__, dict[int, int]()

    def import_there(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        ours = str((globals or {}).get("__name__")).startswith("unigrpo")  # other packages are not those of Windows
        if ours and name in ("fcntl", "resource", "pwd", "grp", "termios"):
            raise ImportError(name)
        return plain_import(name, globals, locals, fromlist, level)

    def locking(file: int, mode: int, count: int) -> None:
        key = os.fstat(file).st_ino
        if held.setdefault(key, file) != file:
            raise PermissionError(13, "Permission denied")

    def no_links(*arguments: object, **more: object) -> None:
        raise OSError("[WinError 1314] A required privilege is not held by the client")

    for name in [name for name in sys.modules if name.startswith("unigrpo")]:
        del sys.modules[name]
    builtins.__import__, os.symlink = import_there, no_links
    for name in ("SIGHUP", "SIGALRM", "SIGUSR1", "pthread_kill"):
        delattr(signal, name)
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)  # type: ignore[assignment]
    importlib.import_module("unigrpo_cli.io.atomic").WINDOWS = True  # type: ignore[attr-defined]
    app = importlib.import_module("unigrpo_cli.cli").app
    for arguments in lines:
        assert not app(arguments, standalone_mode=False), arguments


def test_train_resume_eval_and_generate_work(tmp_path: Path, small_model: Path) -> None:
    run = tmp_path / "run"
    short = ("train.steps=1", "eval.every=0", "eval.best=''", "doctor.at_start=off", f"model={small_model}")
    line = command(run, write_inputs(tmp_path), short)
    lines = [
        line,
        [*line, "--steps", "2"],
        ["generate", "a red circle", "--model", str(run), "--set", "threads=1", "--out", str(tmp_path / "g")],
        ["eval", "--model", str(run), "--set", "eval.limit=1", "--set", "threads=1", "--out", str(tmp_path / "e")],
    ]
    import_everything()
    code, output, errors = Process(_there, lines).ended()
    assert code == 0, output + errors
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
