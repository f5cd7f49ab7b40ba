"""Reflections and edit plans: what a picture shows, thing by thing, and what becomes of each.

    <think> white square wrong yellow square b1 , red circle keep c2 , missing green star b3 </think>
    <think> red circle keep c2 , blue heart extra a3 </think>
    <think> red circle keep c2 , correct </think>

First the things that are seen, in the order of the cells, each with its verdict; then the things that are missing. When
all are kept, the last word is `correct`. A cell comes after all that concerns it, as in a plan. The edit plan of an
instruction has the same form: what is seen in the source, and what becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from unigrpo_cli.toy.world import CELLS, COLORS, SHAPES, THINK_CLOSE, THINK_OPEN, Scene, Thing, satisfies

KEEP, WRONG, EXTRA, MISSING, CORRECT = "keep", "wrong", "extra", "missing", "correct"


@dataclass(frozen=True)
class Reflection:
    """What a text says: the scene that is seen, the scene that it should be, and whether it ends with `correct`.

    Scenes are in the order of the cells. A text may contradict itself: `correct` after a change, none without it.
    """

    seen: Scene
    target: Scene
    correct: bool


def by_cell(scene: Scene) -> Scene:
    """The same things in the order of the cells: scenes that show the same are then equal."""
    return tuple(sorted(scene, key=lambda thing: CELLS.index(thing.cell)))


def reflection_text(seen: Scene, target: Scene) -> str:
    """The text that says what `seen` shows and that it should be `target`."""
    wanted = {thing.cell: thing for thing in target}
    parts = []
    for thing in by_cell(seen):
        to = wanted.get(thing.cell)
        said = EXTRA if to is None else KEEP if to == thing else f"{WRONG} {to.color} {to.shape}"
        parts.append(f"{thing.color} {thing.shape} {said} {thing.cell}")
    taken = {thing.cell for thing in seen}
    parts += [f"{MISSING} {t.color} {t.shape} {t.cell}" for t in by_cell(target) if t.cell not in taken]
    if by_cell(seen) == by_cell(target):
        parts.append(CORRECT)
    return f"{THINK_OPEN} {' , '.join(parts)} {THINK_CLOSE}"


def parse_reflection(text: str) -> Reflection | None:
    words = text.split()
    if len(words) < 3 or words[0] != THINK_OPEN or words[-1] != THINK_CLOSE:
        return None
    seen: list[Thing] = []
    target: list[Thing] = []
    missing: list[Thing] = []
    verdict = False
    for part in " ".join(words[1:-1]).split(" , "):
        if verdict:
            return None  # `correct` is the last word
        match part.split():
            case [color, shape, *said, cell] if not missing and _is_thing(color, shape, cell):
                thing = Thing(color, shape, cell)
                seen.append(thing)
                match said:
                    case ["keep"]:
                        target.append(thing)
                    case ["wrong", to_color, to_shape] if _is_thing(to_color, to_shape, cell):
                        target.append(Thing(to_color, to_shape, cell))
                    case ["extra"]:
                        pass
                    case _:
                        return None
            case ["missing", color, shape, cell] if _is_thing(color, shape, cell):
                missing.append(Thing(color, shape, cell))
            case ["correct"]:
                verdict = True
            case _:
                return None
    if len({thing.cell for thing in seen + missing}) < len(seen + missing):
        return None
    return Reflection(by_cell(tuple(seen)), by_cell(tuple(target + missing)), verdict)


def _is_thing(color: str, shape: str, cell: str) -> bool:
    return color in COLORS and shape in SHAPES and cell in CELLS


def repair(seen: Scene, truth: Scene, metadata: Mapping[str, Any]) -> Scene:
    """The scene nearest to `seen` that answers the prompt: the fewest cells of `truth`, which answers it, put in place.

    A picture that answers the prompt in a way of its own stays as it is.
    """
    now, goal = ({thing.cell: thing for thing in scene} for scene in (seen, truth))
    changed = [cell for cell in CELLS if now.get(cell) != goal.get(cell)]
    for count in range(len(changed) + 1):
        for cells in combinations(changed, count):
            mixed = {cell: goal.get(cell) if cell in cells else now.get(cell) for cell in CELLS}
            scene = tuple(thing for thing in mixed.values() if thing is not None)
            if satisfies(scene, metadata):
                return scene
    raise AssertionError(f"{truth} does not answer {dict(metadata)}")
