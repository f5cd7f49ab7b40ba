"""Advantages of a step: all rewards of a group become one number per acted segment of an episode (eq 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unigrpo_cli.algo.advantage import combined_advantage
from unigrpo_cli.algo.credit import (
    IMAGE,
    NONE,
    TEXT,
    reward_to_go,
    same_segment,
    segment_advantages,
    shuffled,
    terminal,
)
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
    a = config.advantage

    def of_groups(reward_PG: dict[str, Tensor], valid_PG: dict[str, Tensor]) -> Tensor:
        own_PG = plugin_advantages(rewards, reward_PG, valid_PG)
        if own_PG is not None:
            return own_PG
        how = combination(rewards, config)
        for loaded in rewards.active("train") if how != "rank" else ():  # ranks have no scale
            known_PG = reward_PG[loaded.alias].masked_fill(~valid_PG[loaded.alias], torch.nan)
            weight = abs(loaded.spec.weight)
            loaded.check_spread(known_PG.numpy(), weight if how == "sum" else float(weight > 0))
        return combined_advantage(
            reward_PG, rewards.weights, valid_PG, how=how, normalize=a.normalize, clamp=a.clamp or None
        )

    if credit_of(config) == "terminal":
        reward_PG = {n: torch.from_numpy(s.scores).view(prompts, -1) for n, s in scored.items()}
        valid_PG = {n: torch.from_numpy(s.valid).view(prompts, -1) for n, s in scored.items()}
        advantage_BS = terminal(of_groups(reward_PG, valid_PG).flatten().float(), kind_BS)
    else:
        rounds = int((kind_BS == IMAGE).sum(dim=1).max())
        own = {n: segment_rewards(s, kind_BS) for n, s in scored.items()}
        found = {n: reward_to_go(*r, kind_BS, discount=a.discount, rounds=rounds) for n, r in own.items()}
        returns, known = ({n: pair[k] for n, pair in found.items()} for k in range(2))
        advantage_BS = segment_advantages(returns, known, kind_BS, of_groups, prompts=prompts).float()
    return shuffled(advantage_BS, kind_BS, derive(seed, "shuffle")) if a.shuffle else advantage_BS


def credit_of(config: Config) -> str:
    """How rewards are credited: as configured, or reward-to-go where episodes have several rounds."""
    if config.advantage.credit != "auto":
        return config.advantage.credit
    return "reward-to-go" if config.sampling.rounds > 1 else "terminal"


def segment_rewards(result: RewardResult, kind_BS: Tensor) -> tuple[Tensor, Tensor]:
    """A reward of each acted segment, fp64 [B, S], NaN where it abstained, and where it speaks of the segment."""
    reward_BS = torch.full(kind_BS.shape, torch.nan, dtype=torch.float64)
    given_BS = torch.zeros(kind_BS.shape, dtype=torch.bool)
    for name, at_BS in same_segment(kind_BS).items():
        for b, s in at_BS.nonzero().tolist():
            if name in result.segments[b]:
                reward_BS[b, s], given_BS[b, s] = result.segments[b][name], True
    return reward_BS, given_BS


def combination(rewards: Scorer, config: Config) -> str:
    """How several rewards are combined: as configured, or gdpo when the trained ones differ in range."""
    if config.advantage.combine != "auto":
        return config.advantage.combine
    ranges = {rewards.ranges[name] for name, weight in rewards.weights.items() if weight}
    return "gdpo" if len(ranges) > 1 else "sum"


def plugin_advantages(rewards: Scorer, reward_PG: dict[str, Tensor], valid_PG: dict[str, Tensor]) -> Tensor | None:
    """Advantages [P, G] of a plugin's `unigrpo_combine_rewards`; None when no plugin has that hook."""
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
