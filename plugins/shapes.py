"""Diagnostic rewards of the shapes world: is the plan right, is it painted, is the picture clean?

Evaluation reports them with the trained rewards: they show which of the two experts learnt, and whether texture grows.
"""

from __future__ import annotations

from collections import Counter

from unigrpo_cli import Options as NoOptions
from unigrpo_cli import RewardBatch, RewardContext


class FidelityReward:
    """1 when the picture shows exactly the plan: every object in its colour, shape and cell."""

    name = "fidelity"
    summary = "1 when the picture shows exactly the written plan (shapes world)"
    range = (0.0, 1.0)
    needs = frozenset({"image", "reasoning"})
    batch_size = None
    licence = "ours"
    Options = NoOptions

    def __init__(self, options: NoOptions):
        pass

    def setup(self, context: RewardContext) -> None:
        from unigrpo_plugins.detector_shapes import ShapesDetector

        self.detector = ShapesDetector()

    def score(self, batch: RewardBatch) -> list[float]:
        from unigrpo_cli.toy.world import CELLS, parse_plan
        from unigrpo_plugins.colors import name_color

        scores = []
        found = self.detector.detect(batch.pixels)
        for image, detections, text in zip(batch.pixels, found, batch.reasoning, strict=True):
            plan = parse_plan(text or "")
            shown: Counter = Counter()
            for d in detections:
                if d.score > self.detector.threshold:
                    column = int((d.box[0] + d.box[2]) / 2 * 3 / image.shape[1])
                    row = int((d.box[1] + d.box[3]) / 2 * 3 / image.shape[0])
                    shown[name_color(image, d.mask, d.box), d.label, CELLS[3 * row + column]] += 1
            planned = Counter((t.color, t.shape, t.cell) for t in plan or ())
            scores.append(float(plan is not None and shown == planned))
        return scores


class PlanReward:
    """1 when the written plan, painted faithfully, would answer the prompt."""

    name = "plan"
    summary = "1 when the written plan answers the prompt (shapes world)"
    range = (0.0, 1.0)
    needs = frozenset({"reasoning", "metadata:include"})
    batch_size = None
    licence = "ours"
    Options = NoOptions

    def __init__(self, options: NoOptions):
        pass

    def score(self, batch: RewardBatch) -> list[float]:
        from unigrpo_cli.toy.world import parse_plan, satisfies

        plans = [parse_plan(text or "") for text in batch.reasoning]
        return [
            float(plan is not None and satisfies(plan, metadata))
            for plan, metadata in zip(plans, batch.metadata, strict=True)
        ]


class CleanReward:
    """Evenness of the background: 1 minus ten times its deviation."""

    name = "clean"
    summary = "evenness of the background; falls when a policy drifts into texture (shapes world)"
    range = (0.0, 1.0)
    needs = frozenset({"image"})
    batch_size = None
    licence = "ours"
    Options = NoOptions

    def __init__(self, options: NoOptions):
        pass

    def score(self, batch: RewardBatch) -> list[float]:
        from unigrpo_plugins.detector_shapes import background_deviation

        return [float(max(0.0, 1 - 10 * d)) for d in background_deviation(batch.pixels)]
