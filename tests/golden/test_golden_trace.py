"""Golden training traces: every number of twenty steps as it was, and none of them blind to the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tools.trace import COMMAND, ELSEWHERE, RUNS, Row, differences, read, trace, written
from unigrpo_cli import train as training
from unigrpo_cli.algo import advantage, flow, surrogate
from unigrpo_cli.training import advantages
from unigrpo_cli.training.advantages import combined_advantage
from unigrpo_cli.training.schedule import prompts_for

FILE = Path(__file__).parent / "trace.txt"
LONG = pytest.mark.long
EXACT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.fixture(scope="module")
def golden() -> dict[str, list[Row]]:
    return read(FILE.read_text())


def test_the_file_says_how_it_is_made(golden: dict[str, list[Row]]) -> None:
    first, second = FILE.read_text().splitlines()[:2]
    assert first == COMMAND
    assert second.startswith("torch 2.")
    assert {name: len(rows) for name, rows in golden.items()} == {"full": 20, "adapters": 20, "embedded": 3}
    assert read(written(golden)) == golden


@pytest.mark.parametrize(
    ("name", "steps"), [("full", 6), ("adapters", 6), ("embedded", 1), *(pytest.param(n, 0, marks=LONG) for n in RUNS)]
)
def test_training_is_what_it_was(golden: dict[str, list[Row]], name: str, steps: int) -> None:
    """Its first steps, or all. If it is meant to be another: CONTRIBUTING.md says when; the file's first line, how."""
    wanted = golden[name][: steps or None]
    found = trace(RUNS[name], [f"train.steps={len(wanted)}"])
    assert len(found) == len(wanted)
    relative = RUNS[name].relative if EXACT else ELSEWHERE
    changed = differences(found, wanted, relative)
    written_by = FILE.read_text().splitlines()[1]
    assert not changed, f"{len(changed)} numbers changed (written by {written_by}), first: {changed[:8]}"


def test_every_expert_moves_and_every_clip_binds_in_part(golden: dict[str, list[Row]]) -> None:
    """A trace in which nothing were clipped, or all, would not see the clip."""
    for name in ("full", "adapters"):
        for key in ("text/clip_fraction", "image/clip_fraction"):
            assert 0.02 < sum(row[key] for row in golden[name]) / 20 < 0.6, (name, key)
        assert golden[name][0]["text/first_max_abs_log_ratio"] == golden[name][0]["image/first_max_abs_log_ratio"] == 0
        assert all(golden[name][-1][f"weights/{expert}/moved"] > 0.1 for expert in ("text", "image"))


ONE = "train.steps=1"


@pytest.mark.parametrize(
    "change",
    [
        "sampling.shift=3.001",
        "sampling.noise_level=0.999",
        "sampling.temperature=1.001",
        "sampling.window=fixed",
        "objective.text_clip=0.0201",
        "objective.image_clip=3.01e-5",
        "objective.penalty_weight=0.101",
        "objective.penalty=latent-kl",
        "objective.image_weight=1.01",
        "objective.text_weight=1.01",
        "objective.trust_region=ratio",
        "objective.grad_through_context=false",
        "advantage.normalize=batch",
        "train.betas=[0.901, 0.999]",
        "train.betas=[0.9, 0.9991]",
        "train.lr_text=1.001e-3",
        "train.lr_image=3.003e-4",
        "train.grad_clip=1.001",
        "train.weight_decay=1e-3",
        "train.minibatches=1",
    ],
)
def test_a_setting_a_little_off_is_seen_in_the_first_step(golden: dict[str, list[Row]], change: str) -> None:
    assert differences(trace(RUNS["full"], [ONE, change]), golden["full"], 1e-6), change


def _negated(*args, **kwargs) -> torch.Tensor:
    return -combined_advantage(*args, **kwargs)


def _in_another_order(*args) -> list:
    return prompts_for(*args)[::-1]


BREAKAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "advantages of the other sign": lambda patch: patch.setattr(advantages, "combined_advantage", _negated),
    "another eps": lambda patch: patch.setitem(advantage.group_advantage.__kwdefaults__, "eps", 1e-4),
    "prompts in another order": lambda patch: patch.setattr(training, "prompts_for", _in_another_order),
    "ratios cut at 1": lambda patch: patch.setattr(surrogate, "MAX_LOG_RATIO", 0.1),
    "steps of another length": lambda patch: patch.setattr(flow, "euler", lambda x, v, t, t_next: x + v * (t - t_next)),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_a_broken_algorithm_is_seen_in_the_first_step(
    golden: dict[str, list[Row]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    BREAKAGES[what](monkeypatch)
    assert differences(trace(RUNS["full"], [ONE]), golden["full"], 1e-6)


@pytest.mark.skipif(not EXACT, reason="promised to 1e-6 with AVX2 only")
@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ("train.micro_batch_size=5", 1),
        ("sampling.batch_size=7", 1),
        ("train.activation_checkpointing=true", 1),
        ("train.reference_device=host", 2),  # in the first step the policy is its reference
        ("reward.overlap=none", 1),
    ],
)
def test_what_changes_no_number_changes_none(golden: dict[str, list[Row]], change: str, steps: int) -> None:
    """Settings of memory and speed: the control of the two tests above."""
    assert not differences(trace(RUNS["full"], [f"train.steps={steps}", change]), golden["full"], 1e-6)
