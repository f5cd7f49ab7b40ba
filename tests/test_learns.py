"""It learns, from words and from pixels, and does not where it must not: learning rate 0, shuffled advantages.

A tiny untrained model and two rewards, one for each kind of action: the share of a word in the reasoning, and the
brightness of the picture. Seconds on a CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tools.toy_model import build_model
from unigrpo_cli import RewardContext, reward
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.train import StepResult, train
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

SETTINGS = [
    "sampling.max_new_tokens=6",
    "sampling.height=16",
    "sampling.width=16",
    "sampling.steps=4",
    "sampling.noise_level=0.7",
    "sampling.window_range=[0, 3]",
    "sampling.window_size=2",
    "objective.penalty_weight=0",
    "objective.image_clip=1e-4",
    "sampling.batch_size=96",
    "train.steps=24",
    "train.prompts_per_step=4",
    "train.group_size=24",
    "train.minibatches=2",
    "train.micro_batch_size=48",
    "train.lr_text=2e-3",
    "train.lr_image=1e-3",
    "train.lr_decay=0",
    'train.extra_modules=["projections"]',
]
WORDS, LIGHT = 0.4, 0.015  # gains that count as learning; five seeds gave 0.64 and 0.025 or more
STILL_WORDS, STILL_LIGHT = 0.1, 0.01  # and as not learning; their controls 0.014 and 0.008 or less
CONTROL = ("advantage.shuffle=false", "advantage.shuffle=true")
PROMPTS = [Prompt(t, t) for t in ("a red circle", "two blue stars", "a heart", "a cross above a square")]


@reward("red", range=(0, 1))
def red(reasoning):
    """Share of the word "red" in what was written."""
    words = [(text or "").split() for text in reasoning]
    return [w.count("red") / max(len(w), 1) for w in words]


@reward("light", range=(0, 255))
def light(pixels):
    """Mean brightness of the picture."""
    return [float(p.mean()) for p in pixels]


def _train(*settings: str, rewarded: str = "red,light") -> tuple[list[StepResult], MoTPolicy]:
    config = load_config(overrides=[*SETTINGS, *settings])
    policy = prepare_policy(build_model(seed=3, width=32, layers=2), config)
    state = TrainState(policy, make_optimizer(policy, config))
    steps: list[StepResult] = []
    with _rewards(config, rewarded) as rewards:
        train(state, PROMPTS, rewards, config, lambda step: bool(steps.append(step)))
    return steps, policy


def _rewards(config: Config, rewarded: str) -> Scorer:
    plugins = Plugins()
    plugins.rewards.add("red", red)
    plugins.rewards.add("light", light)
    return Scorer(parse_rewards([rewarded]), plugins, RewardContext("cpu", config.seed, True, True))


def _course(steps: list[StepResult]) -> tuple[np.ndarray, np.ndarray]:
    """Per step: mean share of the word, mean brightness."""
    words, light = [], []
    for step in steps:
        episodes = [e for g in step.groups for e in g.episodes]
        texts = [(e.reasoning or "").split() for e in episodes]
        words.append(np.mean([t.count("red") / max(len(t), 1) for t in texts]))
        light.append(np.mean([float(e.pixels.float().mean()) / 255 for e in episodes]))
    return np.array(words), np.array(light)


def _gain(course: np.ndarray) -> float:
    return float(course[-5:].mean() - course[:5].mean())


def test_one_advantage_teaches_words_and_pixels() -> None:
    steps, _ = _train()
    words, brightness = _course(steps)
    assert _gain(words) > WORDS, words
    assert _gain(brightness) > LIGHT, brightness
    assert all(f"{kind}/first_max_abs_log_ratio" in steps[0].metrics for kind in ("text", "image"))
    assert all(step.metrics.get("text/first_max_abs_log_ratio", 0) == 0 for step in steps)
    assert all(step.metrics.get("image/first_max_abs_log_ratio", 0) == 0 for step in steps)
    assert max(step.metrics["text/drift_max"] for step in steps) < 1e-5
    assert max(step.metrics["image/drift_max"] for step in steps) < 1e-5


def test_the_text_expert_alone_learns_words_only() -> None:
    steps, policy = _train("train.experts=text", "train.steps=16")
    words, brightness = _course(steps)
    assert _gain(words) > WORDS, words
    assert abs(_gain(brightness)) < STILL_LIGHT, brightness
    assert not policy.trainable()["image"]


def test_the_image_expert_alone_learns_pixels_only() -> None:
    """Words that are never learnt spread rewards as much at the end as at the start, so they weigh less here."""
    steps, policy = _train("train.experts=image", "train.lr_image=4e-3", rewarded="red:0.3,light")
    words, brightness = _course(steps)
    assert abs(_gain(words)) < STILL_WORDS, words
    assert _gain(brightness) > LIGHT, brightness
    assert not policy.trainable()["text"]


@pytest.mark.parametrize("objective", ["fpo", pytest.param("nft", marks=pytest.mark.long)])
def test_final_latents_noised_again_teach_pixels(objective: str) -> None:
    """Sampled by Euler steps alone, without words. Shuffled advantages teach nothing."""
    short = [f"objective.image={objective}", "objective.draws=3", "train.experts=image", "sampling.think=false"]
    short += ["train.group_size=12"]
    gains = [_gain(_course(_train(*short, "train.steps=14", shuffle)[0])[1]) for shuffle in CONTROL]
    assert gains[0] > LIGHT and abs(gains[1]) < STILL_LIGHT, gains


def test_without_a_learning_rate_nothing_moves() -> None:
    steps, policy = _train("train.lr_text=0", "train.lr_image=0", "train.steps=3")
    for own, start in zip(policy.network.parameters(), policy.frozen.parameters(), strict=True):
        assert torch.equal(own, start)
    latents = {step.groups[0].episodes[0].images[0].latent.sum().item() for step in steps}
    assert len(latents) == 3, "every step has noise of its own"


@pytest.mark.parametrize(("seeds", "steps"), [((0,), 12), pytest.param((1, 2, 3), 24, marks=pytest.mark.long)])
def test_shuffled_advantages_teach_nothing(seeds: tuple[int, ...], steps: int) -> None:
    """A random walk; the median of several. True ones teach the words in twelve steps, light not yet."""
    own = ("advantage.shuffle=true", f"train.steps={steps}")
    courses = [_course(_train(*own, f"seed={seed}")[0]) for seed in seeds]
    words, brightness = np.median([[_gain(own) for own in course] for course in courses], axis=0)
    assert words < STILL_WORDS
    if steps > 12:
        assert brightness < STILL_LIGHT
