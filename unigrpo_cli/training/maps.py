"""Advantage maps: how much each position of a picture answers for its reward (ViPO, arXiv 2511.18719)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode
from unigrpo_cli.errors import RewardError, UsageError
from unigrpo_cli.rewards.batch import Sample
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.training.schedule import objective_of

NONE = "none"
BUILT_IN = (NONE, "uniform", "detector", "features")
UNKNOWN = "advantage.map={} is no map that a plugin knows; built in: " + ", ".join(BUILT_IN)
Maps = tuple[Tensor, ...]
"""The maps of one episode's images, fp32 [N] each with mean 1."""


def advantage_maps(
    episodes: Sequence[Episode], samples: Sequence[Sample], rewards: Scorer, config: Config, *, step: int, split: str
) -> list[Maps]:
    """The maps of every episode's images; an empty tuple each without `advantage.map`, or where images do not train.

    Args:
        samples: the same episodes as rewards see them.
    """
    if config.advantage.map == NONE or not objective_of(config).image_weight:
        return [() for _ in episodes]
    (spec,) = parse_rewards([config.advantage.map])
    grids = [image.grid for episode in episodes for image in episode.images]
    pictures = [row for sample in samples for row in sample.by_round()]
    rewards.reload()
    found = rewards.plugins.call(
        "unigrpo_advantage_map",
        name=spec.name,
        options=spec.options,
        batch=rewards.prepare(pictures, step=step, split=split),
        grids=grids,
        context=rewards.context,
    )
    rewards.offload(rewards.rewards)
    if found is None:
        raise UsageError(UNKNOWN.format(spec.name))
    if len(found) != len(grids):
        raise RewardError(f"advantage.map={spec.name} gave {len(found)} maps for {len(grids)} pictures")
    each = iter(
        [_checked(np.asarray(own, np.float64), grid, spec.name) for own, grid in zip(found, grids, strict=True)]
    )
    return [tuple(next(each) for _ in episode.images) for episode in episodes]


def check_map(config: Config, plugins: Plugins) -> None:
    """Refuse a map that no plugin can know, before anything is fetched."""
    (spec,) = parse_rewards([config.advantage.map])
    others = [own for own in plugins.manager.hook.unigrpo_advantage_map.get_hookimpls() if own.plugin_name != "maps"]
    if spec.name not in BUILT_IN and not others:
        raise UsageError(UNKNOWN.format(spec.name))


def _checked(weights: NDArray[np.float64], grid: tuple[int, int], name: str) -> Tensor:
    """A map over its mean, [N]."""
    if weights.shape != grid:
        raise RewardError(f"advantage.map={name} gave shape {list(weights.shape)} for a grid of {list(grid)}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise RewardError(f"advantage.map={name}: weights must be finite, at least 0, and not all 0")
    return torch.from_numpy((weights / weights.mean()).astype(np.float32).reshape(-1))
