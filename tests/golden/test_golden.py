"""Numeric outputs of the official codes, or of any others in the same files: `--golden-dir DIR`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from unigrpo_cli.algo import flow
from unigrpo_plugins.geneval_rules import DetectedObject, judge, keep_confident


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("--golden-dir")


def _needs(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not in this golden directory")
    return path


def test_flow_steps_agree_with_flow_grpo(golden: Path) -> None:
    """Mean and both log-probabilities of every case within 1e-6; relative for numbers above 1, as fp32 rounds."""
    data = load_file(_needs(golden / "flow_sde.safetensors"))
    cases = sorted({name.split(".")[0] for name in data})
    assert cases
    for case in cases:
        g = {name.split(".", 1)[1]: value for name, value in data.items() if name.startswith(case + ".")}
        sigmas, k = g["sigmas"], int(g["step"])
        shape = g["sample"].shape
        x, v, drawn, other = (
            g[name].reshape(shape[0], shape[1], -1) for name in ("sample", "velocity", "prev", "other_prev")
        )
        common = {"noise_level": float(g["noise_level"]), "t_second": sigmas[1]}
        for x_next, expected in ((drawn, g["log_prob_of_prev"]), (other, g["log_prob_of_other_prev"])):
            action = flow.step("flow", x, v, sigmas[k], sigmas[k + 1], x_next=x_next, **common)
            assert (action.p.mean.reshape(shape) - g["prev_mean"]).abs().max() <= 1e-6, case
            assert ((action.log_prob - expected).abs() <= 1e-6 * expected.abs().clamp_min(1)).all(), case


def test_geneval_verdicts_are_the_official_ones(golden: Path) -> None:
    """Every row: detections in, official verdict out, at the official thresholds."""
    lines = _needs(golden / "geneval_rules.jsonl").read_text().splitlines()
    assert lines
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        seen = {
            label: [DetectedObject(d["score"], tuple(d["box"]), d["color"]) for d in found]
            for label, found in row["detections"].items()
        }
        kept = keep_confident(seen, row["metadata"], threshold=0.3, counting_threshold=0.9)
        verdict = judge(kept, row["metadata"])
        assert verdict.correct == row["correct"], f"row {number}: {verdict.reasons}"
