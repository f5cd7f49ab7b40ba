"""Advantages of a step: all rewards of a group become one number per acted segment of an episode (eq 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unigrpo_cli.algo.advantage import combined_advantage
from unigrpo_cli.algo.credit import IMAGE, NONE, TEXT, terminal
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Group, ImageActions, TextActions, flatten
from unigrpo_cli.errors import RewardError
from unigrpo_cli.parallel.ranks import Ranks
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.scorer import Scorer


def kinds_of_all(groups: Sequence[Group], ranks: Ranks, parts: int) -> Tensor:
    """Kinds of the acted segments of all ranks' episodes, int8 [B, S]. All ranks must call this.

    Args:
        groups: this rank's own.
        parts: into which `Ranks.share` cut the episodes.
    """
    kinds = {TextActions: TEXT, ImageActions: IMAGE}
    own = [[kinds[type(s)] for s in e.segments if type(s) in kinds] for e in flatten(groups)]
    rows = ranks.joined(ranks.gather(own), parts)
    most = max(map(len, rows))
    return torch.tensor([row + [NONE] * (most - len(row)) for row in rows], dtype=torch.int8)


def advantages(
    scored: dict[str, RewardResult], kind_BS: Tensor, rewards: Scorer, config: Config, prompts: int, seed: int
) -> Tensor:
    """One advantage per acted segment, fp32 [B, S], from all rewards of its group (eq 1)."""
    reward_PG = {n: torch.from_numpy(s.scores).view(prompts, -1) for n, s in scored.items()}
    valid_PG = {n: torch.from_numpy(s.valid).view(prompts, -1) for n, s in scored.items()}
    advantage_PG = plugin_advantages(rewards, reward_PG, valid_PG)
    if advantage_PG is None:
        how, a = combination(rewards, config), config.advantage
        for loaded in rewards.active("train") if how != "rank" else ():  # ranks have no scale
            weight = abs(loaded.spec.weight)
            loaded.check_spread(reward_PG[loaded.alias].numpy(), weight if how == "sum" else float(weight > 0))
        advantage_PG = combined_advantage(
            reward_PG, rewards.weights, valid_PG, how=how, normalize=a.normalize, clamp=a.clamp or None
        )
    advantage_B = advantage_PG.flatten().float()
    if config.advantage.shuffle:  # a control: nothing can be learnt
        generator = torch.Generator().manual_seed(derive(seed, "shuffle"))
        advantage_B = advantage_B[torch.randperm(len(advantage_B), generator=generator)]
    return terminal(advantage_B, kind_BS)


def combination(rewards: Scorer, config: Config) -> str:
    """How several rewards are combined: as configured, or gdpo when the trained ones differ in range."""
    if config.advantage.combine != "auto":
        return config.advantage.combine
    ranges = {rewards.ranges[name] for name, weight in rewards.weights.items() if weight}
    return "gdpo" if len(ranges) > 1 else "sum"


def plugin_advantages(rewards: Scorer, reward_PG: dict[str, Tensor], valid_PG: dict[str, Tensor]) -> Tensor | None:
    """Advantages [P, G] of a plugin's `unigrpo_combine_rewards`; None when no plugin has that hook.

    Raises:
        RewardError: when they have another shape or are not finite.
    """
    copies = [{name: x_PG.clone() for name, x_PG in part.items()} for part in (reward_PG, valid_PG)]  # a hook may write
    found = rewards.plugins.call(
        "unigrpo_combine_rewards", rewards=copies[0], valid=copies[1], weights=dict(rewards.weights)
    )
    if found is None:
        return None
    shape = next(iter(reward_PG.values())).shape
    if not isinstance(found, Tensor) or found.shape != shape:
        raise RewardError(f"unigrpo_combine_rewards must return a tensor of shape {list(shape)}")
    if not found.isfinite().all():
        raise RewardError("unigrpo_combine_rewards returned advantages that are not finite")
    return found
