"""Every command of docs/tutorial.md runs, in order, in one directory."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unigrpo_cli.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
RUN = re.compile(r"<!-- run(?:: (?P<kind>\w+))? -->\n```\n(?P<lines>.*?)```", re.DOTALL)
FEW = ["--set", "eval.limit=1"]
SHORT = [*FEW, "--steps", "1", "--set", "train.prompts_per_step=2", "--set", "train.group_size=4"]
APPENDED = {None: [], "few": FEW, "short": SHORT}


def test_every_command_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands marked `run`; `few` and `short` append options, so that evaluations and training are short here."""
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "redness.py").write_text(source)
    done = []
    for match in RUN.finditer(PAGE):
        for line in match["lines"].strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "unigrpo"
            more = APPENDED[match["kind"]] if arguments[0] in ("train", "eval") else []
            result = CliRunner().invoke(app, [*arguments, *more])
            assert result.exit_code == 0, f"{line}: {result.output}"
            done.append(arguments[0])
    assert len(done) == PAGE.count("\nunigrpo ") - 1, "all commands but the one that resumes an interrupted run"
    assert {"generate", "eval", "rollout", "train", "rewards", "doctor"} <= set(done)
    for left in ("drawn/sheet.png", "groups/episodes.json", "first/samples/progress.png", "redder/summary.json"):
        assert (tmp_path / left).is_file(), left
