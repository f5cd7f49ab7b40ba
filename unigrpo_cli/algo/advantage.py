"""From rewards to advantages: one number per episode, shared by its text and its image actions (eq 1)."""

from __future__ import annotations

import torch
from torch import Tensor

NORMALIZERS = ("group", "batch", "none")
COMBINATIONS = ("sum", "gdpo", "rank")
EPS = 1e-6
"""Added to the standard deviation. The paper has none, Flow-GRPO 1e-4; a constant group is handled exactly,
so this only has to keep float noise in a nearly constant group (spread 1e-7) from becoming an advantage."""


def group_advantage(
    reward_PG: Tensor,
    valid_PG: Tensor | None = None,
    *,
    normalize: str = "group",
    clamp: float | None = None,
    eps: float = EPS,
) -> Tensor:
    """A = (R - mean over the group) / (std + eps), float64 [P, G] (paper eq 1).

    Args:
        reward_PG: rewards; one row is one prompt's group.
        valid_PG: False where a reward abstained: such a member gets 0 and counts in no statistic.
        normalize: "group" the population deviation of each group (the paper), "batch" that of all valid centred
            rewards, "none" no division (Dr. GRPO).
        clamp: largest magnitude, or None.

    A group whose valid rewards are all equal, or that has fewer than two, is exactly 0.
    """
    if normalize not in NORMALIZERS:
        raise ValueError(f"unknown normalize {normalize!r}; choose one of {', '.join(NORMALIZERS)}")
    reward = reward_PG.double()
    valid = torch.ones_like(reward, dtype=torch.bool) if valid_PG is None else valid_PG
    low = reward.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    high = reward.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    live = valid & (high > low)
    count = valid.sum(dim=1, keepdim=True).clamp_min(1)
    known = reward.masked_fill(~valid, 0)
    centred = (known - known.sum(dim=1, keepdim=True) / count).masked_fill(~live, 0)
    if normalize == "group":
        scale = (centred.square().sum(dim=1, keepdim=True) / count).sqrt() + eps
    elif normalize == "batch":
        scale = (centred.square().sum() / valid.sum().clamp_min(1)).sqrt() + eps
    else:
        scale = torch.ones_like(centred)
    advantage = centred / scale
    return advantage if clamp is None else advantage.clamp(-clamp, clamp)


def combined_advantage(
    rewards: dict[str, Tensor],
    weights: dict[str, float],
    valid: dict[str, Tensor],
    *,
    how: str,
    normalize: str = "group",
    clamp: float | None = None,
) -> Tensor:
    """Advantages from several rewards of one batch, float64 [P, G].

    "sum": weighted sum of raw rewards, then `group_advantage`; right when scales are alike. A member counts
    only where every weighted reward is valid.
    "gdpo": `group_advantage` of each reward, weighted, added, divided by the batch deviation (root mean square over
    members that some weighted reward counts); a reward's
    scale no longer decides its influence (so here normalize "none" means "batch").
    A member that abstains in one reward keeps the others.
    "rank": as "gdpo" with each reward first replaced by its mid-rank inside the group; immune to outliers.

    Rewards with weight 0 are held out: only logged.
    """
    if how not in COMBINATIONS:
        raise ValueError(f"unknown combination {how!r}; choose one of {', '.join(COMBINATIONS)}")
    names = [name for name in rewards if weights[name] != 0]
    if not names:
        raise ValueError("every reward has weight 0, so there is nothing to train on")
    if how == "sum":
        total = sum(weights[n] * rewards[n].double().masked_fill(~valid[n], 0) for n in names)
        everyone = torch.stack([valid[n] for n in names]).all(dim=0)
        assert isinstance(total, Tensor)
        return group_advantage(total, everyone, normalize=normalize, clamp=clamp)
    terms = []
    for name in names:
        reward = group_rank(rewards[name], valid[name]) if how == "rank" else rewards[name]
        own = group_advantage(reward, valid[name], normalize="batch" if normalize == "none" else normalize)
        terms.append(weights[name] * own)
    added = torch.stack(terms).sum(dim=0)
    counted = torch.stack([valid[n] for n in names]).any(dim=0)
    total = added / (added[counted].square().mean().nan_to_num().sqrt() + EPS)
    return total if clamp is None else total.clamp(-clamp, clamp)


def group_rank(reward_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """Mid-rank of each valid member within its group: how many it beats, ties counting one half."""
    reward = reward_PG.double()
    pair = valid_PG[:, :, None] & valid_PG[:, None, :]
    beats = (reward[:, :, None] > reward[:, None, :]).double()
    ties = (reward[:, :, None] == reward[:, None, :]).double()
    return ((beats + ties / 2) * pair).sum(dim=2)
