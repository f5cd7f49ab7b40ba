"""The doctor at the command line and at the start of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import unigrpo
from unigrpo_cli import train
from unigrpo_cli.run.doctor import CHECKS

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = [
    *("--set", "sampling.steps=4"),
    *("--set", "sampling.window_range=[0, 3]"),
    *("--set", "sampling.window_size=2"),
]
TINY_RUN = [
    *("--reward", "jpeg"),
    *("--steps", "1"),
    *FEW,
    *("--set", "eval.rewards=[]"),
    *("--set", "eval.steps=2"),
    *("--set", "eval.limit=1"),
    *("--set", "train.prompts_per_step=2"),
    *("--set", "train.group_size=4"),
    *("--set", "train.samples_every=0"),
]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--reward", "clip,geneval,redness", "--plugin", EXAMPLES / "custom_reward" / "redness.py"],
        ["--reward", "aesthetic,vlm,jpeg,length,format,plan,fidelity,clean", "--set", "train.finetune=lora"],
    ],
)
def test_the_embedded_model_and_our_rewards_are_sound(arguments: list) -> None:
    done = unigrpo("doctor", *FEW, *arguments, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [f["name"] for f in found] == [check.name for check in CHECKS]
    assert all(set(f) == {"name", "verdict", "value", "limit", "seen", "means", "remedy"} for f in found)
    assert [f["name"] for f in found if f["verdict"] == "skipped"] == ["looks"]  # one round looks at nothing


def _flip(monkeypatch: pytest.MonkeyPatch) -> None:
    own = train.advantages
    monkeypatch.setattr(train, "advantages", lambda *given: -own(*given))


def test_a_fault_is_explained_and_exits_with_six(monkeypatch: pytest.MonkeyPatch, small_model: Path) -> None:
    _flip(monkeypatch)
    done = unigrpo("doctor", "--reward", "jpeg", "--model", small_model, *FEW)
    assert done.exit_code == 6
    assert "error: the doctor found 1 fault: advantages" in done.stderr
    assert "advantages: FAULT" in done.stdout
    for word in ("seen ", "means ", "remedy "):
        assert word in done.stdout


def test_a_fault_stops_a_run_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    """One line for the fault, one for the stop; --out can be used again; `warn` trains all the same."""
    _flip(monkeypatch)
    out = tmp_path / "run"
    begin = ["train", *TINY_RUN, "--model", small_model, "--out", out]
    done = unigrpo(*begin)
    assert done.exit_code == 6
    assert "warning: doctor: advantages:" in done.stderr
    assert "nothing was trained: advantages; `unigrpo doctor`" in done.stderr
    assert not out.exists()
    done = unigrpo(*begin, "--set", "doctor.at_start=warn")
    assert done.exit_code == 0, done.output
    assert "warning: doctor: advantages:" in done.stderr
    assert json.loads((out / "doctor.json").read_text())["faults"] == 1


def test_a_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    weights, lines = [], []
    for at_start in ("stop", "off"):
        out = tmp_path / at_start
        done = unigrpo("train", *TINY_RUN, "--out", out, "--set", f"doctor.at_start={at_start}")
        assert done.exit_code == 0, done.output
        weights.append(load_file(out / "checkpoints" / "step_000001" / "ema.safetensors"))
        lines.append([line for line in done.output.splitlines() if line.startswith("doctor:")])
        assert (out / "doctor.json").exists() == (at_start == "stop")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    ((line,), nothing) = lines
    assert not nothing
    assert "checks, nothing wrong" in line
    report = json.loads((tmp_path / "stop" / "doctor.json").read_text())
    assert report["faults"] == 0
    assert {f["name"] for f in report["checks"]} == {check.name for check in CHECKS if check.short}
    before = (tmp_path / "stop" / "doctor.json").stat().st_mtime_ns
    done = unigrpo("train", "--resume", tmp_path / "stop")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "stop" / "doctor.json").stat().st_mtime_ns == before, "a resumed run is not examined again"


def test_adapters_with_no_run_to_put_them_on_are_refused(tmp_path: Path) -> None:
    done = unigrpo("doctor", "--reward", "clean", "--adapter", tmp_path)
    assert done.exit_code == 2
    assert "train.finetune=lora" in done.stderr
