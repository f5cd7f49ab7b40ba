"""Numeric outputs of the official codes, or of any others in the same files: `--golden-dir DIR`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unigrpo_cli.algo import flow
from unigrpo_cli.models.mot import MoT, NoisyImage
from unigrpo_cli.models.sizes import read_config
from unigrpo_plugins.geneval_rules import Seen, judge, keep_confident


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("--golden-dir")


def _needs(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not in this golden directory")
    return path


def test_flow_steps_agree_with_flow_grpo(golden: Path) -> None:
    """Mean and both log-probabilities of every case within 1e-6."""
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
            assert (action.log_prob - expected).abs().max() <= 1e-6, case


def test_geneval_verdicts_are_the_official_ones(golden: Path) -> None:
    """Every row: detections in, official verdict out, at the official thresholds."""
    lines = _needs(golden / "geneval_rules.jsonl").read_text().splitlines()
    assert lines
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        seen = {
            label: [Seen(d["score"], tuple(d["box"]), d["color"]) for d in found]
            for label, found in row["detections"].items()
        }
        kept = keep_confident(seen, row["metadata"], threshold=0.3, counting_threshold=0.9)
        verdict = judge(kept, row["metadata"])
        assert verdict.correct == row["correct"], f"row {number}: {verdict.reasons}"


@pytest.fixture
def bagel(golden: Path) -> tuple[MoT, dict[str, torch.Tensor], Path]:
    """The official code's tiny checkpoint in our network, fp32."""
    directory = _needs(golden / "bagel_tiny")
    ids = json.loads((directory / "golden.json").read_text())["special_token_ids"]
    network = MoT(read_config(directory), (ids["<|vision_start|>"], ids["<|vision_end|>"]))
    weights = load_file(directory / "ema.safetensors")
    ours = {k: v.float() for k, v in weights.items() if k in network.state_dict()}
    network.load_state_dict(ours, strict=True)
    return network, load_file(directory / "golden.safetensors"), directory


@torch.no_grad()
def test_text_expert_agrees_with_bagel(bagel) -> None:
    """Logits at every position, read at once and piece by piece into the cache."""
    network, g, _ = bagel
    ids = g["text.input_ids"][None]
    whole = network(network.empty_context(1), ids).hidden_BLC
    assert (network.logits(whole)[0] - g["text.logits"]).abs().max() < 2e-5
    context, pieces = network.empty_context(1, capacity=ids.shape[1]), []
    for a, b in [(0, 50), (50, 91), *((k, k + 1) for k in range(91, ids.shape[1]))]:
        out = network(context, ids[:, a:b])
        context = out.context
        pieces.append(out.hidden_BLC)
    assert (network.logits(torch.cat(pieces, dim=1))[0] - g["text.logits"]).abs().max() < 2e-5


@torch.no_grad()
@pytest.mark.parametrize(("name", "grid"), [("64x64", (4, 4)), ("48x80", (3, 5))])
def test_velocities_agree_with_bagel(bagel, name: str, grid: tuple[int, int]) -> None:
    """Four times at once against a cached context; square and not."""
    network, g, _ = bagel
    context = network(network.empty_context(1), g["context.ids"][None]).context
    image = NoisyImage(g[f"velocity.{name}.x_t"][None], g["velocity.timesteps"][None], grid)
    v = network(context, image=image).velocity_BKND
    assert (v[0] - g[f"velocity.{name}.v"]).abs().max() < 1e-5


@torch.no_grad()
def test_packed_pass_agrees_with_bagels_training_forward(bagel) -> None:
    """Context and three noisy copies in one pass: the official packed and separate velocities, and logits."""
    network, g, _ = bagel
    image = NoisyImage(g["packed.x_t"][None], g["packed.timesteps"][None], (3, 5))
    out = network(network.empty_context(1), g["context.ids"][None], image=image)
    assert (out.velocity_BKND[0] - g["packed.v_packed"]).abs().max() < 1e-5
    assert (out.velocity_BKND[0] - g["packed.v_separate"]).abs().max() < 1e-5
    assert (network.logits(out.hidden_BLC)[0, -1] - g["packed.context_logits_last"]).abs().max() < 2e-5
