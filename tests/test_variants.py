"""Every named choice of the algorithm, run twice: first ratio 1, finite numbers, what is trained moves, to the bit.

The list comes from the configuration's own annotations, so that a new value is run without being named here. The
model is the embedded architecture with a few thousand weights to train.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from tools.toy_model import build_model
from unigrpo_cli import RewardContext, reward
from unigrpo_cli.config import AdvantageConfig, Config, ObjectiveConfig, SamplingConfig, TrainConfig, load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.mot.config import expert_of
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.train import StepResult, train
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

SECTIONS = {
    "sampling": SamplingConfig,
    "objective": ObjectiveConfig,
    "advantage": AdvantageConfig,
    "train": TrainConfig,
}
SMALL = [
    "threads=1",
    "sampling.max_new_tokens=3",
    "sampling.height=16",
    "sampling.width=16",
    "sampling.steps=3",
    "sampling.noise_level=0.7",
    "sampling.window_size=1",
    "sampling.window_range=[0, 2]",
    "sampling.window_period=2",
    "objective.text_kl=0.1",
    "objective.penalty_weight=0.1",
    "objective.image_clip=1e-4",
    "objective.draws=2",
    "train.prompts_per_step=2",
    "train.minibatches=2",
    "train.group_size=3",
    "train.micro_batch_size=8",
    "train.lora_rank=2",
    "train.lr_text=1e-3",
    "train.lr_image=1e-3",
]
STEPS = ("train.steps=2", "sampling.window_period=1")
"""The window of the second step is another one."""
COUNTER = count()
PROMPTS = [Prompt(t, t) for t in ("a red circle", "two stars", "a heart")]
TOWER = ('train.extra_modules=["connector"]', 'train.extra_modules=["vision"]')


def _choices(key: str, annotation: Any) -> list[str]:
    """The settings that a field's annotation names: the values of a Literal, of a bool, each one of a tuple's."""
    if get_origin(annotation) is Literal:
        return [f"{key}={value}" for value in get_args(annotation)]
    if annotation is bool:
        return [f"{key}=true", f"{key}=false"]
    if get_origin(annotation) is tuple and get_origin(get_args(annotation)[0]) is Literal:
        return [f'{key}=["{value}"]' for value in get_args(get_args(annotation)[0])]
    return []


FIELDS = {
    f"{section}.{name}": choices
    for section, own in SECTIONS.items()
    for name, field in own.model_fields.items()
    if name != "report_to" and (choices := _choices(f"{section}.{name}", field.annotation))
}
"""Trackers get numbers and give none: `test_trackers.py` is about them."""
NUMBERS = [
    "train.minibatches=1",
    "train.epochs=2",
    "train.micro_batch_size=2",
    "train.warmup=5",
    "train.lr_decay=2",
    "advantage.clamp=0.5",
    "sampling.guidance_text=3",
]


COMPILED = "sampling.compile=true"
LONG = bool(os.environ.get("UNIGRPO_LONG_TESTS"))
"""Compiling takes eighteen seconds, and `test_compiled.py` is about it."""
ALONE = ("advantage.shuffle=true", COMPILED)
"""Not combined: a run that learns nothing, and a slow one."""


def _combinations(wanted: int) -> list[tuple[str, ...]]:
    """Random settings of all fields at once, those that the configuration and the tuning accept."""
    draw, found = random.Random(3), []
    while len(found) < wanted:
        settings = [draw.choice(choices) for choices in FIELDS.values()]
        settings = [s for s in settings if not s.startswith("train.extra_modules") and s not in ALONE]
        settings.append(f"train.epochs={draw.choice((1, 2))}")
        forward = not {"objective.image=fpo", "objective.image=nft"}.isdisjoint(settings)
        about_steps = not {"objective.trust_region=ratio", "objective.penalty=latent-kl"}.isdisjoint(settings)
        if not {"sampling.think=false", "train.experts=text"} <= set(settings) and not (forward and about_steps):
            found.append(tuple(settings))
    return found


# The kernels' own log-probabilities under every trust region and penalty, which the single settings do not meet.
CROSSED = [
    pytest.param(
        (f"sampling.sde={sde}", f"objective.trust_region={trust}", f"objective.penalty={penalty}"),
        marks=[pytest.mark.long] * (more > 0),
    )
    for sde in ("dance", "cps")
    for more, (trust, penalty) in enumerate(
        (("ratio", "latent-kl"), ("ratio", "velocity-mse"), ("ratio-norm", "latent-kl"))
    )
]


def _config(*settings: str) -> Config:
    return load_config(overrides=[*SMALL, *settings])


LEFT_OUT = TOWER if LONG else (*TOWER, COMPILED)
NAMED = [s for own in FIELDS.values() for s in own if s not in LEFT_OUT and _config(s) != _config()]


@reward("vowels", range=(0, 1))
def vowels(reasoning):
    return [sum(map((text or "").count, "aeiou")) / max(len(text or ""), 1) for text in reasoning]


@reward("light", range=(0, 255))
def light(pixels):
    return [float(p.mean()) for p in pixels]


@cache
def _run(*settings: str) -> tuple[tuple[StepResult, ...], tuple[dict[str, Tensor], ...], dict[str, bool]]:
    """The steps, all weights before the first and after each, and which of them are trained."""
    config = _config(*settings)
    model = build_model(seed=3, width=16, layers=1)
    with torch.no_grad():  # larger words and pictures than an untrained model's, so that members differ
        model.network.language_model.lm_head.weight.mul_(2)
    torch.manual_seed(next(COUNTER))  # no two runs alike: nothing may draw from torch's own generator
    policy = prepare_policy(model, config)
    state = TrainState(policy, make_optimizer(policy, config))
    plugins = Plugins()
    plugins.rewards.add("vowels", vowels)
    plugins.rewards.add("light", light)
    steps: list[StepResult] = []
    weights = [_weights(policy.network)]

    def note(step: StepResult) -> bool:
        steps.append(step)
        weights.append(_weights(policy.network))
        return False

    with Scorer(parse_rewards(["vowels,light"]), plugins, RewardContext("cpu", config.seed, True, True)) as rewards:
        train(state, PROMPTS, rewards, config, note)
    return tuple(steps), tuple(weights), {n: p.requires_grad for n, p in policy.network.named_parameters()}


def _weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def _numbers(step: StepResult) -> dict[str, float]:
    """The metrics that the algorithm decides, not the machine."""
    return {n: v for n, v in step.metrics.items() if n.startswith(("loss", "reward/", "advantage/", "text/", "image/"))}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor], expert: str = "") -> bool:
    return all(torch.equal(a[name], b[name]) for name in a if expert in ("", expert_of(name)))


@pytest.mark.parametrize(
    "settings", [(), *((s,) for s in [*NAMED, *NUMBERS]), *CROSSED, *_combinations(3)], ids=",".join
)
def test_two_steps(settings: Sequence[str]) -> None:
    steps, weights, trained = _run(*settings, *STEPS)
    config = _config(*settings)
    assert len(steps) == 2
    for step in steps:
        assert not {name: value for name, value in _numbers(step).items() if not math.isfinite(value)}
        for name in ("text/first_max_abs_log_ratio", "image/first_max_abs_log_ratio"):
            assert step.metrics.get(name, 0.0) == 0.0
    assert all(w.isfinite().all() for w in weights[-1].values())

    moved = {name for name in trained if not torch.equal(weights[0][name], weights[-1][name])}
    frozen = {name for name, flag in trained.items() if not flag}
    assert not moved & frozen
    for expert in ("text", "image"):
        own = {name for name, flag in trained.items() if flag and expert_of(name) == expert}
        assert bool(own) == (config.train.experts in ("both", expert))
        # Without words, the text expert learns through the context alone, and some of its last layer not at all.
        assert own <= moved or (expert == "text" and not config.sampling.think)

    again, weights_again, _ = _run(*settings, *STEPS, "train.steps=1")
    assert [_numbers(s) for s in again] == [_numbers(steps[0])]
    assert _equal(weights_again[-1], weights[1])


def test_the_list_is_the_configurations_own() -> None:
    """What a reader would name, and each value once: nothing but the default's own values is left out."""
    assert {"sampling.sde=dance", "sampling.window=all", "train.finetune=lora"} <= set(NAMED)
    everything = [s for own in FIELDS.values() for s in own]
    assert len(everything) == len(set(everything)) > 35
    assert sum(_config(s) == _config() for s in everything) == len(FIELDS) - 1, (
        "train.extra_modules names none by default"
    )


