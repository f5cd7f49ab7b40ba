"""The clipped surrogate, exact at clip ranges of 1e-6 in fp32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: a ratio beyond it carries no information and overflows on the way to the loss."""


@dataclass(frozen=True)
class Surrogate:
    """min(r A, clip(r) A) split as A + gain, element-wise.

    `gain` alone carries the gradient; A is a constant that fp32 would let swallow it when gains are 1e-6.
    `clipped` is True where the clip binds, i.e. where the gradient is cut.
    """

    gain: Tensor
    clipped: Tensor


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Surrogate:
    """PPO's objective from the log-ratio (paper eq 2 and 6), element-wise, to be maximised.

    With d = r - 1 = expm1(log r), min(r A, clip(r, 1 - c, 1 + c) A) = A + min(d A, clamp(d, -c, c) A). Near
    r = 1, d keeps fp32's full relative precision where r itself has an ulp of 1.2e-7, so a clip of 1e-6 acts
    at 1e-6 and not at the next multiple of an ulp.
    """
    d = torch.expm1(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    free, bound = d * advantage, d.clamp(-clip, clip) * advantage
    # Not torch.minimum: on the ties inside the clip range it would split the gradient between the branches.
    clipped = (bound < free).detach()
    return Surrogate(torch.where(clipped, bound, free), clipped)


def k3(log_prob: Tensor, log_prob_reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(new || reference) from samples of the new policy, element-wise, >= 0."""
    d = (log_prob_reference - log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d
