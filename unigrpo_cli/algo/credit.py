"""Credit: which of an episode's rewards each of its acted segments answers for.

Acted segments (texts and images) are numbered s = 0 .. S - 1 in the order in which they were drawn. Episodes of
different lengths share a tensor: where an episode has no segment s, its kind is NONE and its advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NONE, TEXT, IMAGE = 0, 1, 2
"""Kinds of an acted segment."""


def terminal(advantage_B: Tensor, kind_BS: Tensor) -> Tensor:
    """Terminal credit: A_bs = A_b, the advantage of the last picture's reward, for every segment of the episode."""
    return torch.where(kind_BS != NONE, advantage_B[:, None], 0.0)


def reward_to_go(
    reward_BS: Tensor, given_BS: Tensor, kind_BS: Tensor, *, discount: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """Returns G_BS of one reward, fp64, and where they are known: where no reward at or after s abstained.

    G_s = sum over s' >= s of discount^(pictures between s and s') r_s', as the recurrence

        G_s = r_s + discount^[s is a picture] G_(s+1).

    An episode that stopped after n < R pictures keeps its last one: that picture's reward stands in the rounds that it
    did not paint, so G after the last segment is r_n (1 + discount + ... + discount^(R-n-1)). Stopping on a right
    picture is then worth as much as painting it again, and the words that stop answer for the picture that they keep.

    Args:
        reward_BS: r of each acted segment; NaN where the reward abstained.
        given_BS: where the reward speaks of the segment at all; elsewhere r is 0.
        discount: in [0, 1].
        rounds: R, the pictures of an episode that does not stop: the most of any in the step.
    """
    picture_BS = kind_BS == IMAGE
    reward_BS = torch.where(given_BS, reward_BS.double(), 0.0)
    count_B = picture_BS.sum(dim=1)
    is_last_BS = picture_BS & (picture_BS.cumsum(dim=1) == count_B[:, None])
    left_B = (rounds - count_B).clamp_min(0).tolist()
    repeats_B = reward_BS.new_tensor([sum(discount**k for k in range(n)) for n in left_B])
    kept_B = torch.where(is_last_BS, reward_BS, 0.0).sum(dim=1)
    factor_BS = torch.where(picture_BS, reward_BS.new_tensor(discount), 1.0)
    later_B = torch.where(repeats_B > 0, kept_B * repeats_B, 0.0)
    found: list[Tensor] = []
    for s in range(kind_BS.shape[1] - 1, -1, -1):
        later_B = reward_BS[:, s] + factor_BS[:, s] * later_B
        found.append(later_B)
    return_BS = torch.stack(found[::-1], dim=1)
    return return_BS, return_BS.isfinite()


def same_segment(kind_BS: Tensor) -> dict[str, Tensor]:
    """Where each segment is, [B, S] by its name (`text_1`, `image_1`, `text_2`, ...); at most once in a row."""
    found: dict[str, Tensor] = {}
    for name, kind in (("text", TEXT), ("image", IMAGE)):
        own_BS = kind_BS == kind
        number_BS = own_BS.cumsum(dim=1)
        found |= {f"{name}_{k}": own_BS & (number_BS == k) for k in range(1, int(number_BS.max()) + 1)}
    return found


def segment_advantages(
    returns: dict[str, Tensor],
    known: dict[str, Tensor],
    kind_BS: Tensor,
    advantage: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor],
    *,
    prompts: int,
) -> Tensor:
    """Advantages [B, S] from the returns of each reward: a segment is compared with the same segment of its group.

    The second text of an episode is compared with the second texts of its group; members without one count in no
    statistic of it, and a group where fewer than two have one gets 0.

    Args:
        returns, known: by reward, [B, S], of `reward_to_go`.
        advantage: from returns and where they count, [P, G] by reward, to advantages [P, G] (eq 1).
        prompts: P; B = P * G.
    """
    advantage_BS = torch.zeros(kind_BS.shape, dtype=torch.float64)
    for at_BS in same_segment(kind_BS).values():
        has_PG = at_BS.any(dim=1).view(prompts, -1)
        own = {n: torch.where(at_BS, x_BS, 0.0).sum(dim=1).view(prompts, -1) for n, x_BS in returns.items()}
        counts = {n: has_PG & (at_BS & known[n]).any(dim=1).view(prompts, -1) for n in returns}
        found_B = advantage(own, counts).double().flatten()
        advantage_BS = torch.where(at_BS, found_B[:, None], advantage_BS)
    return advantage_BS


def shuffled(advantage_BS: Tensor, kind_BS: Tensor, seed: int) -> Tensor:
    """A control: the advantages of each segment permuted over the episodes that have it, so nothing can be learnt."""
    result_BS = advantage_BS.clone()
    for at_BS in same_segment(kind_BS).values():
        own = advantage_BS[at_BS]  # one per row: in the order of rows
        result_BS[at_BS] = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))]
    return result_BS
