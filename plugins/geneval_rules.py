"""GenEval's rules: from detections to a verdict, exactly, and the graded variants used for training.

Facts from djghosh13/geneval (MIT); every clause is checked against its verdicts in tests/golden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MAX_OBJECTS = 16  # per class
OVERLAP = 0.1  # how much of both boxes' extent an offset must exceed before it counts


@dataclass(frozen=True)
class Seen:
    """A detected object as the rules see it: confidence, box (x0, y0, x1, y1), y downwards, colour name."""

    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one picture.

    Args:
        correct: the official verdict. Surplus objects are fine unless an `exclude` clause forbids them.
        strict: the same with exact counts (`exclude` not consulted).
        atoms: one (kind, value in [0, 1]) for every count, colour and position that was asked for.
        reasons: why the picture is wrong, in words; empty when it is correct.
    """

    correct: bool
    strict: bool
    atoms: tuple[tuple[str, float], ...]
    reasons: tuple[str, ...]

    @property
    def partial(self) -> float:
        """Mean of the atoms: 1 when all that was asked for is there, exactly as often as asked."""
        return sum(value for _, value in self.atoms) / len(self.atoms)


def keep_confident(
    objects: Mapping[str, Sequence[Seen]], metadata: Mapping, *, threshold: float, counting_threshold: float
) -> dict[str, list[Seen]]:
    """Per class the objects above the threshold (strictly; its own for counting), best first, at most 16."""
    limit = counting_threshold if metadata.get("tag") == "counting" else threshold
    kept = {}
    for label, seen in objects.items():
        best = sorted((s for s in seen if s.score > limit), key=lambda s: s.score, reverse=True)
        if best:
            kept[label] = best[:MAX_OBJECTS]
    return kept


def relations(a: Seen, b: Seen) -> set[str]:
    """The relations in which `a` stands to `b`.

    The centre offset is shrunk per axis by a tenth of both extents, then divided by its unshrunk length; a
    component beyond one half is a relation. So a diagonal can be two relations, or none.
    """
    offset, shrunk = [], []
    for low, high in ((0, 2), (1, 3)):
        between = (a.box[low] + a.box[high]) / 2 - (b.box[low] + b.box[high]) / 2
        extent = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        rest = max(abs(between) - OVERLAP * extent, 0.0)
        offset.append(between)
        shrunk.append(rest if between >= 0 else -rest)
    if max(abs(shrunk[0]), abs(shrunk[1])) < 1e-3:
        return set()
    length = hypot(*offset)
    x, y = shrunk[0] / length, shrunk[1] / length
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def judge(objects: Mapping[str, Sequence[Seen]], metadata: Mapping) -> Verdict:
    """Apply all clauses of a prompt's metadata to the confident objects of one picture."""
    reasons: list[str] = []
    inexact: list[str] = []
    atoms: list[tuple[str, float]] = []
    groups: list[list[Seen] | None] = []
    for item in metadata["include"]:
        label, want = item["class"], item["count"]
        present = list(objects.get(label, ()))
        chosen = present[:want]
        matched = len(chosen) == want
        exact = len(present) == want
        atoms.append(("count", max(0.0, 1 - abs(want - len(present)) / want)))
        if not matched:
            reasons.append(f"{want} {label} wanted, {len(present)} found")
        elif not exact:
            inexact.append(f"exactly {want} {label} wanted, {len(present)} found")
        if "color" in item:
            right = sum(s.color == item["color"] for s in chosen)
            if matched and right < want:
                matched = False
                reasons.append(f"{want} {item['color']} {label} wanted, {right} found")
            if exact:
                atoms.append(("color", right / want))
        if "position" in item:
            relation, target = item["position"]
            holds = False
            if matched:
                others = groups[target]
                if others is None:
                    reasons.append(f"nothing for {label} to be {relation}")
                else:
                    holds = all(relation in relations(a, b) for a in chosen for b in others)
                    if not holds:
                        reasons.append(f"{label} is not {relation} {metadata['include'][target]['class']}")
                matched = holds
            if exact:
                atoms.append(("position", float(holds)))
        if not exact and ("color" in item or "position" in item):
            atoms.append(("color" if "color" in item else "position", 0.0))
        groups.append(chosen if matched else None)
    strict = not reasons and not inexact
    for item in metadata.get("exclude", ()):
        present = list(objects.get(item["class"], ()))
        if len(present) >= item["count"]:
            reasons.append(f"fewer than {item['count']} {item['class']} wanted, {len(present)} found")
    return Verdict(not reasons, strict, tuple(atoms), tuple(reasons))
