"""The objective action by action: the summands of `unigrpo_loss`, and how far a policy moved. To be looked at.

Shape letters: B episodes, L text actions, K stochastic steps, N latent positions of D numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo_cli.algo.objective import (
    Actions,
    Advantages,
    Objective,
    Scores,
    log_ratio_of,
    mapped_log_ratios,
    step_densities,
    step_log_ratios,
    step_penalties,
    token_kls,
    token_log_ratios,
)
from unigrpo_cli.algo.surrogate import clipped_surrogate


@dataclass(frozen=True)
class ActionTerms:
    """What an update sees of each action: tokens [B, L], 0 off-mask, or steps [B, K], images one after the other.

    Args:
        log_ratio: new against old.
        clipped: on which side the clip binds, int8: 1 for a ratio above 1, -1 for one below, 0 where it does not.
        penalty: distance from the reference, unweighted; None without one.
        loss: the action's share of the loss. Shares of all episodes of an update add up to it.
    """

    log_ratio: Tensor
    clipped: Tensor
    penalty: Tensor | None
    loss: Tensor


@dataclass(frozen=True)
class Move:
    """How far the policy moved on the steps of one image segment.

    Args:
        log_ratio_BK: mean over N and D, by the configured trust region.
        log_ratio_BKN: the same as a map: mean over D.
        mean_change_BK, velocity_change_BK: root mean square over N and D of the difference of the transition's means,
            and of velocities.
        velocity_change_BKN: root mean square over D.
    """

    log_ratio_BK: Tensor
    log_ratio_BKN: Tensor
    mean_change_BK: Tensor
    velocity_change_BK: Tensor
    velocity_change_BKN: Tensor


@torch.no_grad()
def text_terms(
    actions: Actions,
    new: Scores,
    old: Scores,
    reference: Scores | None,
    advantage_BL: Tensor,
    objective: Objective,
    *,
    episodes: int,
) -> ActionTerms:
    """Eq 2 per token: -w (min(r A, clip(r) A) - A) + w * text_kl * k3, over the episode's tokens and `episodes`."""
    mask = actions.mask_BL
    log_ratio_BL = token_log_ratios(actions, new, old)
    surrogate = clipped_surrogate(log_ratio_BL, torch.where(mask, advantage_BL, 0.0), objective.text_clip)
    kl_BL, loss_BL = None, -surrogate.gain
    if objective.text_kl and reference is not None:
        kl_BL = token_kls(actions, new, reference)
        loss_BL = loss_BL + objective.text_kl * kl_BL
    return ActionTerms(
        log_ratio_BL,
        _sides(log_ratio_BL, surrogate.clipped & mask),
        kl_BL,
        objective.text_weight * shares_of_mean(loss_BL, mask, episodes),
    )


@torch.no_grad()
def image_terms(
    actions: Actions,
    new: Scores,
    old: Scores,
    reference: Scores | None,
    advantages: Advantages,
    objective: Objective,
    *,
    episodes: int,
) -> ActionTerms:
    """Eq 6 and 8 per step: lambda (-(min(r A, clip(r) A) - A) + penalty_weight * penalty), over K and `episodes`.

    With a ratio for each position, a step's gain is the mean over positions, and its side that of most clipped ones.
    """
    log_ratio_BK, advantage_BK = mapped_log_ratios(actions, new, old, advantages, objective)
    surrogate = clipped_surrogate(log_ratio_BK, advantage_BK, objective.image_clip)
    sides_BK, gain_BK = _sides(log_ratio_BK, surrogate.clipped), surrogate.gain
    if advantages.maps and objective.map_ratio == "position":
        sizes = [(s.t_BK.shape[1], s.x_BKND.shape[2]) for s in actions.images]
        steps, whole = sum(k for k, _ in sizes), sum(k * n for k, n in sizes)
        parts = [gain_BK.split([k * n for k, n in sizes], dim=1), sides_BK.split([k * n for k, n in sizes], dim=1)]
        gains, sides = ([p.unflatten(1, size) for p, size in zip(part, sizes, strict=True)] for part in parts)
        gain_BK = torch.cat([own.sum(dim=-1) for own in gains], dim=1) * steps / whole
        sides_BK = torch.cat([own.sum(dim=-1).sign() for own in sides], dim=1).to(torch.int8)
        log_ratio_BK = step_log_ratios(actions, new, old, objective)
    penalty_BK, loss_BK = None, -gain_BK
    if objective.penalty != "none" and reference is not None:
        penalty_BK = step_penalties(actions, new, reference, objective)
        loss_BK = loss_BK + objective.penalty_weight * penalty_BK
    return ActionTerms(
        log_ratio_BK,
        sides_BK,
        penalty_BK,
        objective.image_weight * shares_of_mean(loss_BK, torch.ones_like(loss_BK, dtype=torch.bool), episodes),
    )


@torch.no_grad()
def moves(actions: Actions, new: Scores, old: Scores, objective: Objective) -> tuple[Move, ...]:
    """How far `new` is from `old` on every image segment."""
    found = []
    for steps, v, v_old in zip(actions.images, new.velocities, old.velocities, strict=True):
        p, p_old = step_densities(steps, v), step_densities(steps, v_old)
        ratio_BKND = log_ratio_of(steps, p, p_old, objective)
        square_BKND = (v - v_old).square()
        found.append(
            Move(
                ratio_BKND.mean(dim=(-2, -1)),
                ratio_BKND.mean(dim=-1),
                (p.mean - p_old.mean).square().mean(dim=(-2, -1)).sqrt(),
                square_BKND.mean(dim=(-2, -1)).sqrt(),
                square_BKND.mean(dim=-1).sqrt(),
            )
        )
    return tuple(found)


def shares_of_mean(value_BL: Tensor, mask_BL: Tensor, episodes: int) -> Tensor:
    """The summands of `per_episode_mean(...).sum() / episodes`: 0 off-mask."""
    return torch.where(mask_BL, value_BL, 0.0) / mask_BL.sum(dim=1, keepdim=True).clamp_min(1) / episodes


def _sides(log_ratio: Tensor, clipped: Tensor) -> Tensor:
    return torch.where(clipped, log_ratio.sign(), 0.0).to(torch.int8)
