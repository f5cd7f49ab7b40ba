"""Directories of runs, made in milliseconds: settings, metrics, scores, and traces whose numbers agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from unigrpo_cli.config import load_config, to_toml
from unigrpo_cli.run.trace_files import save_trace
from unigrpo_cli.run.trace_types import (
    EpisodeTrace,
    GivenTextTrace,
    GroupTrace,
    ImageMove,
    ImageTrace,
    ObjectiveTrace,
    SegmentTrace,
    StepTrace,
    TextTrace,
)

HOSTILE = "<img src=x onerror=alert(1)> \x1b[31mred\x1b[0m \u202eltr </script><script>alert(2)</script>"
OBJECTIVE = ObjectiveTrace(1.0, 1.0, 0.2, 1e-5, 0.0, "ratio-norm", "velocity-mse", 0.01)
GROUPS, MEMBERS, LENGTH, STEPS, SIDE = 3, 4, 5, 2, 4
DENOMINATOR = GROUPS * MEMBERS
F = np.float32


def made_run(
    directory: Path,
    *,
    seed: int = 0,
    steps: int = 6,
    traced: tuple[int, ...] = (1, 3, 6),
    settings: tuple[str, ...] = (),
    rounds: int = 1,
    warnings: dict[int, list[str]] | None = None,
) -> Path:
    """A finished training run."""
    directory.mkdir(parents=True)
    config = load_config(overrides=[f"train.steps={steps}", f"seed={seed}", *settings])
    (directory / "config.toml").write_text(to_toml(config))
    draw = np.random.default_rng(seed)
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "time": 1e9 + 3600.0 * step, "reward/clip": 0.5 + 0.01 * step + 0.01 * draw.normal()}
            row |= {"reward/geneval": 0.4, "text/entropy": 1 / step, "text/loss": -1e-4, "image/kl_old": 1e-7 * step}
            row |= {"loss": -1e-4, "warnings": (warnings or {}).get(step, [])}
            file.write(json.dumps(row) + "\n")
    for name, mean in (("eval_before", 0.4), ("eval_after", 0.6)):
        score = {"mean": mean + 0.01 * seed, "ci95": [mean - 0.05, mean + 0.05], "task_mean": mean, "n": 24}
        report = {"scores": {"geneval": score}, "per_task": {}, "n": 24}
        (directory / f"{name}.json").write_text(json.dumps(report))
    difference = {"geneval": {"mean": 0.2, "ci95": [0.15, 0.25]}}
    (directory / "summary.json").write_text(json.dumps({"interrupted": False, "difference": difference}))
    for step in traced:
        save_trace(made_trace(step, rounds), directory / "traces" / f"step_{step:06d}")
    return directory


def made_trace(step: int, rounds: int = 1) -> StepTrace:
    """Groups whose advantages, ratios, clips and shares of the loss agree with each other."""
    draw = np.random.default_rng(step)
    groups = []
    for g in range(GROUPS):
        clip = draw.uniform(size=MEMBERS) * (g + 1) / GROUPS
        geneval = draw.uniform(size=MEMBERS)
        total = clip + geneval
        advantage = (total - total.mean()) / (total.std() + 1e-6)
        episodes = []
        for m in range(MEMBERS):
            prompt = HOSTILE if g == 1 else f"prompt {g}"
            segments: list[SegmentTrace] = []
            for _ in range(rounds):
                segments += [GivenTextTrace("prompt", prompt), _text(draw, advantage[m], rounds)]
                segments += [_image(draw, advantage[m], rounds)]
            rewards = {"clip": float(clip[m]), "geneval": float(geneval[m])}
            info = {"geneval": {"reasons": ["1 star wanted, 0 found", HOSTILE], "tag": "single_object"}}
            parts = {"geneval": {"count": 0.5}}
            episodes.append(EpisodeTrace(m, 2**62 + m, rewards, parts, info, float(advantage[m]), tuple(segments)))
        groups.append(GroupTrace(f"id {g}", HOSTILE if g == 1 else f"prompt {g}", {}, 0, tuple(episodes)))
    weights = {"clip": 1.0, "geneval": 1.0}
    return StepTrace(step, OBJECTIVE, DENOMINATOR, weights, 1, None, tuple(groups))


def _gain(log_ratio: np.ndarray, advantage: float, clip: float) -> tuple[np.ndarray, np.ndarray]:
    """The clipped surrogate without its constant, and the side of the clip: by hand, in float64."""
    excess = np.expm1(log_ratio.astype(np.float64))
    free, bound = excess * advantage, np.clip(excess, -clip, clip) * advantage
    return np.minimum(free, bound), (np.sign(excess) * (bound < free)).astype(np.int8)


def _text(draw: np.random.Generator, advantage: float, rounds: int) -> TextTrace:
    old = -draw.exponential(size=LENGTH).astype(F)
    log_ratio = (0.2 * draw.normal(size=LENGTH)).astype(F)
    gain, side = _gain(log_ratio, advantage, OBJECTIVE.text_clip)
    return TextTrace(
        text="a star b2",
        finished=True,
        temperature=1.0,
        rewards={},
        tokens=("a", " star", " <b>", " b2", ""),
        ids_L=np.arange(LENGTH),
        log_prob_rollout_L=old,
        log_prob_old_L=old,
        log_prob_new_L=old + log_ratio,
        log_prob_after_L=old + 2 * log_ratio,
        entropy_L=draw.exponential(size=LENGTH).astype(F),
        advantage_L=np.full(LENGTH, advantage, F),
        log_ratio_L=log_ratio,
        clipped_L=side,
        loss_L=(-gain / (DENOMINATOR * LENGTH * rounds)).astype(F),
    )


def _image(draw: np.random.Generator, advantage: float, rounds: int) -> ImageTrace:
    update, after = _move(draw, 2e-5), _move(draw, 6e-5)
    gain, side = _gain(update.log_ratio_K, advantage, OBJECTIVE.image_clip)
    penalty = draw.exponential(size=STEPS).astype(F) * F(1e-4)
    return ImageTrace(
        grid=(SIDE, SIDE),
        sde="flow",
        noise_level=1.0,
        window_start=1,
        rewards={},
        times_T=np.array([1.0, 0.9, 0.75, 0.5, 0.0], F),
        pixels_HWC=draw.integers(0, 255, (16, 16, 3)).astype(np.uint8),
        log_prob_rollout_K=np.full(STEPS, -1.2, F),
        x0_KHWC=draw.integers(0, 255, (STEPS, 16, 16, 3)).astype(np.uint8),
        std_K=np.full(STEPS, 0.3, F),
        advantage_K=np.full(STEPS, advantage, F),
        clipped_K=side,
        penalty_K=penalty,
        loss_K=((-gain + OBJECTIVE.penalty_weight * penalty) / (DENOMINATOR * STEPS * rounds)).astype(F),
        update=update,
        after=after,
    )


def _move(draw: np.random.Generator, size: float) -> ImageMove:
    log_ratio_KN = (size * draw.normal(size=(STEPS, SIDE * SIDE))).astype(F)
    change_KN = np.abs(0.01 * draw.normal(size=(STEPS, SIDE * SIDE))).astype(F)
    means = log_ratio_KN.mean(axis=1), np.full(STEPS, 1e-3, F), np.sqrt((change_KN**2).mean(axis=1))
    return ImageMove(means[0], log_ratio_KN, means[1], means[2], change_KN)
