"""Diagnostic rewards of the shapes world: is the plan right, is it painted, is the picture clean?

Evaluation reports them with the trained rewards: they show which of the two experts learnt, and whether texture grows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unigrpo_cli import Options as NoOptions
from unigrpo_cli import RewardBatch
from unigrpo_cli.errors import RewardError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unigrpo_cli.toy.world import Scene
    from unigrpo_plugins.detector_shapes import ShapesDetector


def shown_scenes(detector: ShapesDetector, images: Sequence[NDArray[np.uint8]]) -> list[Scene]:
    """What each picture shows: every confident detection with its colour and the cell of its centre."""
    from unigrpo_cli.toy.world import CELLS, Thing
    from unigrpo_plugins.colors import name_color

    def thing(image: NDArray[np.uint8], d: Any) -> Thing:
        column = int((d.box[0] + d.box[2]) / 2 * 3 / image.shape[1])
        row = int((d.box[1] + d.box[3]) / 2 * 3 / image.shape[0])
        return Thing(name_color(image, d.mask, d.box), d.label, CELLS[3 * row + column])

    found = zip(images, detector.detect(images), strict=True)
    return [tuple(thing(image, d) for d in own if d.score > detector.threshold) for image, own in found]


def said_scene(text: str | None) -> Scene | None:
    """The scene that a text says the next picture shows: of a plan, a reflection, an edit plan or a critique."""
    from unigrpo_cli.toy.reflect import parse_reflection
    from unigrpo_cli.toy.restores import parse_critique
    from unigrpo_cli.toy.world import parse_plan

    plan = parse_plan(text or "")
    if plan is not None:
        return plan
    reflection, critique = parse_reflection(text or ""), parse_critique(text or "")
    if reflection is not None:
        return reflection.target
    return None if critique is None else critique.scene


class ShapesReward:
    """What the rewards of the shapes world share: scores in [0, 1], no options, nothing to load but a detector."""

    range = (0.0, 1.0)
    licence = "ours"
    Options: type[NoOptions] = NoOptions

    def __init__(self, options: Any):
        from unigrpo_plugins.detector_shapes import ShapesDetector

        self.options, self.detector = options, ShapesDetector()


class FidelityReward(ShapesReward):
    """1 when the picture shows exactly what the text right before it says, thing by thing: colour, shape and cell."""

    name = "fidelity"
    summary = "1 when the picture shows exactly the written plan (shapes world)"
    needs = frozenset({"image", "texts"})

    def score(self, batch: RewardBatch) -> list[float]:
        said = [said_scene(sample.preceding_text) for sample in batch.samples]
        shown = shown_scenes(self.detector, batch.pixels)
        return [float(a is not None and Counter(a) == Counter(b)) for a, b in zip(said, shown, strict=True)]


class PlanReward(ShapesReward):
    """1 when the text right before the picture, painted faithfully, would answer the prompt.

    An edit plan must carry the instruction out and keep all else; a critique must be the true one.
    """

    name = "plan"
    summary = "1 when the written plan answers the prompt (shapes world)"
    needs = frozenset({"texts", "metadata"})

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        lacking = [row for row in metadata if not {"include", "target", "scene"} & row.keys()]
        if lacking:
            raise RewardError(
                f"reward 'plan' needs metadata 'include', or an edit's 'target' or a restore's 'scene', which "
                f"{len(lacking)} of {len(metadata)} prompts lack; give a .jsonl file with it in every row"
            )

    def score(self, batch: RewardBatch) -> list[float]:
        texts = [sample.preceding_text for sample in batch.samples]
        return [float(_right(text, m)) for text, m in zip(texts, batch.metadata, strict=True)]


def _right(text: str | None, metadata: Mapping[str, Any]) -> bool:
    from unigrpo_cli.toy.edits import edit_targets
    from unigrpo_cli.toy.reflect import by_cell
    from unigrpo_cli.toy.restores import parse_critique, true_critique
    from unigrpo_cli.toy.world import satisfies

    said = said_scene(text)
    if said is None:
        return False
    if "target" in metadata:
        return by_cell(said) in edit_targets(metadata)
    if "scene" in metadata:
        return parse_critique(text or "") == true_critique(metadata)
    return satisfies(said, metadata)


class OriginalReward(ShapesReward):
    """1 minus the mean absolute difference from the picture before it was degraded."""

    name = "original"
    summary = "likeness to the picture before its fault (restores of the shapes world)"
    needs = frozenset({"image", "metadata:scene"})

    def score(self, batch: RewardBatch) -> list[float]:
        import numpy as np

        from unigrpo_cli.toy.restores import original_picture

        wanted = [original_picture(m).astype(np.float64) for m in batch.metadata]
        return [1 - float(np.abs(x - y).mean()) / 255 for x, y in zip(batch.pixels, wanted, strict=True)]


class CleanReward(ShapesReward):
    """Evenness of the background: 1 minus ten times its deviation."""

    name = "clean"
    summary = "evenness of the background; falls when a policy drifts into texture (shapes world)"
    needs = frozenset({"image"})

    def score(self, batch: RewardBatch) -> list[float]:
        from unigrpo_plugins.detector_shapes import background_deviation

        return [float(max(0.0, 1 - 10 * d)) for d in background_deviation(batch.pixels)]
