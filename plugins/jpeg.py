"""Size of the picture as a JPEG (Black et al. 2023): a reward without a model."""

from __future__ import annotations

import io
import math
from typing import Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardOutput


class JpegOptions(Options):
    quality: int = Field(95, ge=1, le=100, description="quality of the JPEG, as in Pillow")
    sign: Literal["compressibility", "incompressibility"] = Field(
        "compressibility", description="compressibility: minus the kilobytes; incompressibility: plus"
    )


class JpegReward:
    """Kilobytes (1000 bytes) of the picture saved as a JPEG, negative for compressibility (DDPO's convention)."""

    name = "jpeg"
    summary = "size as a JPEG: simple pictures, or busy ones"
    range = (-math.inf, 0.0)
    needs = frozenset({"image"})
    licence = "ours"
    Options = JpegOptions

    def __init__(self, options: JpegOptions):
        self.options = options
        if options.sign == "incompressibility":
            self.range = (0.0, math.inf)

    def score(self, batch: RewardBatch) -> RewardOutput:
        kilobytes = []
        for image in batch.images:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=self.options.quality)
            kilobytes.append(file.tell() / 1000)
        sign = 1 if self.options.sign == "incompressibility" else -1
        return RewardOutput([sign * k for k in kilobytes], components={"kilobytes": kilobytes})
