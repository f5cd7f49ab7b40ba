"""GenEval's rules: from detections to a verdict, exactly, and the graded variants used for training.

Facts from djghosh13/geneval (MIT); every clause is checked against its verdicts in tests/golden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Protocol, TypeVar

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MAX_OBJECTS = 16  # per class
OVERLAP = 0.1  # how much of both boxes' extent an offset must exceed before it counts
HOLDS = 0.5  # the component beyond which a relation holds
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
KINDS = ("count", "color", "position")


class RewardResult(Protocol):
    @property
    def score(self) -> float: ...


Thing = TypeVar("Thing", bound=RewardResult)


@dataclass(frozen=True)
class Seen:
    """A detected object as the rules see it: confidence, box (x0, y0, x1, y1), y downwards, colour name.

    `likeness` is how much it is of each colour, in [0, 1]; without it, it is all of the one that it is called.
    """

    score: float
    box: tuple[float, float, float, float]
    color: str | None = None
    likeness: Mapping[str, float] = field(default_factory=dict)

    def alike(self, color: str) -> float:
        return float(self.likeness.get(color, 0.0) if self.likeness else self.color == color)


@dataclass(frozen=True)
class Atom:
    """One thing that was asked for.

    Args:
        kinds: what it is about; a wrong count is one atom, 0, for all that was asked beside the count.
        value: how much of it is there by the rules, in [0, 1].
        soft: the same with graded colour and geometry.
    """

    kinds: tuple[str, ...]
    value: float
    soft: float


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one picture.

    Args:
        correct: the official verdict. Surplus objects are fine unless an `exclude` clause forbids them.
        strict: the same with exact counts (`exclude` not consulted).
        atoms: one for every count, colour and position that was asked for.
        reasons: why the picture is wrong, in words; empty when it is correct.
    """

    correct: bool
    strict: bool
    atoms: tuple[Atom, ...]
    reasons: tuple[str, ...]

    @property
    def partial(self) -> float:
        """Mean of the atoms: 1 when all that was asked for is there, exactly as often as asked."""
        return sum(atom.value for atom in self.atoms) / len(self.atoms)

    @property
    def soft(self) -> float:
        """Mean of the graded atoms."""
        return sum(atom.soft for atom in self.atoms) / len(self.atoms)

    def part(self, kind: str) -> float | None:
        """Mean of the atoms of one kind; None where nothing of it was asked for."""
        values = [atom.value for atom in self.atoms if kind in atom.kinds]
        return sum(values) / len(values) if values else None


def keep_confident(
    objects: Mapping[str, Sequence[Thing]], metadata: Mapping, *, threshold: float, counting_threshold: float
) -> dict[str, list[Thing]]:
    """Per class the objects above the threshold (strictly; its own for counting), best first, at most 16."""
    limit = counting_threshold if metadata.get("tag") == "counting" else threshold
    kept = {}
    for label, seen in objects.items():
        best = sorted((s for s in seen if s.score > limit), key=lambda s: s.score, reverse=True)
        if best:
            kept[label] = best[:MAX_OBJECTS]
    return kept


def towards(a: Seen, b: Seen) -> tuple[float, float]:
    """In which direction `a` lies from `b`, (x, y) with y downwards; (0, 0) when they are at one place.

    The centre offset is shrunk per axis by a tenth of both extents, then divided by its unshrunk length.
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


def component(a: Seen, relation: str, b: Seen) -> float:
    """How far `a` lies from `b` along a relation's direction, in (-1, 1); negative on the wrong side."""
    (x, y), (along_x, along_y) = towards(a, b), DIRECTIONS[relation]
    return x * along_x + y * along_y


def relations(a: Seen, b: Seen) -> set[str]:
    """The relations in which `a` stands to `b`: a diagonal can be two, or none."""
    return {relation for relation in DIRECTIONS if component(a, relation, b) > HOLDS}


def judge(objects: Mapping[str, Sequence[Seen]], metadata: Mapping) -> Verdict:
    """Apply all clauses of a prompt's metadata to the confident objects of one picture."""
    reasons: list[str] = []
    inexact: list[str] = []
    atoms: list[Atom] = []
    groups: list[list[Seen] | None] = []
    for item in metadata["include"]:
        label, want = item["class"], item["count"]
        present = list(objects.get(label, ()))
        chosen = present[:want]
        matched, exact = len(chosen) == want, len(present) == want
        counted = max(0.0, 1 - abs(want - len(present)) / want)
        found: list[Atom] = [Atom(("count",), counted, counted)]
        if not matched:
            reasons.append(f"{want} {label} wanted, {len(present)} found")
        elif not exact:
            inexact.append(f"exactly {want} {label} wanted, {len(present)} found")
        if "color" in item:
            right = sum(s.color == item["color"] for s in chosen)
            if matched and right < want:
                matched = False
                reasons.append(f"{want} {item['color']} {label} wanted, {right} found")
            found.append(Atom(("color",), right / want, sum(s.alike(item["color"]) for s in chosen) / want))
        if "position" in item:
            relation, target = item["position"]
            others = groups[target] if matched else None
            why, atom = _placed(chosen, relation, others, label, metadata["include"][target]["class"])
            if matched and why:
                reasons.append(why)
            matched = matched and not why
            found.append(atom)
        if not exact and len(found) > 1:
            found[1:] = [Atom(tuple(kind for atom in found[1:] for kind in atom.kinds), 0.0, 0.0)]
        atoms += found
        groups.append(chosen if matched else None)
    strict = not reasons and not inexact
    for item in metadata.get("exclude", ()):
        present = list(objects.get(item["class"], ()))
        if len(present) >= item["count"]:
            reasons.append(f"fewer than {item['count']} {item['class']} wanted, {len(present)} found")
    return Verdict(not reasons, strict, tuple(atoms), tuple(reasons))


def _placed(
    chosen: Sequence[Seen], relation: str, others: Sequence[Seen] | None, label: str, target: str
) -> tuple[str, Atom]:
    """Why a group does not stand in a relation to another ("" when it does), and the atom.

    Every pair must; so the graded value is the worst pair's, its component over the one at which the rule holds.
    """
    kinds = ("position",)
    if not others:
        return f"nothing for {label} to be {relation}", Atom(kinds, 0.0, 0.0)
    worst = min(component(a, relation, b) for a in chosen for b in others)
    why = "" if worst > HOLDS else f"{label} is not {relation} {target}"
    return why, Atom(kinds, float(not why), min(max(worst / HOLDS, 0.0), 1.0))
