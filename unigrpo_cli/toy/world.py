"""The shapes world: what can be asked, what can be planned, and when a plan answers a prompt.

A *scene* is one to four things on a 3x3 board. Cells are named like a chess board's: column a, b, c from
left to right, row 1, 2, 3 from top to bottom. A *plan* is a scene in words, inside think tags:

    <think> red circle a1 , blue square c2 </think>

Prompts carry metadata in GenEval's form (`tag`, `include`, `exclude`, `prompt`), with shape names as
classes and GenEval's ten colours, so the same rules judge this world and the real benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
PLURALS = {"cross": "crosses"} | {s: s + "s" for s in SHAPES if s != "cross"}
COLORS = {
    "red": (214, 39, 40),
    "orange": (250, 140, 16),
    "yellow": (246, 220, 50),
    "green": (38, 148, 62),
    "blue": (36, 84, 220),
    "purple": (132, 48, 176),
    "pink": (250, 140, 190),
    "brown": (112, 66, 30),
    "black": (16, 16, 18),
    "white": (246, 246, 244),
}
CELLS = tuple(column + row for row in "123" for column in "abc")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MAX_THINGS = 4
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Thing:
    """One object of a scene: a colour and a shape in a cell of the board."""

    color: str
    shape: str
    cell: str

    @property
    def column_row(self) -> tuple[int, int]:
        return "abc".index(self.cell[0]), "123".index(self.cell[1])


Scene = tuple[Thing, ...]


def plan_text(scene: Scene) -> str:
    """The plan that describes `scene`, in the words the model writes."""
    things = " , ".join(f"{thing.color} {thing.shape} {thing.cell}" for thing in scene)
    return f"{THINK_OPEN} {things} {THINK_CLOSE}"


def parse_plan(text: str) -> Scene | None:
    """The scene a plan describes, or None when the text is not a plan of this world."""
    words = text.split()
    if len(words) < 2 or words[0] != THINK_OPEN or words[-1] != THINK_CLOSE:
        return None
    things = []
    for part in " ".join(words[1:-1]).split(" , "):
        match part.split():
            case [color, shape, cell] if color in COLORS and shape in SHAPES and cell in CELLS:
                things.append(Thing(color, shape, cell))
            case _:
                return None
    if len({thing.cell for thing in things}) < len(things):
        return None  # two things in one cell cannot be painted
    return tuple(things)


def stands(a: Thing, relation: str, b: Thing) -> bool:
    """Whether `a` stands in `relation` to `b` beyond doubt: along its axis, not diagonally.

    Stricter than GenEval's rule on boxes, which lets some diagonals pass: with position jitter a
    diagonal may or may not, and a true plan should never depend on luck.
    """
    dx = a.column_row[0] - b.column_row[0]
    dy = a.column_row[1] - b.column_row[1]
    x, y = RELATIONS[relation]
    along, across = (dx * x, dy) if x else (dy * y, dx)
    return along > abs(across)


def satisfies(scene: Scene, metadata: Mapping[str, Any]) -> bool:
    """Whether a plan answers the prompt: GenEval's clauses, with exact counts and nothing else in the scene.

    Exact counts are stricter than GenEval, which forgives surplus objects except in `counting`.
    """
    matched: list[list[Thing]] = []
    for item in metadata["include"]:
        found = [thing for thing in scene if thing.shape == item["class"] and item.get("color") in (None, thing.color)]
        if len(found) != item["count"]:
            return False
        if "position" in item:
            relation, target = item["position"]
            if not all(stands(a, relation, b) for a in found for b in matched[target]):
                return False
        matched.append(found)
    return sum(map(len, matched)) == len(scene)
