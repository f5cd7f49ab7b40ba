"""Examples run as their pages say."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from unigrpo_cli.cli import app

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_custom_reward_is_four_lines_and_trains(tmp_path: Path) -> None:
    path = EXAMPLES / "custom_reward" / "redness.py"
    code = path.read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) == 4
    tested = CliRunner().invoke(app, ["rewards", "test", "redness", "--plugin", str(path)])
    assert tested.exit_code == 0, tested.output
    small = ["--set", "train.prompts_per_step=2", "--set", "train.group_size=4", "--set", "eval.limit=1"]
    trained = CliRunner().invoke(
        app,
        [
            "train",
            *("--reward", "redness", "--plugin", str(path), "--steps", "1"),
            *("--out", str(tmp_path / "run"), "--json", *small),
        ],
    )
    assert trained.exit_code == 0, trained.output
    summary = json.loads(trained.stdout)
    assert 0 < summary["eval_after"]["redness"] < 1
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["reward/redness"] > 0
