"""GenEval as a reward: did the picture come out as asked? Objects, counts, colours, positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput
from unigrpo_plugins.geneval_rules import COLORS, Seen, Verdict, judge, keep_confident

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODES = ("official", "strict", "partial")


class GenEvalOptions(Options):
    detector: Literal["shapes"] = Field("shapes", description="what looks at the picture")
    mode: Literal["auto", "official", "strict", "partial"] = Field(
        "auto",
        description="official: GenEval's verdict, 0 or 1; strict: the same with exact counts; partial: mean of "
        "what was asked for, each in [0, 1]; auto: partial in training (a denser signal), official in evaluation",
    )
    threshold: float | None = Field(None, description="smallest confidence; default is the detector's")
    counting_threshold: float | None = Field(None, description="the same for counting prompts")


class GenEvalReward:
    """Detected objects against GenEval's clauses; colours by the nearest of ten in CIELAB."""

    name = "geneval"
    summary = "objects, counts, colours and positions as asked (GenEval's rules on detections)"
    range = (0.0, 1.0)
    needs = frozenset({"image", "metadata:include"})
    batch_size = None
    licence = "rules: facts of GenEval (MIT); detector `shapes`: ours"
    Options = GenEvalOptions

    def __init__(self, options: GenEvalOptions):
        self.options = options

    def setup(self, context: RewardContext) -> None:
        from unigrpo_plugins.detectors import ShapesDetector

        self.detector = ShapesDetector()

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Refuse prompts about things the detector cannot see: it would find none and call that wrong."""
        from unigrpo_cli.errors import RewardError

        for m in metadata:
            for item in [*m["include"], *m.get("exclude", [])]:
                if item.get("color", COLORS[0]) not in COLORS:
                    raise RewardError(
                        f"reward 'geneval': no object is ever {item['color']!r} to it; its colours are "
                        f"{', '.join(COLORS)}"
                    )
        unseen = [c for m in metadata for c in _classes(m) if c not in self.detector.labels]
        if unseen:
            missing = sorted(set(unseen))
            raise RewardError(
                f"reward 'geneval': detector {self.options.detector!r} cannot see {', '.join(missing[:4])} "
                f"({len(missing)} classes of these prompts); it sees {', '.join(sorted(self.detector.labels))}. "
                "Another reward may judge such prompts, e.g. --reward clip"
            )

    def score(self, batch: RewardBatch) -> RewardOutput:
        mode = self.options.mode
        if mode == "auto":
            mode = "partial" if batch.split == "train" else "official"
        verdicts = [
            judge(self._confident(seen, metadata), metadata)
            for seen, metadata in zip(self._see(batch.pixels), batch.metadata, strict=True)
        ]
        return RewardOutput(
            [_value(v, mode) for v in verdicts],
            components={m: [_value(v, m) for v in verdicts] for m in MODES},
            info=[
                {"reasons": list(v.reasons), "tag": m.get("tag")}
                for v, m in zip(verdicts, batch.metadata, strict=True)
            ],
        )

    def _see(self, pixels: Sequence[NDArray[np.uint8]]) -> list[dict[str, list[Seen]]]:
        """Detections by class with their colours."""
        return [
            objects_by_class(image, found)
            for image, found in zip(pixels, self.detector.detect(pixels), strict=True)
        ]

    def _confident(self, seen: dict[str, list[Seen]], metadata: Mapping[str, Any]) -> dict[str, list[Seen]]:
        options, detector = self.options, self.detector
        return keep_confident(
            seen,
            metadata,
            threshold=detector.threshold if options.threshold is None else options.threshold,
            counting_threshold=(
                detector.counting_threshold if options.counting_threshold is None else options.counting_threshold
            ),
        )


def _classes(metadata: Mapping[str, Any]) -> list[str]:
    return [item["class"] for item in metadata["include"]]


def _value(verdict: Verdict, mode: str) -> float:
    return float(getattr(verdict, "correct" if mode == "official" else mode))


def objects_by_class(image: NDArray[np.uint8], found: Sequence) -> dict[str, list[Seen]]:
    """Detections of one picture as the rules see them, by class."""
    from unigrpo_plugins.colors import name_color

    seen: dict[str, list[Seen]] = {}
    for d in found:
        seen.setdefault(d.label, []).append(Seen(d.score, d.box, name_color(image, d.mask, d.box)))
    return seen
