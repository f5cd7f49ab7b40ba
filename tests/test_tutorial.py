"""Every command of docs/tutorial.md runs, in order, in one directory."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import unigrpo

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
RUN = re.compile(r"<!-- run -->\n```\n(.*?)```", re.DOTALL)


def _less(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


FEW = _less("sampling.steps=4", "sampling.window_range=[0, 3]", "sampling.window_size=2")
LESS = {
    "generate": ["-n", "1", *_less("eval.steps=2")],
    "eval": ["--limit", "1", *_less("eval.steps=2")],
    "rollout": ["--limit", "1", "--group-size", "2", *FEW],
    "train": [
        "--steps=1",
        *_less("eval.limit=1", "eval.steps=2", "train.prompts_per_step=2", "train.group_size=2", "doctor.at_start=off"),
        *_less("sampling.max_new_tokens=12"),
        *FEW,
    ],
    "doctor": FEW,
}
"""What follows the options of a command here, so that it is short."""


def test_every_command_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "redness.py").write_text(source)
    done = []
    for lines in RUN.findall(PAGE):
        for line in lines.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "unigrpo"
            result = unigrpo(*arguments, *LESS.get(arguments[0], []))
            assert result.exit_code == 0, f"{line}: {result.output}"
            done.append(arguments[0])
    assert len(done) == PAGE.count("\nunigrpo ") - 1, "all commands but the one that resumes an interrupted run"
    assert {"generate", "eval", "rollout", "train", "rewards", "doctor"} <= set(done)
    for left in ("drawn/sheet.png", "groups/episodes.json", "first/samples/progress.png", "redder/summary.json"):
        assert (tmp_path / left).is_file(), left
