"""Prompts of the shapes world: six tasks in GenEval's form, split so that no request is in two splits.

A *request* is what a prompt asks for, whatever its words: "a star left of a circle" and "a photo of a
circle right of a star" are one request. The split is decided by a hash of the request, so a held-out
prompt was asked in no wording during pre-training or reinforcement learning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from itertools import combinations

import numpy as np

from unigrpo_cli.toy.world import (
    CELLS,
    COLORS,
    INVERSE,
    MAX_THINGS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    satisfies,
    stands,
)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OPENINGS = ("", "a photo of ", "a picture of ", "a drawing of ", "an image of ")
HELD_OUT_ONE_IN = 5
SPLIT_SALT = "shapes-0"  # gives every task at least two held-out requests, checked by a test


def draw_metadata(tag: str, rng: np.random.Generator) -> dict:
    """A random request of one task, with its prompt in random wording.

    GenEval's own forms, and beyond them what makes a small world large enough to hold prompts out:
    counting may name a colour, position and color_attr may name colours and counts ("three red circles
    above a blue square").
    """
    classes = [SHAPES[k] for k in rng.choice(len(SHAPES), 2, replace=False)]
    colors = [list(COLORS)[k] for k in rng.choice(len(COLORS), 2, replace=False)]
    counts = [1, 1]
    if rng.random() < 0.35:
        counts = [[2, 1], [1, 2], [2, 2], [3, 1], [1, 3]][rng.integers(5)]
    items: list[dict] = [{"class": c, "count": 1} for c in classes]
    metadata: dict = {"tag": tag, "include": items}
    match tag:
        case "single_object":
            del items[1]
        case "two_object":
            pass
        case "counting":
            del items[1]
            items[0]["count"] = int(rng.integers(2, MAX_THINGS + 1))
            if rng.random() < 0.5:
                items[0]["color"] = colors[0]
            metadata["exclude"] = [{"class": classes[0], "count": items[0]["count"] + 1}]
        case "colors":
            del items[1]
            items[0]["color"] = colors[0]
        case "position":
            for item, color, count in zip(items, colors, counts, strict=True):
                item["count"] = count
                if rng.random() < 0.5:
                    item["color"] = color
            items[1]["position"] = [list(RELATIONS)[rng.integers(4)], 0]
        case "color_attr":
            for item, color, count in zip(items, colors, counts, strict=True):
                item.update(count=count, color=color)
        case _:
            raise ValueError(f"unknown task {tag!r}; the tasks are {', '.join(TAGS)}")
    metadata["prompt"] = OPENINGS[rng.integers(len(OPENINGS))] + phrase(metadata)
    return metadata


def _noun(item: dict) -> str:
    color = item.get("color")
    words = ([color] if color else []) + [PLURALS[item["class"]] if item["count"] > 1 else item["class"]]
    if item["count"] > 1:
        return " ".join([NUMBERS[item["count"]], *words])
    return ("an " if words[0][0] in "aeio" else "a ") + " ".join(words)


def phrase(metadata: dict) -> str:
    """The request in words, without an opening: the subject first, then what it relates to."""
    nouns = [_noun(item) for item in metadata["include"]]
    if len(nouns) == 1:
        return nouns[0]
    position = metadata["include"][1].get("position")
    if position:
        return f"{nouns[1]} {position[0]} {nouns[0]}"
    return f"{nouns[0]} and {nouns[1]}"


def request_of(metadata: dict) -> str:
    """The request behind the words: equal for prompts that ask for the same, in any order or wording."""
    nouns = [f"{i['count']} {i.get('color', 'any')} {i['class']}" for i in metadata["include"]]
    if len(nouns) == 2 and "position" in metadata["include"][1]:
        relation = metadata["include"][1]["position"][0]
        subject, target = nouns[1], nouns[0]
        if relation in ("right of", "below"):
            subject, target, relation = target, subject, INVERSE[relation]
        return f"{subject} {relation} {target}"
    return " and ".join(sorted(nouns))


def held_out(metadata: dict) -> bool:
    digest = hashlib.sha256(f"{SPLIT_SALT}:{request_of(metadata)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _stream(split: str, seed: int, tags: tuple[str, ...]) -> Iterator[dict]:
    """Endless requests of one split, the tasks in turn."""
    rng = np.random.default_rng([seed, split == "train"])
    while True:
        for tag in tags:
            metadata = draw_metadata(tag, rng)
            while held_out(metadata) != (split == "held_out"):
                metadata = draw_metadata(tag, rng)
            yield metadata


def train_prompts(count: int = 2048, seed: int = 0) -> list[dict]:
    """Distinct training prompts in a fixed order, the tasks in turn while their requests last.

    A task with few requests (six shapes make six single objects) runs dry early and is then passed over.
    """
    return json.loads(_distinct("train", count, seed, per_tag=count))


def held_out_hard_prompts(per_tag: int = 60) -> list[dict]:
    """The suite of reflection: held-out prompts about several things, of which a first picture often misses one."""
    hard = ("two_object", "counting", "position", "color_attr")
    return [row for row in held_out_prompts(per_tag, seed=1) if row["tag"] in hard]


def held_out_prompts(per_tag: int = 40, seed: int = 0) -> list[dict]:
    """The shapes suite: `per_tag` prompts of each task, distinct as long as the task has that many.

    With the default 40 there are 240 rows, more than 200 of them distinct; a task with fewer distinct
    prompts repeats them (each row has its own noise), so that the six tasks weigh the same.
    """
    rows = json.loads(_distinct("held_out", per_tag * len(TAGS), seed, per_tag))
    suite = []
    for tag in TAGS:
        own = [row for row in rows if row["tag"] == tag]
        suite += [own[k % len(own)] for k in range(per_tag)]
    return suite


@cache
def _distinct(split: str, count: int, seed: int, per_tag: int) -> str:
    """Drawn once per process; as JSON, of which each caller makes rows of its own ten times as fast as of rows."""
    rows: dict[str, dict] = {}
    of_tag = dict.fromkeys(TAGS, 0)
    misses = dict.fromkeys(TAGS, 0)
    for metadata in _stream(split, seed, TAGS):
        tag = metadata["tag"]
        if misses[tag] < 200 and of_tag[tag] < per_tag:
            if metadata["prompt"] in rows:
                misses[tag] += 1
            else:
                rows[metadata["prompt"]] = metadata
                of_tag[tag] += 1
                misses[tag] = 0
        if len(rows) == count or all(misses[t] >= 200 or of_tag[t] >= per_tag for t in TAGS):
            return json.dumps(list(rows.values()))
    raise AssertionError("the stream is endless")


@cache
def _placements(relation: str, subjects: int, targets: int) -> list[tuple[tuple[str, ...], ...]]:
    """All ways to place `subjects` and `targets` so that every pair stands in `relation`."""

    def things(cells: tuple[str, ...]) -> list[Thing]:
        return [Thing("red", "circle", cell) for cell in cells]

    return [
        (a, b)
        for a in combinations(CELLS, subjects)
        for b in combinations(CELLS, targets)
        if not set(a) & set(b) and all(stands(s, relation, t) for s in things(a) for t in things(b))
    ]


def draw_scene(metadata: dict, rng: np.random.Generator) -> Scene:
    """A random true plan for a request: colours and cells that were not asked for are free."""
    items = metadata["include"]
    counts = [item["count"] for item in items]
    if len(items) == 2 and "position" in items[1]:
        options = _placements(items[1]["position"][0], counts[1], counts[0])
        subject, target = options[rng.integers(len(options))]
        cells = [target, subject]
    else:
        free = [CELLS[k] for k in rng.permutation(len(CELLS))]
        cells = [tuple(sorted(free[: counts[0]], key=CELLS.index))]
        if len(items) == 2:
            cells.append(tuple(sorted(free[counts[0] : sum(counts)], key=CELLS.index)))
    scene = tuple(
        Thing(item.get("color") or list(COLORS)[rng.integers(len(COLORS))], item["class"], cell)
        for item, own in zip(items, cells, strict=True)
        for cell in own
    )
    assert satisfies(scene, metadata), (scene, metadata)
    return scene


def corrupt(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene with one mistake: a thing recoloured, reshaped, moved, dropped or added."""
    things = list(scene)
    at = int(rng.integers(len(things)))
    old = things[at]
    free = [c for c in CELLS if c not in {t.cell for t in things}]
    kinds = ["recolor", "reshape", "move"]
    kinds += ["drop"] if len(things) > 1 else []
    kinds += ["add"] if len(things) < MAX_THINGS else []

    def other(options: tuple[str, ...], than: str) -> str:
        rest = [o for o in options if o != than]
        return rest[rng.integers(len(rest))]

    match kinds[rng.integers(len(kinds))]:
        case "recolor":
            things[at] = Thing(other(tuple(COLORS), old.color), old.shape, old.cell)
        case "reshape":
            things[at] = Thing(old.color, other(SHAPES, old.shape), old.cell)
        case "move":
            things[at] = Thing(old.color, old.shape, free[rng.integers(len(free))])
        case "drop":
            del things[at]
        case "add":
            color, shape = other(tuple(COLORS), ""), other(SHAPES, "")
            things.append(Thing(color, shape, free[rng.integers(len(free))]))
    return tuple(things)


def corrupt_plan(scene: Scene, metadata: dict, rng: np.random.Generator) -> Scene:
    """A mistaken plan: the first of some random corruptions that no longer answers the prompt."""
    for _ in range(50):
        wrong = corrupt(scene, rng)
        if not satisfies(wrong, metadata):
            return wrong
    raise AssertionError(f"no corruption of {scene} breaks {json.dumps(metadata)}")


def parse_prompt(prompt: str) -> dict | None:
    """The metadata of a prompt written in this world's grammar, or None when it is not one.

    For prompts that people type: `unigrpo generate "three red circles above a blue square"` can then be
    judged like any other.
    """
    words = prompt.lower().strip().rstrip(".").split()
    for opening in OPENINGS:
        if opening and words[:3] == opening.split():
            words = words[3:]
    text = " ".join(words)
    for link in (*RELATIONS, "and"):
        left, found, right = text.partition(f" {link} ")
        if found:
            items = [_parse_noun(left), _parse_noun(right)]
            if None in items:
                return None
            first, second = items
            assert first and second
            if link == "and":
                tag = "color_attr" if "color" in first and "color" in second else "two_object"
                return {"tag": tag, "include": [first, second], "prompt": prompt}
            second_first = [second, first | {"position": [link, 0]}]
            return {"tag": "position", "include": second_first, "prompt": prompt}
    item = _parse_noun(text)
    if item is None:
        return None
    if item["count"] > 1:
        exclude = [{"class": item["class"], "count": item["count"] + 1}]
        return {"tag": "counting", "include": [item], "exclude": exclude, "prompt": prompt}
    return {"tag": "colors" if "color" in item else "single_object", "include": [item], "prompt": prompt}


def _parse_noun(text: str) -> dict | None:
    number_of = {word: n for n, word in NUMBERS.items()} | {"a": 1, "an": 1}
    shape_of = {plural: shape for shape, plural in PLURALS.items()} | {s: s for s in SHAPES}
    match text.split():
        case [number, color, noun] if number in number_of and color in COLORS and noun in shape_of:
            return {"class": shape_of[noun], "count": number_of[number], "color": color}
        case [number, noun] if number in number_of and noun in shape_of:
            return {"class": shape_of[noun], "count": number_of[number]}
    return None
