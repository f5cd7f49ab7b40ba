"""GenEval's 553 prompts, regenerated from their seed.

The official `evaluation_metadata.jsonl` is what numpy's generator with seed 43 draws in a certain order, with
duplicates dropped. A test compares the rows with the official file byte for byte, so it need not be shipped.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

SEED, DRAWS = 43, 100
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock",
    "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
"""COCO's 80 classes in COCO's order; three carry GenEval's longer names, so match detectors by index."""
PERSON = CLASSES.index("person")


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def _not_person(draw: int) -> str:
    """Coloured prompts never name a person: 79 classes, shifted past it."""
    return CLASSES[(draw + 1 + PERSON) % len(CLASSES)]


def geneval_rows() -> list[dict[str, Any]]:
    """The benchmark's rows in the official order: `tag`, `include`, sometimes `exclude`, `prompt`."""
    rng = np.random.default_rng(SEED)
    rows: list[dict[str, Any]] = []
    for k in rng.choice(len(CLASSES), size=len(CLASSES), replace=False):
        name = CLASSES[k]
        rows.append(_entry("single_object", [_item(name)], _article(name)))
    for _ in range(DRAWS):
        a, b = (CLASSES[k] for k in rng.choice(len(CLASSES), size=2, replace=False))
        rows.append(_entry("two_object", [_item(a), _item(b)], f"{_article(a)} and {_article(b)}"))
    for _ in range(DRAWS):
        name = CLASSES[rng.choice(len(CLASSES))]
        count = int(rng.integers(2, 5))
        row = _entry("counting", [_item(name, count)], f"{NUMBERS[count]} {_plural(name)}")
        exclude = [_item(name, count + 1)]
        rows.append({"tag": row["tag"], "include": row["include"], "exclude": exclude, "prompt": row["prompt"]})
    for _ in range(DRAWS):
        name, color = _not_person(int(rng.choice(len(CLASSES) - 1))), COLORS[rng.choice(len(COLORS))]
        rows.append(_entry("colors", [_item(name) | {"color": color}], _article(f"{color} {name}")))
    for _ in range(DRAWS):
        subject, target = (CLASSES[k] for k in rng.choice(len(CLASSES), size=2, replace=False))
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        items = [_item(target), _item(subject) | {"position": [relation, 0]}]
        rows.append(_entry("position", items, f"{_article(subject)} {relation} {_article(target)}"))
    for _ in range(DRAWS):
        a, b = (_not_person(int(k)) for k in rng.choice(len(CLASSES) - 1, size=2, replace=False))
        c, d = (COLORS[k] for k in rng.choice(len(COLORS), size=2, replace=False))
        items = [_item(a) | {"color": c}, _item(b) | {"color": d}]
        rows.append(_entry("color_attr", items, f"{_article(f'{c} {a}')} and {_article(f'{d} {b}')}"))
    return list({json.dumps(row): row for row in rows}.values())


def _item(name: str, count: int = 1) -> dict[str, Any]:
    return {"class": name, "count": count}


def _entry(tag: str, include: list[dict[str, Any]], words: str) -> dict[str, Any]:
    return {"tag": tag, "include": include, "prompt": f"a photo of {words}"}
