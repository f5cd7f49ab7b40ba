"""The colour of an object, one of GenEval's ten: the nearest in CIELAB, or CLIP's choice.

Both give a likeness to each colour, in [0, 1]. The largest decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli.toy.world import COLORS
from unigrpo_plugins.detectors import Detection, Image

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Picture

    from unigrpo_plugins.encoders import Encoder, PromptLength

NAMES = tuple(COLORS)
GREY = "#999"  # GenEval's colour around an object's mask
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
CROPS = 64  # per forward pass of CLIP


@dataclass(frozen=True)
class Coloured:
    """A detected object in its picture, whose colour is wanted."""

    image: Image
    detection: Detection


def named(likeness: Mapping[str, float]) -> str:
    """The most likely colour; at a tie the first of the ten."""
    return max(likeness, key=likeness.__getitem__)


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


_LAB = cielab(np.array(list(COLORS.values())))


def closeness(lab: NDArray) -> dict[str, float]:
    """Closeness of a colour in CIELAB to each of the ten: 1 at it, 1/2 where another becomes nearer, 0 at another.

    It is e / (d + e), with d the distance to it and e that to the nearest of the other nine.
    """
    d = np.sqrt(((_LAB - lab) ** 2).sum(axis=1))
    others = np.array([np.delete(d, k).min() for k in range(len(d))])
    return dict(zip(NAMES, (others / (d + others)).tolist(), strict=True))


def median_lab(
    image: Image, mask: NDArray[np.bool_] | None, box: tuple[float, float, float, float]
) -> NDArray[np.float64]:
    """CIELAB of the median pixel of an object, or of its box without a mask."""
    if mask is not None:
        pixels = image[mask]
    else:
        x0, y0, x1, y1 = _pixels_of(box, image)
        pixels = image[y0:y1, x0:x1].reshape(-1, 3)
    return cielab(np.median(pixels, axis=0))


def _pixels_of(box: tuple[float, float, float, float], image: Image) -> tuple[int, int, int, int]:
    """A box in whole pixels, at least one, inside the picture."""
    height, width = image.shape[:2]
    x0, y0 = min(max(0, round(box[0])), width - 1), min(max(0, round(box[1])), height - 1)
    return x0, y0, min(max(round(box[2]), x0 + 1), width), min(max(round(box[3]), y0 + 1), height)


def name_color(image: Image, mask: NDArray[np.bool_] | None, box: tuple[float, float, float, float]) -> str:
    """The nearest of the ten colours to an object."""
    return named(closeness(median_lab(image, mask, box)))


class LabColors:
    """The nearest of the ten colours in CIELAB, by the median pixel."""

    name = "lab"
    cut: Mapping[str, dict[str, Any]] = {}

    def likeness(self, things: Sequence[Coloured]) -> list[dict[str, float]]:
        return [closeness(median_lab(t.image, t.detection.mask, t.detection.box)) for t in things]


class ClipColors:
    """GenEval's rule: CLIP's choice among captions for the ten colours, on the object cut out onto grey."""

    name = "clip"

    def __init__(self, encoder: Encoder, length: PromptLength | None = None):
        self.encoder, self.length = encoder, length
        self.cut: dict[str, dict[str, Any]] = {}  # by label, when a caption is longer than the context

    def likeness(self, things: Sequence[Coloured]) -> list[dict[str, float]]:
        """Probabilities of the ten colours, at the model's trained temperature."""
        found: list[dict[str, float]] = []
        captions = {label: self._captions(label) for label in {t.detection.label for t in things}}
        for at in range(0, len(things), CROPS):
            part = things[at : at + CROPS]
            seen = self.encoder.images([cut_out(t.image, t.detection) for t in part])
            for row, thing in zip(seen, part, strict=True):
                logits = self.encoder.scale * (captions[thing.detection.label] @ row)
                found.append(dict(zip(NAMES, logits.softmax(dim=0).tolist(), strict=True)))
        return found

    def _captions(self, label: str) -> torch.Tensor:
        """[10, E]: for each colour the mean of its captions' embeddings, normalised."""
        texts = [template.format(color=color, label=label) for color in NAMES for template in TEMPLATES]
        if self.length is not None:
            self.cut[label] = next((row for row in self.length.info(texts) if row), {})
        mean = self.encoder.texts(texts).unflatten(0, (len(NAMES), len(TEMPLATES))).mean(dim=1)
        return mean / mean.norm(dim=-1, keepdim=True)


def cut_out(image: Image, detection: Detection) -> Picture:
    """The object on grey, cropped to its box; without a mask the whole box."""
    import PIL.Image

    picture = PIL.Image.fromarray(image)
    if detection.mask is not None:
        blank = PIL.Image.new("RGB", picture.size, color=GREY)
        picture = PIL.Image.composite(picture, blank, PIL.Image.fromarray(detection.mask))
    return picture.crop(_pixels_of(detection.box, image))
