"""How often training waits for the device: reading a number, a mask's positions, or a tensor from it.

Counted on a CPU, by the calls that would wait on an accelerator.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt, flatten
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.replay import replay
from unigrpo_cli.rollout import rollout
from unigrpo_cli.train import score_old_and_reference, update, with_advantages
from unigrpo_cli.training.metrics import drift, memory
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.schedule import objective_of, window_of
from unigrpo_cli.training.state import TrainState
from unigrpo_cli.training.update_guard import check_batch

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "__bool__", "__int__", "__float__"}
ON_HOST = ("/torch/optim/", "/training/optimizer.py:<genexpr>")  # the optimizer counts its steps on the host


class Waits(TorchFunctionMode):
    """Counts calls that read from a device, by the line of the package that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        by_mask = name == "__getitem__" and any(
            isinstance(key, Tensor) and key.dtype == torch.bool
            for key in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in READS or by_mask:
            self.lines[_caller(name)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(count for line, count in self.lines.items() if not any(part in line for part in ON_HOST))


def _caller(name: str) -> str:
    frame = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename and "/torch/optim/" not in frame.f_code.co_filename:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_name}:{frame.f_lineno} {name}"


@pytest.fixture(scope="module")
def prepared() -> tuple:
    """A state, eight episodes on it, and the settings."""
    small = ["train.prompts_per_step=2", "train.group_size=4", "train.minibatches=1", "threads=1"]
    config = load_config(overrides=[*small, "sampling.max_new_tokens=6", "sampling.steps=5"])
    policy = load_model("embedded")
    policy.network.requires_grad_(False)
    policy = prepare_policy(policy, config)
    prompts = [Prompt("a", "a red circle"), Prompt("b", "a blue square")]
    groups = rollout(policy, prompts, 4, train_sampling(config), window_of(config, 0), seed=0)
    return TrainState(policy, make_optimizer(policy, config)), groups, config


def _waits_of_an_update(prepared: tuple, micro_batch_size: int) -> Waits:
    state, groups, config = prepared
    train = config.train.model_copy(update={"micro_batch_size": micro_batch_size})
    config, objective = config.model_copy(update={"train": train}), objective_of(config)
    episodes = flatten(groups)
    minibatches = score_old_and_reference(state.policy, episodes, config, objective)
    (share,) = with_advantages(minibatches, torch.linspace(-1, 1, len(episodes))[:, None].expand(-1, 2))
    with Waits() as waits:
        update(state, share, objective, config)
    return waits


def test_a_micro_batch_waits_at_most_three_times_and_an_update_twice(prepared: tuple) -> None:
    few, many = (_waits_of_an_update(prepared, size) for size in (4, 1))
    each = (many.total - few.total) / (8 - 2)
    assert each <= 3, many.lines
    assert few.total - 2 * each <= 2, few.lines
    assert many.total > 0, "the counter sees them"


def test_checks_and_drift_wait_once_per_step_not_per_micro_batch(prepared: tuple) -> None:
    state, groups, config = prepared
    counts = []
    for size in (4, 1):
        train = config.train.model_copy(update={"micro_batch_size": size})
        own = config.model_copy(update={"train": train})
        (share,) = score_old_and_reference(state.policy, flatten(groups), own, objective_of(own))
        with Waits() as waits:
            check_batch([], [(m.batch, m.old, m.reference) for m in share])
            drift([(m.batch, m.old) for m in share])
        counts.append(waits.total)
    assert counts[0] == counts[1], "whatever the number of micro-batches"


def test_a_replay_does_not_wait_for_its_own_masks(prepared: tuple) -> None:
    state, groups, config = prepared
    (share,) = score_old_and_reference(state.policy, flatten(groups), config, objective_of(config))
    with Waits() as waits, torch.no_grad():
        replay(state.policy, share[0].batch)
    assert not [line for line in waits.lines if "replay.py" in line], waits.lines


def test_the_peak_of_a_card_is_asked_of_the_policys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: asked.append(device) or 3 * 2**30)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", asked.append)
    assert memory(torch.device("cuda", 1))["memory/gpu_peak"] == 3
    assert asked == [torch.device("cuda", 1)] * 2
    assert "memory/gpu_peak" not in memory(torch.device("cpu"))
