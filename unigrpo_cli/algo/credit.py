"""Credit: which of an episode's rewards each of its acted segments answers for.

Acted segments (texts and images) are numbered s = 0 .. S - 1 in the order in which they were drawn. Episodes of
different lengths share a tensor: where an episode has no segment s, its kind is NONE and its advantage 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE, TEXT, IMAGE = 0, 1, 2
"""Kinds of an acted segment."""


def terminal(advantage_B: Tensor, kind_BS: Tensor) -> Tensor:
    """Terminal credit: A_bs = A_b, the advantage of the last picture's reward, for every segment of the episode."""
    return torch.where(kind_BS != NONE, advantage_B[:, None], 0.0)
