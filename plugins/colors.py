"""The name of an object's colour: the nearest of GenEval's ten in CIELAB, where distance is what eyes see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli.shapes.world import COLORS


def cielab(rgb: NDArray) -> NDArray[np.float64]:
    """sRGB in [0, 255], [..., 3], to CIE L*a*b* under D65 (IEC 61966-2-1, CIE 15)."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_NAMES = tuple(COLORS)
_LAB = cielab(np.array(list(COLORS.values())))


def name_color(
    image: NDArray[np.uint8], mask: NDArray[np.bool_] | None, box: tuple[float, float, float, float]
) -> str:
    """Colour name of the median pixel of an object (of its box, when there is no mask)."""
    if mask is not None:
        pixels = image[mask]
    else:
        x0, y0, x1, y1 = (max(0, round(v)) for v in box)
        pixels = image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].reshape(-1, 3)
    lab = cielab(np.median(pixels, axis=0))
    return _NAMES[int(((_LAB - lab) ** 2).sum(axis=1).argmin())]
