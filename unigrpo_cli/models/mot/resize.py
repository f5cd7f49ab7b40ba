"""Given pictures brought to a size that the model can take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MOST_PIXELS = 14 * 14 * 9 * 1024
"""BAGEL's limit on one picture."""


@dataclass(frozen=True)
class Resize:
    """Sides between `shortest` and `longest`, each a multiple of `stride`, the shape kept as well as that allows.

    BAGEL's rule. A picture is enlarged when its short side is under `shortest`, and the long side has the last
    word: a very long picture may end with a short side below it.
    """

    longest: int
    shortest: int
    stride: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        scale = max(min(self.longest / max(width, height), 1.0), self.shortest / min(width, height))
        new = self._scaled(width, height, scale)
        if new[0] * new[1] > MOST_PIXELS:
            new = self._scaled(*new, MOST_PIXELS / (new[0] * new[1]))
        if max(new) > self.longest:
            new = self._scaled(*new, self.longest / max(new))
        return new

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        def whole(side: int) -> int:
            return max(self.stride, round(round(side * scale) / self.stride) * self.stride)

        return whole(width), whole(height)

    def __call__(self, pixels_HWC: Tensor) -> Tensor:
        """A uint8 picture [H, W, 3] at its new size, bicubic with antialiasing."""
        height, width = pixels_HWC.shape[:2]
        resized = Image.fromarray(pixels_HWC.numpy()).resize(self.size(width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized))
