"""The detector `shapes`: objects of the shapes world, from pixels.

It segments pixels that differ from the background, and names each connected piece by the shape whose outline, at the
size and centre of the piece, fits it best.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli.toy.render import signed_distance
from unigrpo_cli.toy.world import SHAPES
from unigrpo_plugins.detectors import Detection, Image

CONTRAST = 30 / 255  # least difference of a channel from the background in a foreground pixel
WINDOW = 20  # side of the window around a piece, in pixels of a picture of 48
SMALLEST = 12.0  # least area of a piece, in the same pixels


class ShapesDetector:
    """Confidence comes from the fit: the soft intersection over union with the best outline."""

    labels = frozenset(SHAPES)
    threshold = 0.3
    counting_threshold = 0.3

    def detect(self, images: Sequence[Image], floor: float = 0.0) -> list[list[Detection]]:
        found: list[list[Detection]] = [[] for _ in images]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(index)
        for indices in by_size.values():
            stacked = np.stack([images[i] for i in indices]).astype(np.float32) / 255
            for index, own in zip(indices, _detect_stack(stacked), strict=True):
                found[index] = [d for d in own if d.score > floor]
        return found


def _detect_stack(x_BHWC: NDArray[np.floating]) -> list[list[Detection]]:
    count, height, width, _ = x_BHWC.shape
    unit = min(height, width) / 48
    difference = x_BHWC - background(x_BHWC)
    contrast = np.abs(difference).max(axis=-1)
    labels = connected(contrast > CONTRAST)
    pieces: list[tuple[int, NDArray[np.bool_]]] = []
    for b in range(count):
        ids, areas = np.unique(labels[b], return_counts=True)
        pieces += [(b, labels[b] == i) for i, area in zip(ids, areas, strict=True) if i and area >= SMALLEST * unit**2]
    found: list[list[Detection]] = [[] for _ in range(count)]
    side = max(4, round(WINDOW * unit))
    grid = np.arange(side, dtype=np.float32) - side // 2 + 0.5
    alphas, origins, kept = [], [], []
    for b, mask in pieces:
        alpha = _coverage_of(difference[b], contrast[b], mask)
        if alpha.sum() < SMALLEST * unit**2 / 2:
            continue  # pixels without a common colour: noise
        kept.append((b, mask))
        rows, columns = np.indices(mask.shape)
        cx, cy = (float(((axis + 0.5) * alpha).sum() / alpha.sum()) for axis in (columns, rows))
        x0, y0 = int(cx) - side // 2, int(cy) - side // 2
        padded = np.pad(alpha, side)
        alphas.append(padded[y0 + side : y0 + 2 * side, x0 + side : x0 + 2 * side])
        origins.append((cx - int(cx), cy - int(cy)))
    if not kept:
        return found
    fits = shape_fits(np.stack(alphas), np.array(origins, np.float32), grid)
    for (b, mask), fit in zip(kept, fits, strict=True):
        best = int(fit.argmax())
        ys, xs = np.nonzero(mask)
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        found[b].append(Detection(SHAPES[best], confidence(fit), box, mask))
    return found


def confidence(fit: NDArray[np.floating]) -> float:
    """Confidence from the fits of one piece: the best fit, times its lead over the second."""
    first, second = np.sort(fit)[::-1][:2]
    good = np.clip((first - 0.60) / 0.20, 0, 1)
    ahead = np.clip((first - second) / 0.06, 0, 1)
    return float(good * (0.5 + 0.5 * ahead))


def background(x_BHWC: NDArray[np.floating]) -> NDArray[np.floating]:
    """Median colour of the border of each picture, [B, 1, 1, 3]."""
    border = np.concatenate([x_BHWC[:, 0], x_BHWC[:, -1], x_BHWC[:, :, 0], x_BHWC[:, :, -1]], axis=1)
    return np.median(border, axis=1)[:, None, None, :]


def connected(mask_BHW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Labels of 4-connected pieces, by spreading the largest pixel number through each; 0 is background."""
    _, height, width = mask_BHW.shape
    labels = np.arange(1, height * width + 1, dtype=np.int32).reshape(1, height, width) * mask_BHW
    while True:
        grown = labels.copy()
        np.maximum(grown[:, 1:], labels[:, :-1], out=grown[:, 1:])
        np.maximum(grown[:, :-1], labels[:, 1:], out=grown[:, :-1])
        np.maximum(grown[:, :, 1:], labels[:, :, :-1], out=grown[:, :, 1:])
        np.maximum(grown[:, :, :-1], labels[:, :, 1:], out=grown[:, :, :-1])
        grown *= mask_BHW
        if (grown == labels).all():
            return labels
        labels = grown


def _coverage_of(
    difference: NDArray[np.floating], contrast: NDArray[np.floating], mask: NDArray[np.bool_]
) -> NDArray[np.floating]:
    """Coverage of each pixel by a piece: its difference from the background relative to that of the core."""
    core = mask & (contrast >= 0.7 * contrast[mask].max())
    color = np.median(difference[core], axis=0)
    alpha = np.clip(difference @ color / max(float(color @ color), 1e-6), 0, 1)
    near = mask.copy()  # the piece and one pixel around it, for its soft edge
    near[1:] |= mask[:-1]
    near[:-1] |= mask[1:]
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    return (alpha * near).astype(np.float32)


@cache
def _unit(shape: str) -> tuple[float, float]:
    """Area and vertical centroid of a shape of radius 1; all shapes are symmetric left to right."""
    axis = (np.arange(400, dtype=np.float32) + 0.5) / 400 * 3 - 1.5
    x, y = np.meshgrid(axis, axis)
    inside = signed_distance(shape, x, y) < 0
    return float(inside.sum() * (3 / 400) ** 2), float(y[inside].mean())


def shape_fits(
    alpha_MHW: NDArray[np.floating], centre_M2: NDArray[np.floating], grid: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Soft intersection over union of each piece with each shape of its area and centroid: [M, shapes]."""
    area = alpha_MHW.sum(axis=(1, 2))
    fits = []
    for shape in SHAPES:
        unit_area, unit_y = _unit(shape)
        radius = np.sqrt(area / unit_area)[:, None, None]
        x = (grid[None, None, :] - centre_M2[:, 0, None, None]) / radius
        y = (grid[None, :, None] - centre_M2[:, 1, None, None]) / radius + unit_y
        x, y = np.broadcast_arrays(x, y)
        outline = np.clip(0.5 - signed_distance(shape, x, y) * radius, 0, 1)
        both = np.minimum(outline, alpha_MHW).sum(axis=(1, 2))
        either = np.maximum(outline, alpha_MHW).sum(axis=(1, 2))
        fits.append(both / either)
    return np.stack(fits, axis=1)


def background_deviation(images: Sequence[Image]) -> list[float]:
    """Standard deviation of the background pixels of each picture around their median, in units of [0, 1].

    Pixels within two of a foreground pixel are left out: a soft edge is not texture.
    """
    deviations = []
    for image in images:
        x = image.astype(np.float32)[None] / 255
        difference = x - background(x)
        objects = (np.abs(difference).max(axis=-1) > CONTRAST)[0]
        near = np.pad(objects, 2)
        height, width = objects.shape
        shifts = [near[i : i + height, j : j + width] for i in range(5) for j in range(5)]
        plain = ~np.any(shifts, axis=0)
        deviations.append(float(difference[0][plain].std()) if plain.any() else 1.0)
    return deviations
