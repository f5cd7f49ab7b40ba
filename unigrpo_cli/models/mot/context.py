"""The key-value cache, the same for sampling, replay and evaluation.

Shape letters as in network.py: B rows, L new tokens, S context slots, H heads of E numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MoTContext:
    """Keys and values of every layer for what B rows have read.

    Slots are filled left to right for all rows at once; a row with fewer tokens has invalid slots, which are masked.
    `position_B` is each row's RoPE position of its next token: it counts text tokens, and one for each clean image.

    Args:
        keys, values: per layer, [B, Hkv, capacity, E]. With spare capacity (see `reserve`) new slots are
            written in place without gradients; else a new tensor is made.
        used: slots filled so far.
        valid_BS: which of the used slots count, or None when all do (then attention needs no mask).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    used: int
    valid_BS: Tensor | None
    position_B: Tensor

    @property
    def rows(self) -> int:
        return self.position_B.shape[0]

    def reserve(self, slots: int) -> MoTContext:
        """Room for `slots` more, so that decoding one token does not copy the whole cache."""

        def grown(x: Tensor) -> Tensor:
            return torch.cat([x[:, :, : self.used], x.new_zeros(*x.shape[:2], slots, x.shape[3])], dim=2)

        return replace(self, keys=tuple(map(grown, self.keys)), values=tuple(map(grown, self.values)))

    def select(self, index_B: Tensor) -> MoTContext:
        """Rows by index; repeat an index to share one prompt among the members of a group."""
        valid = None if self.valid_BS is None else self.valid_BS[index_B]
        return replace(
            self,
            keys=tuple(x[index_B] for x in self.keys),
            values=tuple(x[index_B] for x in self.values),
            valid_BS=valid,
            position_B=self.position_B[index_B],
        )

    def put(self, index_B: Tensor, rows: MoTContext) -> MoTContext:
        """This context with `rows`, selected from it and extended since; other rows have no valid new slots.

        Written in place: needs spare capacity, see `reserve`.
        """
        new = slice(self.used, rows.used)
        for mine, theirs in zip(self.keys + self.values, rows.keys + rows.values, strict=True):
            mine[index_B, :, new] = theirs[:, :, new]
        valid_BS = F.pad(self.validity(), (0, rows.used - self.used))
        position_B = self.position_B.clone()
        valid_BS[index_B], position_B[index_B] = rows.validity(), rows.position_B
        return replace(self, used=rows.used, valid_BS=valid_BS, position_B=position_B)

    def with_past_of(self, before: MoTContext) -> MoTContext:
        """This context, which was read on from `before` without gradients, with the keys and values of `before` itself.

        So later losses have a gradient through what `before` holds, and none through what was read since.
        """

        def joined(past: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = zip(past, new, strict=True)
            return tuple(torch.cat([a[:, :, : before.used], b[:, :, before.used : self.used]], dim=2) for a, b in pairs)

        return replace(self, keys=joined(before.keys, self.keys), values=joined(before.values, self.values))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.keys[index], self.values[index]

    def validity(self) -> Tensor:
        """`valid_BS` as a tensor: [B, used] bool."""
        if self.valid_BS is not None:
            return self.valid_BS
        return torch.ones(self.rows, self.used, dtype=torch.bool, device=self.position_B.device)


def append(stored: Tensor, used: int, new: Tensor) -> Tensor:
    """Cache tensor with `new` [B, H, L, E] in the slots after `used`: in place where there is room."""
    end = used + new.shape[2]
    if stored.shape[2] >= end and not torch.is_grad_enabled():
        stored[:, :, used:end] = new
        return stored
    return torch.cat([stored[:, :, :used], new], dim=2) if used else new
