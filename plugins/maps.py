"""Built-in advantage maps: uniform, detector, features. Each is chosen by `advantage.map=NAME(@option=value)*`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from unigrpo_cli import Options, RewardBatch, RewardContext, Sample, hookimpl
from unigrpo_cli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unigrpo_plugins.geneval import GenEvalReward
    from unigrpo_plugins.geneval_rules import DetectedObject

    Map = NDArray[np.float64]  # [rows, columns]

Kind = TypeVar("Kind", bound=Options)


class DetectorMapOptions(Options):
    detector: Literal["auto", "shapes", "mask2former", "rfdetr", "boxes"] = Field(
        "auto", description="the detector, as of `geneval`"
    )
    weights: str | None = Field(None, description="its weights, as of `geneval`")
    wrong: float = Field(
        4.0,
        ge=0,
        description="weight of wrong and surplus things; in the shapes world of missing ones too",
    )
    thing: float = Field(2.0, ge=0, description="weight of other things; the rest has weight 1")


class FeaturesMapOptions(Options):
    model: str | None = Field(None, description="a vision model of transformers, hub id or directory")
    components: int = Field(3, ge=1, description="principal components [ViPO: 3]")
    smooth: float = Field(1.0, ge=0, description="deviation of the Gaussian in feature positions; 0: none [ViPO: 1]")
    batch_size: int = Field(32, ge=1, description="pictures per forward pass")


@hookimpl
def unigrpo_advantage_map(
    name: str, options: dict[str, Any], batch: RewardBatch, grids: list[tuple[int, int]], context: RewardContext
) -> list[Map] | None:
    import numpy as np

    match name:
        case "uniform":
            _read(Options, name, options)
            return [np.ones(grid) for grid in grids]
        case "detector":
            return _detector_maps(_read(DetectorMapOptions, name, options), batch, grids, context)
        case "features":
            return _features_maps(_read(FeaturesMapOptions, name, options), batch, grids, context)
    return None


def _read(kind: type[Kind], name: str, options: dict[str, Any]) -> Kind:
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        accepted = ", ".join(kind.model_fields) or "none"
        raise UsageError(
            f"advantage.map={name}: option {first['loc'][0]}: {first['msg']}; options: {accepted}"
        ) from error


# ----- where GenEval's verdict comes from


def _detector_maps(
    o: DetectorMapOptions, batch: RewardBatch, grids: Sequence[tuple[int, int]], context: RewardContext
) -> list[Map]:
    from unigrpo_plugins.geneval import GenEvalOptions, GenEvalReward

    def load() -> GenEvalReward:
        judge = GenEvalReward(GenEvalOptions(detector=o.detector, weights=o.weights))
        judge.setup(context)
        return judge

    judge = context.shared.get(("detector map", o.detector, o.weights), load)
    asked = tuple(replace(s, metadata={"include": ()} | dict(s.metadata)) for s in batch.samples)
    seen = judge.objects(replace(batch, samples=asked))
    return [
        _painted(grid, sample.pixels.shape[:2], _marks(objects, sample, judge.detector_name == "shapes"), o)
        for grid, sample, objects in zip(grids, batch.samples, seen, strict=True)
    ]


Mark = tuple[tuple[float, float, float, float], bool]
"""A box in pixels, and whether something is wrong there."""


def _marks(objects: Mapping[str, Sequence[DetectedObject]], sample: Sample, shapes: bool) -> list[Mark]:
    """What lies where: every detected thing, and in the shapes world every cell where picture and text differ."""
    wanted = sample.metadata.get("include", ())
    marks: list[Mark] = []
    right: set[int] = set()
    for item in wanted:
        own = [o for o in objects.get(item["class"], ()) if item.get("color") in (None, o.color) and id(o) not in right]
        right |= {id(o) for o in own[: item["count"]]}
    for own in map(list, objects.values()):
        marks += [(o.box, bool(wanted) and id(o) not in right) for o in own]
    return marks + (_differences(sample) if shapes else [])


def _differences(sample: Sample) -> list[Mark]:
    """The cells of the shapes world where the picture does not show what the text before it says."""
    from unigrpo_plugins.detector_shapes import ShapesDetector
    from unigrpo_plugins.shapes import said_scene, shown_scenes

    said = said_scene(sample.preceding_text)
    if said is None:
        return []
    (shown,) = shown_scenes(ShapesDetector(), [sample.pixels])
    height, width = (side / 3 for side in sample.pixels.shape[:2])
    places = {("abc".index(t.cell[0]), "123".index(t.cell[1])) for t in set(said) ^ set(shown)}
    return [((x * width, y * height, (x + 1) * width, (y + 1) * height), True) for x, y in sorted(places)]


def _painted(grid: tuple[int, int], size: tuple[int, ...], marks: Sequence[Mark], o: DetectorMapOptions) -> Map:
    """Weights of a grid: the marks of a picture, wrong ones last."""
    import math

    import numpy as np

    found = np.ones(grid)
    for (x0, y0, x1, y1), wrong in sorted(marks, key=lambda mark: mark[1]):
        rows = slice(int(y0 / size[0] * grid[0]), math.ceil(y1 / size[0] * grid[0]))
        columns = slice(int(x0 / size[1] * grid[1]), math.ceil(x1 / size[1] * grid[1]))
        found[rows, columns] = o.wrong if wrong else o.thing
    return found


# ----- what a vision backbone finds in the picture


def _features_maps(
    o: FeaturesMapOptions, batch: RewardBatch, grids: Sequence[tuple[int, int]], context: RewardContext
) -> list[Map]:
    from unigrpo_plugins.features import shared_backbone

    backbone, _ = shared_backbone(context, "advantage.map=features", o.model, o.batch_size)
    features = backbone.features(batch.pixels)
    return [
        resized(smoothed(salience(own, o.components), o.smooth), grid)
        for own, grid in zip(features, grids, strict=True)
    ]


def salience(features: NDArray[np.floating], components: int = 3) -> Map:
    """How far a position is from the mean along the principal components, weighted by their explained variance.

    With centred features F of P positions and F = U S V^T: sum over the first k of (s_k^2 / sum s^2) |u_k s_k|. A
    component's sign is arbitrary, so its magnitude counts. [rows, columns], >= 0; all ones where nothing varies.
    """
    import numpy as np

    rows, columns, width = features.shape
    x = features.reshape(rows * columns, width).astype(np.float64)
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    if not s[0] > 1e-9 * max(1.0, float(np.abs(x).max())):
        return np.ones((rows, columns))
    k = min(components, len(s))
    share = s[:k] ** 2 / (s**2).sum()
    return (np.abs(u[:, :k] * s[:k]) @ share).reshape(rows, columns)


def smoothed(values: Map, deviation: float) -> Map:
    """A Gaussian over the positions, with edges repeated."""
    import numpy as np

    if not deviation:
        return values
    reach = max(1, round(3 * deviation))
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * deviation**2))
    weights /= weights.sum()
    for axis in (0, 1):
        padded = np.pad(values, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        length = values.shape[axis]
        values = sum(w * np.take(padded, range(k, k + length), axis=axis) for k, w in enumerate(weights))
    return values


def resized(values: Map, grid: tuple[int, int]) -> Map:
    """Linear interpolation to another grid; the centres of the cells are the points."""
    import numpy as np

    for axis in (0, 1):
        old, new = values.shape[axis], grid[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high, part = np.minimum(low + 1, old - 1), at - low
        part = part[:, None] if axis == 0 else part[None]
        values = np.take(values, low, axis=axis) * (1 - part) + np.take(values, high, axis=axis) * part
    return values
