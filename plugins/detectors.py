"""Object detectors behind one protocol: pictures in, labelled boxes and masks out.

None suppresses overlapping boxes; GenEval's own suppression is off by default, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli import RewardContext

Image = NDArray[np.uint8]  # [height, width, 3]


@dataclass(frozen=True)
class Detection:
    """One object: class name, confidence in [0, 1], box (x0, y0, x1, y1) in pixels, mask [height, width]."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_] | None = None


class Detector(Protocol):
    """`labels` are its classes. Thresholds are its own, because confidences of detectors are not comparable.

    `detect` gives for each picture the objects with a confidence above `floor`, with masks or only with boxes.
    """

    labels: frozenset[str]
    threshold: float
    counting_threshold: float

    def detect(self, images: Sequence[Image], floor: float = 0.0) -> list[list[Detection]]: ...


COCO_DETECTORS = {
    "mask2former": "masks, closest to GenEval's own; needs scipy",
    "rfdetr": "masks; no further package",
    "boxes": "any object detector of transformers, only boxes; needs @weights=...",
}


def coco_choices() -> str:
    return "; ".join(f"@detector={name} ({what})" for name, what in COCO_DETECTORS.items())


@dataclass(frozen=True)
class DetectorChoice:
    """All that selects a detector. Rewards with the same choice share it.

    Args:
        weights: hub id or directory; None is the detector's default.
        size: `SHORTxLONG`, the sides that pictures are resized to; `own` is that of the weights; None the default.
        batch_size: pictures per forward pass.
    """

    name: str
    weights: str | None = None
    size: str | None = None
    batch_size: int = 8


def shared_detector(context: RewardContext, reward: str, choice: DetectorChoice) -> tuple[Detector, tuple]:
    """The detector of that choice and its key, for `context.shared.release` at teardown."""
    key = ("detector", choice)
    return context.shared.get(key, lambda: _open(context, reward, choice)), key


def _open(context: RewardContext, reward: str, choice: DetectorChoice) -> Detector:
    from unigrpo_plugins.detector_hf import load_detector
    from unigrpo_plugins.detector_shapes import ShapesDetector

    if choice.name == "shapes":
        return ShapesDetector()
    return load_detector(context, reward, choice)
