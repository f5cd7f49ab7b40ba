"""Restores of the shapes world: a degraded picture, its diagnosis in words, and the picture as it was.

    <think> noise , red circle keep c2 </think>
    <think> blue star lost a1 , red circle keep c2 </think>

A critique names the fault of the whole picture, then every thing in the order of the cells. A lost thing has faded
until a detector no longer finds it; its trace still shows what it was. The split is by a hash of the scene. Metadata is
plain data:

    {"tag": "lost", "prompt": "", "scene": [["blue", "star", "a1"], ...], "lost": ["a1"], "seed": 7}
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

from unigrpo_cli.toy.edits import draw_things, rows_of, scene_of
from unigrpo_cli.toy.reflect import KEEP, by_cell
from unigrpo_cli.toy.render import CELL, Canvas
from unigrpo_cli.toy.world import CELLS, COLORS, MAX_THINGS, SHAPES, THINK_CLOSE, THINK_OPEN, Scene, Thing

FAULTS = ("noise", "cast", "blur", "lost")
OVERALL = ("noise", "cast", "blur")
LOST = "lost"
HELD_OUT_ONE_IN = 5
SPLIT_SALT = "shapes-restore-0"
CASTS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1))


@dataclass(frozen=True)
class Critique:
    """What a text says of a degraded picture: its fault as a whole ("" for none), all things, and the lost ones."""

    fault: str
    scene: Scene
    lost: tuple[str, ...]


def critique_text(critique: Critique) -> str:
    parts = [critique.fault] if critique.fault else []
    for thing in by_cell(critique.scene):
        verdict = LOST if thing.cell in critique.lost else KEEP
        parts.append(f"{thing.color} {thing.shape} {verdict} {thing.cell}")
    return f"{THINK_OPEN} {' , '.join(parts)} {THINK_CLOSE}"


def parse_critique(text: str) -> Critique | None:
    words = text.split()
    if len(words) < 3 or words[0] != THINK_OPEN or words[-1] != THINK_CLOSE:
        return None
    parts = " ".join(words[1:-1]).split(" , ")
    fault = parts.pop(0) if parts[0] in OVERALL else ""
    things, lost = [], []
    for part in parts:
        match part.split():
            case [color, shape, "keep" | "lost" as verdict, cell] if (
                color in COLORS and shape in SHAPES and cell in CELLS
            ):
                things.append(Thing(color, shape, cell))
                lost += [cell] if verdict == LOST else []
            case _:
                return None
    if len({thing.cell for thing in things}) < len(things):
        return None
    return Critique(fault, by_cell(tuple(things)), tuple(sorted(lost, key=CELLS.index)))


def true_critique(metadata: Mapping[str, Any]) -> Critique:
    tag = metadata["tag"]
    return Critique(tag if tag in OVERALL else "", by_cell(scene_of(metadata["scene"])), tuple(metadata["lost"]))


def degrade(
    pixels: NDArray[np.uint8], fault: str, rng: np.random.Generator, cells: tuple[str, ...] = ()
) -> NDArray[np.uint8]:
    """A picture with one fault; `cells` are those in which things fade when the fault is `lost`."""
    x = pixels.astype(np.float32) / 255
    match fault:
        case "noise":
            x = x + rng.normal(0, rng.uniform(0.12, 0.2), x.shape)
        case "cast":
            x = x + rng.uniform(0.18, 0.3) * (np.array(CASTS[rng.integers(len(CASTS))], np.float32) - 0.5)
        case "blur":
            for _ in range(int(rng.integers(2, 5))):
                padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
                shifts = [padded[i : i + len(x), j : j + len(x)] for i in range(3) for j in range(3)]
                x = np.mean(shifts, axis=0)
        case "lost":
            border = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
            for cell in cells:
                column, row = "abc".index(cell[0]), "123".index(cell[1])
                tile = x[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)]
                behind = np.median(border, axis=0)
                trace = rng.uniform(20, 26) / 255  # largest contrast that is left; a detector needs 30
                tile[:] = behind + trace / np.abs(tile - behind).max() * (tile - behind)
        case _:
            raise ValueError(f"unknown fault {fault!r}; the faults are {', '.join(FAULTS)}")
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def held_out_scene(scene: Scene) -> bool:
    digest = hashlib.sha256(f"{SPLIT_SALT}:{rows_of(by_cell(scene))}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def draw_restore(tag: str, rng: np.random.Generator, held_out: bool = False) -> dict[str, Any]:
    """Metadata of a random restore with one fault, of the training or the held-out split."""
    while True:
        scene = draw_things(int(rng.integers(1 + (tag == LOST), MAX_THINGS + 1)), rng)
        if held_out_scene(scene) == held_out:
            break
    lost = [scene[rng.integers(len(scene))].cell] if tag == LOST else []
    return {"tag": tag, "prompt": "", "scene": rows_of(scene), "lost": lost, "seed": int(rng.integers(2**31))}


def original_picture(metadata: Mapping[str, Any]) -> NDArray[np.uint8]:
    return Canvas.draw(np.random.default_rng(metadata["seed"])).paint(scene_of(metadata["scene"]))


def degraded_picture(metadata: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The picture with its fault, the same on every call."""
    rng = np.random.default_rng([metadata["seed"], 1])
    return degrade(original_picture(metadata), metadata["tag"], rng, tuple(metadata["lost"]))


def _stream(held_out: bool, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng([seed, held_out])
    while True:
        for tag in FAULTS:
            yield draw_restore(tag, rng, held_out)


@cache
def _rows(held_out: bool, count: int, seed: int) -> tuple[dict[str, Any], ...]:
    return tuple(row | {"image": degraded_picture(row)} for row in islice(_stream(held_out, seed), count))


def train_restores(count: int = 1024, seed: int = 0) -> list[dict[str, Any]]:
    """Degraded pictures to train on, the faults in turn, each as `image`: uint8 pixels."""
    return [dict(row) for row in _rows(False, count, seed)]


def held_out_restores(per_tag: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """The suite: `per_tag` degraded pictures of each fault whose scenes are in no training split."""
    return [dict(row) for row in _rows(True, per_tag * len(FAULTS), seed)]