@pytest.mark.parametrize("setting", TOWER)
def test_what_this_model_lacks_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match="no vision tower"):
        _run(setting, "train.steps=1")


# One gradient norm above all: experts share one clip, and what one of them does must not scale the other's.
FREE = ("train.grad_clip=1e9", "train.steps=2")
FIRST = (*FREE, "train.minibatches=1", "train.steps=1")
SAME = {
    "no penalty is one of weight 0": (("objective.penalty=none",), ("objective.penalty_weight=0",), FREE, ""),
    "layers computed twice": (("train.activation_checkpointing=true",), (), FREE, ""),
    "a reference on the host": (("train.reference_device=host",), (), FREE, ""),
    "auto is gdpo where ranges differ": (("advantage.combine=gdpo",), ("advantage.combine=auto",), FREE, ""),
    "no clamp is one out of reach": (("advantage.clamp=0",), ("advantage.clamp=100",), FREE, ""),
    "all is fixed on all steps but the last": (
        ("sampling.window=all",),
        ("sampling.window=fixed", "sampling.window_size=2"),
        FREE,
        "",
    ),
    "a sliding window begins as a fixed one": (("sampling.window=sliding",), ("sampling.window=fixed",), FREE, ""),
    "the text expert alone is lambda 0": (("train.experts=text",), ("objective.image_weight=0",), FREE, ""),
    "the image expert's first step is its own": (("train.experts=image",), (), FIRST, "image"),
    "however it is coupled": (
        ("objective.grad_through_context=false",),
        ("objective.grad_through_context=true",),
        FIRST,
        "image",
    ),
    "detached, images teach words nothing": (
        ("objective.grad_through_context=false",),
        ("objective.image_weight=0",),
        FIRST,
        "text",
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_two_ways_to_say_the_same(what: str) -> None:
    """To the bit: the same operations on the same numbers, in the weights of the expert that it is about."""
    one, other, both, expert = SAME[what]
    a, b = (_run(*settings, *both)[1] for settings in (one, other))
    assert not _equal(a[0], a[-1], expert), "something moved"
    assert _equal(a[-1], b[-1], expert)


@pytest.mark.parametrize("what", ["sampling.sde=dance", "objective.grad_through_context=false", "train.epochs=2"])
def test_and_two_that_are_not(what: str) -> None:
    assert not _equal(_run(what, *FREE)[1][-1], _run(*FREE)[1][-1])
