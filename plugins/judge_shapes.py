"""The embedded model's judge: it understands pictures and prompts of the shapes world and nothing else.

It runs in this process, without weights or a network, so that `vlm` works before a real judge is at hand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unigrpo_cli.toy.prompts import parse_prompt
from unigrpo_plugins.colors import name_color
from unigrpo_plugins.detector_shapes import ShapesDetector, background_deviation
from unigrpo_plugins.detectors import Image
from unigrpo_plugins.geneval_rules import DetectedObject, judge, keep_confident
from unigrpo_plugins.judge_client import Answer
from unigrpo_plugins.judge_modes import (
    BEST,
    HIGHEST,
    LOWEST,
    SHOWS,
    Form,
    Question,
    Rating,
    Reading,
    Rubric,
    YesNoOdds,
)

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SHARES = (0.6, 0.25, 0.1, 0.05)
"""Share of each spelling of a word in its probability."""


@dataclass(frozen=True)
class Sight:
    """A picture of the shapes world, judged.

    Args:
        shown: the share of the request that it shows; None for a request of another world.
        clean: evenness of its background.
        reasons: what is wrong, in words.
    """

    shown: float | None
    clean: float
    reasons: tuple[str, ...]


def look(image: Image, request: str, detector: ShapesDetector) -> Sight:
    """Judge a picture by a prompt or by a question of a checklist."""
    clean = max(0.0, 1 - 10 * background_deviation([image])[0])
    asked = re.fullmatch(rf"{SHOWS}(?:exactly )?(.*)\?", request.strip(), re.DOTALL)
    metadata = parse_prompt(asked[1] if asked else request.strip())
    if metadata is None:
        return Sight(None, clean, ("I cannot read that.",))
    objects: dict[str, list[DetectedObject]] = {}
    for d in detector.detect([image])[0]:
        objects.setdefault(d.label, []).append(DetectedObject(d.score, d.box, name_color(image, d.mask, d.box)))
    thresholds = {"threshold": detector.threshold, "counting_threshold": detector.counting_threshold}
    verdict = judge(keep_confident(objects, metadata, **thresholds), metadata)
    return Sight(verdict.partial, clean, verdict.reasons)


def answer(sight: Sight, form: Form) -> Answer:
    """The answer of a language model that sees this, in the form that was asked for."""
    if sight.shown is None:
        return Answer("I cannot tell.", (("I", math.log(0.9)), ("The", math.log(0.05)), ("Well", math.log(0.02))))
    if isinstance(form, Rubric):
        values = [sight.shown, *[sight.clean] * (len(form.axes) - 1)]
        grades = {a: LOWEST + round((HIGHEST - LOWEST) * v) for a, v in zip(form.axes, values, strict=True)}
        return Answer(json.dumps({"reason": "; ".join(sight.reasons) or "As asked.", **grades}))
    if isinstance(form, Rating):
        return Answer(str(round(BEST * sight.shown)))
    if not isinstance(form, YesNoOdds):
        return Answer("Yes" if sight.shown == 1 else "No")
    odds = 0.02 + 0.96 * sight.shown
    first = [("The", math.log(0.02)), ("It", math.log(0.01))]
    for word, p in (("yes", odds), ("no", 1 - odds)):
        spellings = (word.title(), f" {word}", word, word.upper())
        first += [(token, math.log(0.97 * share * p)) for token, share in zip(spellings, SHARES, strict=True)]
    first.sort(key=lambda pair: -pair[1])
    return Answer(first[0][0], tuple(first))


class ShapesJudge:
    """Answers in this process, in the form of a mode."""

    def __init__(self, mode: str, axes: Mapping[str, float]):
        self.form: Form = Rubric(axes) if mode == "rubric" else Rating() if mode == "text" else YesNoOdds()
        self.detector = ShapesDetector()
        self.questions = 0

    def read(
        self, pictures: Sequence[Picture], asked: Sequence[tuple[int, Question]], *, remember: bool
    ) -> list[Reading]:
        """A reading for each (number of a picture, question)."""
        images = [np.asarray(picture.convert("RGB")) for picture in pictures]
        self.questions += len(asked)
        return [self.form.read(answer(look(images[k], q.text, self.detector), self.form)) for k, q in asked]

    def figures(self) -> dict[str, float]:
        return {"questions": self.questions}

    def close(self) -> None:
        pass
