"""Compiled layers draw what plain ones draw, and replays do without them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_rollout import SAMPLING, WINDOW
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Episode, Prompt, TextActions, flatten
from unigrpo_cli.errors import UsageError
from unigrpo_cli.evaluate import eval_sampling, train_sampling
from unigrpo_cli.models.lora import add_adapters
from unigrpo_cli.models.mot import network
from unigrpo_cli.models.mot.config import LORA_TARGETS
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.replay import collate, replay
from unigrpo_cli.rollout import rollout

PROMPTS = [Prompt("a", "a red circle"), Prompt("b", "two blue stars and a green heart")]


class Traced:
    """A backend that runs what was traced as it is, so that only tracing can be wrong; it counts."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*given: Any) -> Any:
            self.calls += 1
            return graph(*given)

        return run


def _compile_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    made = torch.compile(network.MoTLayer.forward, fullgraph=True, dynamic=True, backend=backend)
    monkeypatch.setattr(network, "_compiled_forward", lambda: made)


def _drawn(policy: MoTPolicy, members: int, compiled: bool, rows: int = 8, think: bool = True) -> list[Episode]:
    sampling = replace(SAMPLING, compiled=compiled, batch_size=rows, think=think)
    return flatten(rollout(policy, PROMPTS, members, sampling, WINDOW, 0))


def _same(ours: list[Episode], plain: list[Episode], tolerance: float) -> None:
    for a, b in zip(ours, plain, strict=True):
        for mine, other in zip(a.segments, b.segments, strict=True):
            if isinstance(mine, TextActions):
                assert torch.equal(mine.ids, other.ids)
        torch.testing.assert_close(a.images[-1].latent, b.images[-1].latent, rtol=0, atol=tolerance)


@pytest.mark.parametrize("think", [False, pytest.param(True, marks=pytest.mark.long)])
def test_traced_layers_are_the_layers(tiny: MoTPolicy, monkeypatch: pytest.MonkeyPatch, think: bool) -> None:
    """With adapters, and masks for texts of two lengths; what was traced for some rows does for others."""
    add_adapters(tiny.network, LORA_TARGETS if think else ".*q_proj.*", rank=2, alpha=4.0, seed=0)
    backend = Traced()
    _compile_by(backend, monkeypatch)
    own = {
        "rows": 5,
        "think": think,
    }  # a number of rows that no size of the network has: torch takes equal ones for one
    _same(_drawn(tiny, 5, True, **own), _drawn(tiny, 5, False, **own), 0.0)
    assert backend.calls > 2 * SAMPLING.steps, "every layer of every call"
    graphs = backend.graphs
    own["rows"] = 7
    _same(_drawn(tiny, 7, True, **own), _drawn(tiny, 7, False, **own), 0.0)
    assert backend.graphs == graphs


def test_replays_do_without(tiny: MoTPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old scores have no gradient and new ones have: the ratio of both is 1 only if neither is compiled."""

    def never(layer: nn.Module, *given: Any) -> None:
        raise AssertionError("compiled")

    episodes = _drawn(tiny, 2, False)
    monkeypatch.setattr(network, "_by_compiled", never)
    with pytest.raises(AssertionError, match="compiled"):
        _drawn(tiny, 2, True)
    with torch.no_grad():
        replay(tiny, collate(episodes, tiny.device))
    replay(tiny, collate(episodes, tiny.device))


def test_what_cannot_be_compiled_is_one_line(tiny: MoTPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> None:
        raise RuntimeError("no compiler")

    _compile_by(broken, monkeypatch)
    with pytest.raises(UsageError, match=r"cannot be compiled here \(.*; give sampling.compile=false"):
        _drawn(tiny, 1, True)


def test_the_setting_reaches_the_rollout() -> None:
    config = load_config(overrides=["sampling.compile=true"])
    assert train_sampling(config).compiled and eval_sampling(config).compiled
    assert not train_sampling(load_config()).compiled


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU by g++")
@pytest.mark.parametrize("rows", [8, 2])
def test_compiled_layers_round_and_no_more(tiny: MoTPolicy, rows: int) -> None:
    torch.set_num_threads(2)
    _same(_drawn(tiny, 3, True, rows), _drawn(tiny, 3, False, rows), 1e-9)
