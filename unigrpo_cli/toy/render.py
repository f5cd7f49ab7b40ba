"""Paint a scene: analytic signed distances, anti-aliased, in numpy. No drawing library.

Signed distances are in units of the object's radius; negative is inside. The same functions give the
detector its templates (`plugins/detector_shapes.py`), so "a star" means one thing in the whole project.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli.toy.world import CELLS, COLORS, Scene

SIZE = 48  # pixels per side
CELL = 16  # pixels per side of a cell; no thing reaches beyond its cell
RADIUS = (5.0, 6.2)  # pixels
JITTER = 0.8  # pixels, largest offset of a thing from its cell's centre
BACKGROUND = (0.42, 0.62)  # grey level in [0, 1]: away from black and white, which are colours here

Array = NDArray[np.floating]


def _polygon(x: Array, y: Array, points: list[tuple[float, float]]) -> Array:
    """Signed distance to a simple polygon: nearest edge, sign by crossing parity."""
    distance = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - along * ex, y - ay - along * ey))
        crosses = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -distance, distance)


def _ring(*, corners: int, inner: float, start: float) -> list[tuple[float, float]]:
    """Corners of a star (inner < 1) or regular polygon (inner = 1); y grows downwards."""
    steps = corners * (2 if inner < 1 else 1)
    radii = [1.0 if inner == 1 or k % 2 == 0 else inner for k in range(steps)]
    angles = [start + 2 * np.pi * k / steps for k in range(steps)]
    return [(r * float(np.cos(a)), r * float(np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _heart(x: Array, y: Array) -> Array:
    """Two lobes over a wedge that touches both; the union of three distances."""
    lobes = np.hypot(np.abs(x) - 0.46, y + 0.34) - 0.52
    wedge = _polygon(x, y, [(-0.90, -0.08), (0.0, 1.0), (0.90, -0.08), (0.0, -0.45)])
    return np.minimum(lobes, wedge)


def signed_distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance of points to `shape` of radius 1 at the origin, x right, y down."""
    match shape:
        case "circle":
            return np.hypot(x, y) - 0.94
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.84
        case "triangle":
            return _polygon(x, y, [(0.0, -0.98), (1.0, 0.86), (-1.0, 0.86)])
        case "star":
            return _polygon(x, y, _ring(corners=5, inner=0.46, start=-np.pi / 2)) - 0.10
        case "cross":
            upright = np.maximum(np.abs(x) - 0.33, np.abs(y) - 0.98)
            level = np.maximum(np.abs(x) - 0.98, np.abs(y) - 0.33)
            return np.minimum(upright, level)
        case "heart":
            return _heart(x, y)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(shape: str, cx: float, cy: float, radius: float, size: int = SIZE) -> Array:
    """Share of each pixel covered by a shape: an [size, size] array in [0, 1]."""
    grid = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x, y = np.meshgrid((grid - cx) / radius, (grid - cy) / radius)
    return np.clip(0.5 - signed_distance(shape, x, y) * radius, 0, 1).astype(np.float32)


def render(scene: Scene, rng: np.random.Generator, size: int = SIZE) -> NDArray[np.uint8]:
    """A picture of `scene` with jittered position, size, colour and background: [size, size, 3] uint8."""
    image: Array = np.full((size, size, 3), rng.uniform(*BACKGROUND), np.float32)
    unit = size / SIZE
    for thing in scene:
        column, row = thing.column_row
        dx, dy = rng.uniform(-JITTER, JITTER, 2)
        cx, cy = (16 * column + 8 + dx) * unit, (16 * row + 8 + dy) * unit
        alpha = coverage(thing.shape, cx, cy, rng.uniform(*RADIUS) * unit, size)[..., None]
        color = np.asarray(COLORS[thing.color], np.float32) / 255 + rng.uniform(-0.03, 0.03, 3)
        image = image * (1 - alpha) + np.clip(color, 0, 1).astype(np.float32) * alpha
    image += rng.normal(0, 0.006, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Canvas:
    """Everything random about a picture except its scene, so that two scenes differ only in the cells that changed.

    Args:
        background: grey level in [0, 1].
        offset: of a thing from its cell's centre, pixels, [9, 2].
        radius: pixels, [9].
        tint: added to a thing's colour, [9, 3].
        grain: added to all pixels, [SIZE, SIZE, 3].
        outlines: coverages of shapes in cells that were painted before.
    """

    background: float
    offset: Array
    radius: Array
    tint: Array
    grain: Array
    outlines: dict[tuple[str, int], Array] = field(default_factory=dict, repr=False)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Canvas:
        """With the ranges of `render`."""
        return cls(
            background=float(rng.uniform(*BACKGROUND)),
            offset=rng.uniform(-JITTER, JITTER, (len(CELLS), 2)),
            radius=rng.uniform(*RADIUS, len(CELLS)),
            tint=rng.uniform(-0.03, 0.03, (len(CELLS), 3)),
            grain=rng.normal(0, 0.006, (SIZE, SIZE, 3)).astype(np.float32),
        )

    def paint(self, scene: Scene) -> NDArray[np.uint8]:
        """The picture of `scene` on this canvas: [SIZE, SIZE, 3] uint8."""
        image: Array = np.full((SIZE, SIZE, 3), self.background, np.float32)
        for thing in scene:
            at = CELLS.index(thing.cell)
            column, row = thing.column_row
            tile = image[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)]
            if (thing.shape, at) not in self.outlines:
                cx, cy = CELL / 2 + self.offset[at]
                self.outlines[thing.shape, at] = coverage(thing.shape, cx, cy, self.radius[at], CELL)[..., None]
            alpha = self.outlines[thing.shape, at]
            color = np.clip(np.asarray(COLORS[thing.color], np.float32) / 255 + self.tint[at], 0, 1)
            tile[:] = tile * (1 - alpha) + color.astype(np.float32) * alpha
        return (np.clip(image + self.grain, 0, 1) * 255 + 0.5).astype(np.uint8)
