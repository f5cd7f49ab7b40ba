"""Edits of the shapes world: a source picture, an instruction, and which pictures carry it out.

An instruction names its thing without doubt: no two things of a source share colour and shape. The split is by a hash
of the request: the kind of the edit, the thing, what it becomes, and where. Metadata is plain data:

    {"tag": "recolor", "prompt": "make the red circle blue", "source": [["red", "circle", "a1"], ...],
     "target": [["blue", "circle", "a1"], ...], "cells": ["a1"], "include": [...], "seed": 7}

`target` is one scene that carries the instruction out; the new thing may stand in any of `cells`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli.toy.reflect import by_cell
from unigrpo_cli.toy.render import Canvas
from unigrpo_cli.toy.world import CELLS, COLORS, MAX_THINGS, RELATIONS, SHAPES, Scene, Thing, stands

EDITS = ("add", "remove", "recolor", "reshape", "move")
HELD_OUT_ONE_IN = 5
SPLIT_SALT = "shapes-edit-0"


@dataclass(frozen=True)
class Change:
    """A request: `old` becomes `new`, in one of `cells`; one of them is None where a thing is added or removed."""

    old: Thing | None
    new: Thing | None
    cells: tuple[str, ...]
    words: str
    request: str


def scene_of(rows: Any) -> Scene:
    return tuple(Thing(*row) for row in rows)


def rows_of(scene: Scene) -> list[list[str]]:
    return [[thing.color, thing.shape, thing.cell] for thing in scene]


def draw_things(count: int, rng: np.random.Generator) -> Scene:
    """A random scene in which no two things share colour and shape."""
    kinds = rng.choice(len(COLORS) * len(SHAPES), count, replace=False)
    cells = rng.choice(len(CELLS), count, replace=False)
    colors = list(COLORS)
    return by_cell(
        tuple(
            Thing(colors[k // 6], SHAPES[k % 6], CELLS[c]) for k, c in zip(kinds.tolist(), cells.tolist(), strict=True)
        )
    )


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _other(options: tuple[str, ...], than: str, rng: np.random.Generator) -> str:
    rest = [option for option in options if option != than]
    return rest[rng.integers(len(rest))]


def _draw_change(tag: str, source: Scene, rng: np.random.Generator) -> Change | None:
    """A random edit of `source`, or None where this draw has none."""
    old = source[rng.integers(len(source))]
    said, names = _name(old), {_name(thing) for thing in source}
    if tag == "remove":
        return Change(old, None, (), f"remove the {said}", f"remove {said}") if len(source) > 1 else None
    if tag in ("recolor", "reshape"):
        if tag == "recolor":
            new = Thing(_other(tuple(COLORS), old.color, rng), old.shape, old.cell)
            words, request = f"make the {said} {new.color}", f"recolor {said} {new.color}"
        else:
            new = Thing(old.color, _other(SHAPES, old.shape, rng), old.cell)
            words, request = f"turn the {said} into {_article(new.shape)}", f"reshape {said} {new.shape}"
        return None if _name(new) in names else Change(old, new, (old.cell,), words, request)
    free = [cell for cell in CELLS if cell not in {thing.cell for thing in source}]
    if tag == "add":
        if len(source) == MAX_THINGS:
            return None
        color, shape = list(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
        if f"{color} {shape}" in names:
            return None
        words, request, moved = f"add {_article(f'{color} {shape}')}", f"add {color} {shape}", None
        anchor = old if rng.random() < 0.7 else None
    else:
        rest = [thing for thing in source if thing != old]
        if not rest:
            return None
        color, shape, moved = old.color, old.shape, old
        words, request = f"move the {said}", f"move {said}"
        anchor = rest[rng.integers(len(rest))]
    if anchor is not None:
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        words, request = f"{words} {relation} the {_name(anchor)}", f"{request} {relation} {_name(anchor)}"
        if moved is not None and stands(moved, relation, anchor):
            return None
        free = [cell for cell in free if stands(Thing(color, shape, cell), relation, anchor)]
    if not free:
        return None
    return Change(moved, Thing(color, shape, free[rng.integers(len(free))]), tuple(free), words, request)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def held_out_request(request: str) -> bool:
    digest = hashlib.sha256(f"{SPLIT_SALT}:{request}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def draw_edit(tag: str, rng: np.random.Generator, held_out: bool = False) -> dict[str, Any]:
    """Metadata of a random edit of one kind, of the training or the held-out split."""
    if tag not in EDITS:
        raise ValueError(f"unknown edit {tag!r}; the edits are {', '.join(EDITS)}")
    while True:
        source = draw_things(int(rng.integers(1, MAX_THINGS + 1)), rng)
        change = _draw_change(tag, source, rng)
        if change is None or held_out_request(change.request) != held_out:
            continue
        target = by_cell(tuple(t for t in source if t != change.old) + ((change.new,) if change.new else ()))
        return {
            "tag": tag,
            "prompt": change.words,
            "source": rows_of(source),
            "target": rows_of(target),
            "cells": list(change.cells),
            "include": [{"class": t.shape, "color": t.color, "count": 1} for t in target],
            "seed": int(rng.integers(2**31)),
        }


def edit_target(metadata: Mapping[str, Any]) -> Scene:
    """One scene that carries the instruction out."""
    return scene_of(metadata["target"])


def edit_targets(metadata: Mapping[str, Any]) -> list[Scene]:
    """Every scene that carries the instruction out and leaves all else as it was."""
    source, target = scene_of(metadata["source"]), edit_target(metadata)
    kept = tuple(thing for thing in target if thing in source)
    new = [thing for thing in target if thing not in source]
    if not new:
        return [target]
    return [by_cell((*kept, Thing(new[0].color, new[0].shape, cell))) for cell in metadata["cells"]]


@dataclass(frozen=True)
class EditOutcome:
    """Whether the instruction is carried out, and the share of the other things that stayed, unasked ones counted."""

    done: bool
    kept: float

    @property
    def strict(self) -> bool:
        """The instruction is done and nothing else has changed."""
        return self.done and self.kept == 1


def edit_outcome(seen: Scene, metadata: Mapping[str, Any]) -> EditOutcome:
    """How a picture that shows `seen` carries an edit out.

    `kept` is the number of other things of the source that are seen unchanged, over the number of all of them and of
    all things that nobody asked for.
    """
    source, target = set(scene_of(metadata["source"])), set(edit_target(metadata))
    others, old, new = source & target, source - target, target - source
    shown = set(seen)
    wanted = {Thing(t.color, t.shape, cell) for t in new for cell in metadata["cells"]}
    placed = shown & wanted
    left = {thing for thing in shown for gone in old if thing.cell == gone.cell} - wanted
    done = not left and (len(placed) == 1 if new else True)
    surplus = len(shown - others - wanted - left) + max(0, len(placed) - 1)
    whole = len(others) + surplus
    return EditOutcome(done, len(others & shown) / whole if whole else 1.0)


def source_picture(metadata: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The source as pixels, the same on every call."""
    return Canvas.draw(np.random.default_rng(metadata["seed"])).paint(scene_of(metadata["source"]))


def target_picture(metadata: Mapping[str, Any]) -> NDArray[np.uint8]:
    """`target` on the canvas of the source: unchanged cells are equal to the pixel."""
    return Canvas.draw(np.random.default_rng(metadata["seed"])).paint(edit_target(metadata))


def _stream(held_out: bool, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng([seed, held_out])
    while True:
        for tag in EDITS:
            yield draw_edit(tag, rng, held_out)


@cache
def _rows(held_out: bool, count: int, seed: int) -> tuple[dict[str, Any], ...]:
    return tuple(row | {"image": source_picture(row)} for row in islice(_stream(held_out, seed), count))


def train_edits(count: int = 1024, seed: int = 0) -> list[dict[str, Any]]:
    """Edits to train on, the kinds in turn, each with its source as `image`: uint8 pixels."""
    return [dict(row) for row in _rows(False, count, seed)]


def held_out_edits(per_tag: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """The suite: `per_tag` edits of each kind whose requests are in no training split."""
    return [dict(row) for row in _rows(True, per_tag * len(EDITS), seed)]
