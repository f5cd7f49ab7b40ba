"""Pictures and maps as text for a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LOSSLESS_SIDE = 64
"""Pictures up to this side keep every pixel: they are enlarged on the page."""
QUALITY, EFFORT = 88, 20
LARGEST_LEVEL = 32_767


def data_uri(pixels_HWC: NDArray[np.uint8], *, largest: int | None = None, noisy: bool = False) -> str:
    """A picture as a `data:` address, its longer side at most `largest`. A noisy one never keeps every pixel."""
    image = Image.fromarray(np.asarray(pixels_HWC))
    if largest and max(image.size) > largest:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    lossless = not noisy and max(image.size) <= LOSSLESS_SIDE
    image.save(file, "WEBP", lossless=lossless, quality=EFFORT if lossless else QUALITY, method=1 if lossless else 2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def packed_map(values: NDArray[np.float32]) -> dict[str, object]:
    """Numbers as 16-bit levels of their largest magnitude: half the size of fp32, off by 3e-5 of that magnitude.

    Numbers that are not finite become 0.
    """
    finite = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(np.abs(finite).max(initial=0.0))
    levels = np.rint(finite / (largest or 1.0) * LARGEST_LEVEL).astype("<i2")
    return {"scale": largest / LARGEST_LEVEL, "levels": base64.b64encode(levels.tobytes()).decode()}
