"""GenEval's rules, from detections to a verdict, and graded variants for training.

The rules are those of djghosh13/geneval (MIT); each is checked against its verdicts in tests/golden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Protocol, TypeVar

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MAX_OBJECTS = 16  # per class
OVERLAP = 0.1  # an offset counts beyond this share of both boxes' extent
HOLDS = 0.5  # a relation holds beyond this component
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
KINDS = ("count", "color", "position")


class HasScore(Protocol):
    @property
    def score(self) -> float: ...


Detection = TypeVar("Detection", bound=HasScore)


@dataclass(frozen=True)
class DetectedObject:
    """A detected object: confidence, box (x0, y0, x1, y1) with y downwards, name of its colour.

    `likeness` to each colour is in [0, 1]; without it, 1 for the named colour.
    """

    score: float
    box: tuple[float, float, float, float]
    color: str | None = None
    likeness: Mapping[str, float] = field(default_factory=dict)

    def likeness_to(self, color: str) -> float:
        return float(self.likeness.get(color, 0.0) if self.likeness else self.color == color)


@dataclass(frozen=True)
class Requirement:
    """One requirement of a prompt.

    Args:
        kinds: its kinds; after a wrong count one requirement, 0, stands for colour and position together.
        value: its fulfilment by the rules, in [0, 1].
        soft: the same with graded colour and geometry.
    """

    kinds: tuple[str, ...]
    value: float
    soft: float


@dataclass(frozen=True)
class Verdict:
    """The verdict on one picture.

    Args:
        correct: the official verdict. Surplus objects are allowed unless an `exclude` clause forbids them.
        strict: the same with exact counts, without `exclude`.
        requirements: one for every count, colour and position of the prompt.
        reasons: why the picture is wrong; empty when it is correct.
    """

    correct: bool
    strict: bool
    requirements: tuple[Requirement, ...]
    reasons: tuple[str, ...]

    @property
    def partial(self) -> float:
        """Mean of the requirements: 1 when all are met with exact counts."""
        return sum(requirement.value for requirement in self.requirements) / len(self.requirements)

    @property
    def soft(self) -> float:
        return sum(requirement.soft for requirement in self.requirements) / len(self.requirements)

    def part(self, kind: str) -> float | None:
        """Mean of the requirements of one kind; None without any."""
        values = [requirement.value for requirement in self.requirements if kind in requirement.kinds]
        return sum(values) / len(values) if values else None


def keep_confident(
    objects: Mapping[str, Sequence[Detection]], metadata: Mapping, *, threshold: float, counting_threshold: float
) -> dict[str, list[Detection]]:
    """Per class the objects strictly above the threshold (counting has its own), best first, at most 16."""
    limit = counting_threshold if metadata.get("tag") == "counting" else threshold
    kept = {}
    for label, seen in objects.items():
        best = sorted((s for s in seen if s.score > limit), key=lambda s: s.score, reverse=True)
        if best:
            kept[label] = best[:MAX_OBJECTS]
    return kept


def direction(a: DetectedObject, b: DetectedObject) -> tuple[float, float]:
    """Direction from `b` to `a`, (x, y) with y downwards; (0, 0) when they are at one place.

    The offset of the centres is shrunk per axis by a tenth of both extents, then divided by its unshrunk length.
    """
    offset, shrunk = [], []
    for low, high in ((0, 2), (1, 3)):
        between = (a.box[low] + a.box[high]) / 2 - (b.box[low] + b.box[high]) / 2
        extent = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        rest = max(abs(between) - OVERLAP * extent, 0.0)
        offset.append(between)
        shrunk.append(rest if between >= 0 else -rest)
    if max(abs(shrunk[0]), abs(shrunk[1])) < 1e-3:
        return 0.0, 0.0
    length = hypot(*offset)
    return shrunk[0] / length, shrunk[1] / length


def component(a: DetectedObject, relation: str, b: DetectedObject) -> float:
    """Component of the direction from `b` to `a` along a relation, in (-1, 1); negative on the wrong side."""
    (x, y), (along_x, along_y) = direction(a, b), DIRECTIONS[relation]
    return x * along_x + y * along_y


def judge(objects: Mapping[str, Sequence[DetectedObject]], metadata: Mapping) -> Verdict:
    """Apply all clauses of a prompt's metadata to the confident objects of one picture."""
    reasons: list[str] = []
    inexact: list[str] = []
    requirements: list[Requirement] = []
    groups: list[list[DetectedObject] | None] = []
    for item in metadata["include"]:
        label, want = item["class"], item["count"]
        present = list(objects.get(label, ()))
        chosen = present[:want]
        matched, exact = len(chosen) == want, len(present) == want
        counted = max(0.0, 1 - abs(want - len(present)) / want)
        found: list[Requirement] = [Requirement(("count",), counted, counted)]
        if not matched:
            reasons.append(f"{want} {label} wanted, {len(present)} found")
        elif not exact:
            inexact.append(f"exactly {want} {label} wanted, {len(present)} found")
        if "color" in item:
            right = sum(s.color == item["color"] for s in chosen)
            if matched and right < want:
                matched = False
                reasons.append(f"{want} {item['color']} {label} wanted, {right} found")
            found.append(
                Requirement(("color",), right / want, sum(s.likeness_to(item["color"]) for s in chosen) / want)
            )
        if "position" in item:
            relation, target = item["position"]
            others = groups[target] if matched else None
            why, requirement = _placed(chosen, relation, others, label, metadata["include"][target]["class"])
            if matched and why:
                reasons.append(why)
            matched = matched and not why
            found.append(requirement)
        if not exact and len(found) > 1:
            found[1:] = [Requirement(tuple(kind for requirement in found[1:] for kind in requirement.kinds), 0.0, 0.0)]
        requirements += found
        groups.append(chosen if matched else None)
    strict = not reasons and not inexact
    for item in metadata.get("exclude", ()):
        present = list(objects.get(item["class"], ()))
        if len(present) >= item["count"]:
            reasons.append(f"fewer than {item['count']} {item['class']} wanted, {len(present)} found")
    return Verdict(not reasons, strict, tuple(requirements), tuple(reasons))


def _placed(
    chosen: Sequence[DetectedObject], relation: str, others: Sequence[DetectedObject] | None, label: str, target: str
) -> tuple[str, Requirement]:
    """Why a group is not in a relation to another, "" if it is, and the requirement.

    Every pair must be; so the graded value is that of the worst pair: its component over the one at which the rule
    holds.
    """
    kinds = ("position",)
    if not others:
        return f"nothing for {label} to be {relation}", Requirement(kinds, 0.0, 0.0)
    worst = min(component(a, relation, b) for a in chosen for b in others)
    why = "" if worst > HOLDS else f"{label} is not {relation} {target}"
    return why, Requirement(kinds, float(not why), min(max(worst / HOLDS, 0.0), 1.0))
