"""One traced step as the page reads it: what the update saw of each token and of each denoising step.

Shape letters: L tokens of a text, K recorded denoising steps, N image positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli.io.json import to_json
from unigrpo_cli.report.pictures import data_uri, packed_map
from unigrpo_cli.run.trace_types import (
    EpisodeTrace,
    GivenImageTrace,
    GivenTextTrace,
    GroupTrace,
    ImageMove,
    ImageTrace,
    StepTrace,
    TextTrace,
)

DIGITS = 7  # of fp32
EXACT = 1e-3
"""Relative distance below which advantages count as the weighted sum of rewards, scaled."""


def step_content(trace: StepTrace) -> dict[str, Any]:
    """A traced step as JSON values; what was not measured is null."""
    objective = trace.objective
    return {
        "step": trace.step,
        "objective": None if objective is None else dict(vars(objective)),
        "weights": trace.reward_weights,
        "denominator": trace.denominator,
        "updates": trace.updates,
        "skipped": trace.skipped,
        "groups": [_group(group, trace.reward_weights) for group in trace.groups],
    }


def _group(group: GroupTrace, weights: Mapping[str, float]) -> dict[str, Any]:
    rewards = [episode.rewards for episode in group.episodes]
    advantages = [episode.advantage for episode in group.episodes]
    return {
        "prompt": group.prompt,
        "update": group.update,
        "spread": spread(rewards, weights),
        "decided": decided(rewards, weights, advantages),
        "episodes": [_episode(episode) for episode in group.episodes],
    }


def total(rewards: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of an episode's rewards; None when one of them abstained."""
    values = [(rewards.get(name), weight) for name, weight in weights.items() if weight]
    if not values or any(value is None for value, _ in values):
        return None
    return sum(value * weight for value, weight in values if value is not None)


def spread(rewards: Sequence[Mapping[str, float | None]], weights: Mapping[str, float]) -> float | None:
    """Standard deviation over a group of its members' weighted rewards."""
    totals = [value for own in rewards if (value := total(own, weights)) is not None]
    return float(np.std(totals)) if totals else None


def decided(
    rewards: Sequence[Mapping[str, float | None]], weights: Mapping[str, float], advantages: Sequence[float | None]
) -> dict[str, float]:
    """Which reward decided a group's advantages: shares that add up to 1; a negative one worked against the others.

    The covariance of each weighted reward with the advantage, over the sum of them: exact where advantages are the
    scaled sum of rewards. Where they are not, each reward is first divided by its own deviation in the group.
    """
    names = [name for name, weight in weights.items() if weight]
    rows = [k for k, a in enumerate(advantages) if a is not None and all(rewards[k].get(n) is not None for n in names)]
    if len(rows) < 2 or not names:
        return {}
    advantage = np.array([advantages[k] for k in rows], np.float64)
    part = np.array([[weights[n] * float(rewards[k][n] or 0.0) for k in rows] for n in names])
    advantage, part = advantage - advantage.mean(), part - part.mean(axis=1, keepdims=True)
    if not _proportional(part.sum(axis=0), advantage):
        deviation = part.std(axis=1, keepdims=True)
        sizes = np.abs([[weights[n]] for n in names])
        part = np.divide(part * sizes, deviation, out=np.zeros_like(part), where=deviation > 0)
    shares = part @ advantage
    whole = shares.sum()
    if not abs(whole) > 0:
        return {}
    return {name: _number(share / whole) or 0.0 for name, share in zip(names, shares, strict=True)}


def _proportional(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    lengths = math.sqrt(float(a @ a) * float(b @ b))
    return lengths > 0 and float(a @ b) / lengths > 1 - EXACT


def _episode(episode: EpisodeTrace) -> dict[str, Any]:
    return {
        "member": episode.member,
        "seed": str(episode.seed),  # more digits than a page's numbers have
        "rewards": {name: _number(value) for name, value in episode.rewards.items()},
        "components": _plain(episode.components),
        "info": _plain(episode.info),
        "advantage": _number(episode.advantage),
        "segments": [_segment(segment) for segment in episode.segments],
    }


def _segment(segment: GivenTextTrace | GivenImageTrace | TextTrace | ImageTrace) -> dict[str, Any]:
    if isinstance(segment, GivenTextTrace):
        return {"kind": segment.kind, "role": segment.role, "text": segment.text}
    if isinstance(segment, GivenImageTrace):
        return {"kind": segment.kind, "role": segment.role, "image": data_uri(segment.pixels_HWC)}
    return _text(segment) if isinstance(segment, TextTrace) else _image(segment)


def _text(text: TextTrace) -> dict[str, Any]:
    measured = text.log_prob_after_L is not None and text.log_prob_old_L is not None
    columns = {
        "rollout": text.log_prob_rollout_L,
        "old": text.log_prob_old_L,
        "new": text.log_prob_new_L,
        "after": text.log_prob_after_L,
        "reference": text.log_prob_reference_L,
        "log_ratio": text.log_ratio_L,
        "change": text.change_L if measured else None,
        "entropy": text.entropy_L,
        "advantage": text.advantage_L,
        "clipped": text.clipped_L,
        "loss": text.loss_L,
    }
    tokens = text.tokens if text.tokens is not None else tuple(f"[{number}]" for number in text.ids_L)
    return {
        "kind": text.kind,
        "text": text.text,
        "finished": text.finished,
        "temperature": text.temperature,
        "rewards": text.rewards,
        "ids": text.ids_L.tolist(),
        "tokens": list(tokens),
        "columns": _columns(columns),
    }


def _image(image: ImageTrace) -> dict[str, Any]:
    columns = {
        "t": image.t_K,
        "t_next": image.t_next_K,
        "std": image.std_K,
        "rollout": image.log_prob_rollout_K,
        "advantage": image.advantage_K,
        "clipped": image.clipped_K,
        "penalty": image.penalty_K,
        "loss": image.loss_K,
    }
    maps: dict[str, dict[str, object]] = {}
    for name, move in (("update", image.update), ("after", image.after)):
        if move is not None:
            columns |= _move_columns(name, move)
            maps |= _move_maps(name, move)
    if image.advantage_KN is not None:
        maps["advantage"] = packed_map(image.advantage_KN)
    return {
        "kind": image.kind,
        "grid": list(image.grid),
        "times": [_number(t) for t in image.times_T],
        "steps": list(image.steps),
        "sde": image.sde,
        "noise_level": image.noise_level,
        "rewards": image.rewards,
        "image": data_uri(image.pixels_HWC),
        "x0": None if image.x0_KHWC is None else [data_uri(pixels, noisy=True) for pixels in image.x0_KHWC],
        "columns": _columns(columns),
        "maps": maps,
    }


def _move_columns(name: str, move: ImageMove) -> dict[str, NDArray]:
    return {
        f"{name}_log_ratio": move.log_ratio_K,
        f"{name}_mean_change": move.mean_change_K,
        f"{name}_velocity_change": move.velocity_change_K,
    }


def _move_maps(name: str, move: ImageMove) -> dict[str, dict[str, object]]:
    return {
        f"{name}_log_ratio": packed_map(move.log_ratio_KN),
        f"{name}_velocity_change": packed_map(move.velocity_change_KN),
    }


def _columns(columns: Mapping[str, NDArray | None]) -> dict[str, list[float | None]]:
    return {name: [_number(v) for v in values] for name, values in columns.items() if values is not None}


def _plain(value: Any) -> Any:
    """What rewards said as JSON values: a number that is not finite is None."""
    return json.loads(to_json(value))


def _number(value: Any) -> float | None:
    """A number with the digits of fp32; None for one that is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{DIGITS}g}")
