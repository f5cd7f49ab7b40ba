"""Aesthetic heads: from an image embedding of length 1 to one number.

LAION's version 1 is one linear layer (`weight`, `bias`). Version 2 has five. In its `linearMSE` files there is only
dropout between them; the `reluMSE` files have activations. The numbers of the layers tell which it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from unigrpo_cli.errors import RewardError

if TYPE_CHECKING:
    from torch import Tensor

LINEAR, RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)
"""Numbers of the linear layers in nn.Sequential: a dropout follows the first three, or an activation and a dropout."""
_LAYER = re.compile(r"layers\.(\d+)\.(?:weight|bias)")


@dataclass(frozen=True)
class Head:
    """Linear layers, (weight [out, in], bias [out]) each, with ReLU between them or nothing."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    relu: bool

    @property
    def width(self) -> int:
        return self.layers[0][0].shape[1]

    def __call__(self, x_BE: Tensor) -> Tensor:
        """Scores [B]."""
        for at, (weight, bias) in enumerate(self.layers):
            x_BE = x_BE @ weight.T + bias
            if self.relu and at < len(self.layers) - 1:
                x_BE = x_BE.relu()
        return x_BE.squeeze(-1)


def read_head(state: Mapping[str, Tensor], name: str, activation: str = "auto") -> Head:
    """The head in a state dict.

    Args:
        name: of the file, for errors and for a hint of its activation.
        activation: "none" or "relu" between layers; "auto" decides by the numbers of the layers.
    """
    if any(key.startswith("scoring_head") for key in state):
        raise RewardError(
            f"reward 'aesthetic': {name} is a head of aesthetic-predictor v2.5, which is not supported: it is "
            "AGPL-3.0 and needs SigLIP; use a LAION head (v1 or v2), or write a plugin"
        )
    if set(state) == {"weight", "bias"}:
        return _chained(((state["weight"], state["bias"]),), False, name)
    numbers = tuple(sorted({int(found[1]) for key in state if (found := _LAYER.fullmatch(key))}))
    expected = {f"layers.{n}.{part}" for n in numbers for part in ("weight", "bias")}
    if not numbers or set(state) != expected:
        raise RewardError(
            f"reward 'aesthetic': {name} is not a LAION head: it holds {', '.join(sorted(state)[:4])}; "
            "expected `weight` and `bias` (v1), or layers.0/2/4/6/7 (v2)"
        )
    relu = _activated(numbers, name) if activation == "auto" else activation == "relu"
    layers = tuple((state[f"layers.{n}.weight"], state[f"layers.{n}.bias"]) for n in numbers)
    return _chained(layers, relu, name)


def _activated(numbers: tuple[int, ...], name: str) -> bool:
    """Whether there is ReLU between layers of these numbers."""
    if numbers == RELU or (numbers == LINEAR and "relu" not in name.lower()):
        return numbers == RELU
    raise RewardError(
        f"reward 'aesthetic': {name} has layers {'/'.join(map(str, numbers))}, which does not tell whether there "
        "are activations between them; set @activation=none or @activation=relu"
    )


def _chained(layers: tuple[tuple[Tensor, Tensor], ...], relu: bool, name: str) -> Head:
    """A head in fp32, if its layers fit each other."""
    ends = [tuple(w.shape) for w, _ in layers]
    fits = all(w.ndim == 2 and tuple(b.shape) == (w.shape[0],) for w, b in layers)
    if not fits or ends[-1][0] != 1 or any(a[0] != b[1] for a, b in pairwise(ends)):
        raise RewardError(
            f"reward 'aesthetic': the layers of {name} do not lead from an embedding to one number: "
            f"{', '.join(map(str, ends))}"
        )
    if not all(bool(x.isfinite().all()) for layer in layers for x in layer):
        raise RewardError(f"reward 'aesthetic': {name} holds NaN or infinity; fetch or convert it again")
    return Head(tuple((w.float(), b.float()) for w, b in layers), relu)
