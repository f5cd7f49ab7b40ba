"""Image objectives of the forward process: the final latent is noised again, and velocities are scored there.

Neither knows how the latent was sampled. `target` is u = e - x_0 (`flow.path_velocity`) at x_t = (1 - t) x_0 + t e
(`flow.noised`). At the old policy both losses have the gradient of A times a flow-matching loss.

Shape letters: B episodes, K drawn times of one image, N latent positions of D numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-5
"""The smallest size of an error by which NFT divides."""


def flow_matching(v_BKND: Tensor, target_BKND: Tensor) -> Tensor:
    """The flow-matching loss at each draw, [B, K]: mean over (N, D) of (v - (e - x_0))^2."""
    return (v_BKND - target_BKND).square().mean(dim=(-2, -1))


def fpo_log_ratio(v_BKND: Tensor, v_old_BKND: Tensor, target_BKND: Tensor) -> Tensor:
    """FPO (arXiv 2507.21053): log r = mean over draws of (flow-matching loss old - new), [B].

    With u = e - x_0 the difference of the squares is (v_old - v)(v_old + v - 2u): exactly 0 where v = v_old, and free
    of cancellation.
    """
    difference = (v_old_BKND - v_BKND) * (v_old_BKND + v_BKND - 2 * target_BKND)
    return difference.mean(dim=(-3, -2, -1))


def reward_probability(advantage: Tensor, most: float) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117): r = 1/2 + 1/2 clip(A / most, -1, 1), how good a sample is, in [0, 1]."""
    return 0.5 + 0.5 * (advantage / most).clamp(-1, 1)


def nft_loss(
    v_BKND: Tensor, v_old_BKND: Tensor, target_BKND: Tensor, t_BK: Tensor, r_BK: Tensor, *, beta: float
) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117) at each draw, [B, K], to be minimised:

        r |v+ - u|^2 + (1 - r) |v- - u|^2,   v+ = (1 - beta) v_old + beta v,   v- = (1 + beta) v_old - beta v.

    Its code weighs each square by the size of its own error: with the data estimate's error d = t (v+ - u) the term is
    mean(d^2) / mean|d|, the divisor constant to the gradient. Means are over (N, D).
    """
    t_BK11 = t_BK[..., None, None]
    step_BKND = beta * (v_BKND - v_old_BKND)

    def weighted(v: Tensor) -> Tensor:
        error = t_BK11 * (v - target_BKND)
        size = error.detach().abs().mean(dim=(-2, -1)).clamp_min(LEAST)
        return error.square().mean(dim=(-2, -1)) / size

    good, bad = weighted(v_old_BKND + step_BKND), weighted(v_old_BKND - step_BKND)
    return torch.lerp(bad, good, r_BK)
