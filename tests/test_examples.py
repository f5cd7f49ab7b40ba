"""Examples run as their pages say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tests.commands import unigrpo
from unigrpo_cli.config import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"


SMALL = ["train.prompts_per_step=2", "train.group_size=2", "eval.steps=2", "doctor.at_start=off"]
SETTINGS = [word for setting in SMALL for word in ("--set", setting)]


def test_the_custom_reward_is_four_lines_and_trains(tmp_path: Path, small_model: Path, one_prompt: str) -> None:
    path = EXAMPLES / "custom_reward" / "redness.py"
    code = path.read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) == 4
    tested = unigrpo("rewards", "test", "redness", "--plugin", path)
    assert tested.exit_code == 0, tested.output
    run = ["--steps", 1, "--out", tmp_path / "run", "--model", small_model, "--set", one_prompt, "--json"]
    trained = unigrpo("train", "--reward", "redness", "--plugin", path, *run, *SETTINGS)
    assert trained.exit_code == 0, trained.output
    summary = json.loads(trained.stdout)
    assert 0 < summary["eval_after"]["redness"] < 1
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["reward/redness"] > 0


def test_the_plugin_that_writes_csv_is_ten_lines_and_writes_a_line_per_step(
    tmp_path: Path, small_model: Path, one_prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = EXAMPLES / "metrics_csv" / "metrics_csv.py"
    assert len([line for line in path.read_text().split('"""')[2].splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    run = ["--steps", 2, "--out", "run", "--model", small_model, "--set", one_prompt]
    done = unigrpo("train", "--reward", "clean", "--plugin", path, *run, *SETTINGS)
    assert done.exit_code == 0, done.output
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert [(int(a), float(b), float(c)) for a, b, c, _ in lines] == [
        (row["step"], row["loss"], row["advantage/std"]) for row in logged
    ]
    assert {int(texts) for *_, texts in lines} <= {1, 2}


def test_examples_are_listed_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = json.loads(unigrpo("examples", "--json").stdout)["examples"]
    pages = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert {row["name"] for row in listed} == pages
    assert all(row["summary"] for row in listed)
    for name in pages:
        assert unigrpo("examples", name).exit_code == 0
        tracked = {p.relative_to(EXAMPLES / name) for p in (EXAMPLES / name).rglob("*") if p.is_file()}
        copied = {p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*") if p.is_file()}
        assert copied == {p for p in tracked if not {"__pycache__", ".pytest_cache"} & set(p.parts)}
    again = unigrpo("examples", "embedded")
    assert again.exit_code == 2
    assert "choose another --out" in again.stderr
    wrong = unigrpo("examples", "embeded", "--out", "x")
    assert wrong.exit_code == 2
    assert "did you mean embedded" in wrong.stderr


def test_the_package_ships_every_file_of_the_examples() -> None:
    """As setuptools reads the patterns of pyproject.toml: one level per star."""
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert project["package-dir"]["unigrpo_examples"] == "examples"
    shipped = {p for pattern in project["package-data"]["unigrpo_examples"] for p in EXAMPLES.glob(pattern)}
    files = {p for p in EXAMPLES.glob("*/**/*") if p.is_file() and not {"__pycache__", ".pytest_cache"} & set(p.parts)}
    assert files <= shipped


def test_the_example_for_one_gpu_is_the_preset() -> None:
    example = load_config(file=EXAMPLES / "bagel_one_gpu" / "config.toml")
    preset = load_config(preset="bagel-one-gpu")
    assert example == preset.model_copy(update={"prompts": "prompts.txt"})
    assert (preset.train.finetune, preset.memory_gb, preset.eval.suite) == ("lora", 80, "geneval")
