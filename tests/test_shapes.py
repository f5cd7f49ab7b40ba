"""The shapes world: its split, its grammar, and a detector that sees what the renderer paints."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from unigrpo_cli.toy.prompts import (
    TAGS,
    corrupt,
    corrupt_plan,
    draw_metadata,
    draw_scene,
    held_out_prompts,
    parse_prompt,
    request_of,
    train_prompts,
)
from unigrpo_cli.toy.render import SIZE, render
from unigrpo_cli.toy.world import CELLS, COLORS, SHAPES, Thing, parse_plan, plan_text, satisfies
from unigrpo_plugins.colors import name_color
from unigrpo_plugins.detector_shapes import ShapesDetector, background_deviation


def test_no_request_is_in_both_splits() -> None:
    train, held = train_prompts(), held_out_prompts()
    assert len(train) == 2048
    assert not {request_of(p) for p in train} & {request_of(p) for p in held}


def test_the_suite_is_balanced_and_large_enough() -> None:
    suite = held_out_prompts()
    assert Counter(p["tag"] for p in suite) == dict.fromkeys(TAGS, 40)
    assert len({p["prompt"] for p in suite}) >= 200
    for tag in TAGS:
        assert len({request_of(p) for p in suite if p["tag"] == tag}) >= 2


def test_prompts_are_the_same_on_every_machine() -> None:
    assert held_out_prompts() == held_out_prompts()
    assert train_prompts(16) == train_prompts(2048)[:16]


def test_a_request_is_its_meaning() -> None:
    same = [
        ("a star left of a circle", "a photo of a circle right of a star"),
        ("a red heart and two blue stars", "a drawing of two blue stars and a red heart"),
        ("two white crosses below a heart", "a heart above two white crosses"),
    ]
    for a, b in same:
        assert request_of(parse_prompt(a)) == request_of(parse_prompt(b))
    different = ["a star left of a circle", "a circle left of a star", "a star above a circle", "two stars"]
    assert len({request_of(parse_prompt(p)) for p in different}) == 4


def test_every_prompt_is_in_the_grammar() -> None:
    for row in [*held_out_prompts(), *train_prompts(500)]:
        parsed = parse_prompt(row["prompt"])
        assert parsed["include"] == row["include"]
        assert parsed.get("exclude") == row.get("exclude")


@pytest.mark.parametrize("text", ["a cat", "red circle", "three", "", "a red circle and", "two circle left of"])
def test_what_is_not_in_the_grammar(text: str) -> None:
    assert parse_prompt(text) is None


def test_plans_and_scenes_are_inverse() -> None:
    rng = np.random.default_rng(0)
    for row in train_prompts(300):
        scene = draw_scene(row, rng)
        assert satisfies(scene, row)
        assert parse_plan(plan_text(scene)) == scene
        assert not satisfies(corrupt_plan(scene, row, rng), row)
        assert corrupt(scene, rng) != scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle a1",
        "<think> red circle a1",
        "<think> red circle z9 </think>",
        "<think> red circle a1 , </think>",
        "<think> red circle a1 , blue star a1 </think>",
        "<think> circle red a1 </think>",
    ],
)
def test_what_is_no_plan(text: str) -> None:
    assert parse_plan(text) is None


@pytest.mark.parametrize(
    ("subject", "target", "relation", "holds"),
    [
        ("a1", "c1", "left of", True),
        ("b1", "a3", "above", True),
        ("a1", "b2", "above", False),
        ("c2", "a2", "right of", True),
        ("b2", "b2", "below", False),
    ],
)
def test_a_plan_never_leans_on_a_diagonal(subject: str, target: str, relation: str, holds: bool) -> None:
    scene = (Thing("red", "star", target), Thing("red", "heart", subject))
    clauses = [{"class": "star", "count": 1}, {"class": "heart", "count": 1, "position": [relation, 0]}]
    assert satisfies(scene, {"include": clauses}) == holds


def test_the_detector_sees_what_was_painted() -> None:
    """Every thing in its colour, shape and cell, on 120 pictures; with slight noise too."""
    rng = np.random.default_rng(1)
    rows = [draw_metadata(TAGS[k % 6], rng) for k in range(120)]
    scenes = [draw_scene(row, rng) for row in rows]
    for noise in (0.0, 8.0):
        images = [
            np.clip(render(s, rng) + rng.normal(0, noise, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8) for s in scenes
        ]
        for scene, image, found in zip(scenes, images, ShapesDetector().detect(images), strict=True):
            seen = Counter()
            for d in found:
                cell = CELLS[3 * int((d.box[1] + d.box[3]) / 32) + int((d.box[0] + d.box[2]) / 32)]
                seen[name_color(image, d.mask, d.box), d.label, cell] += 1
                assert d.score > 0.9
            assert seen == Counter((t.color, t.shape, t.cell) for t in scene)


def test_the_detector_sees_nothing_in_noise_and_flat_pictures() -> None:
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8) for _ in range(20)]
    images += [np.full((SIZE, SIZE, 3), level, np.uint8) for level in (0, 128, 255)]
    detector = ShapesDetector()
    assert all(d.score <= detector.threshold for found in detector.detect(images) for d in found)


def test_half_a_shape_is_not_seen_as_a_whole_one() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for k in range(60):
        image = render((Thing("red", SHAPES[k % 6], "b2"),), rng)
        image[:, 24:] = image[0, 0]
        found = [d for d in ShapesDetector().detect([image])[0] if d.score > 0.3]
        missed += not any(d.label == SHAPES[k % 6] for d in found)
    assert missed > 50


def test_pictures_of_another_size() -> None:
    image = render((Thing("blue", "star", "a1"), Thing("red", "heart", "c3")), np.random.default_rng(0), size=96)
    assert sorted(d.label for d in ShapesDetector().detect([image])[0]) == ["heart", "star"]


def test_background_deviation_measures_the_background_alone() -> None:
    rng = np.random.default_rng(4)
    scene = tuple(Thing(c, s, cell) for c, s, cell in zip(COLORS, SHAPES, CELLS, strict=False))[:4]
    clean = render(scene, rng).astype(np.float32)
    for sigma in (0.0, 0.02, 0.05):
        image = np.clip(clean + rng.normal(0, 255 * sigma, clean.shape), 0, 255).astype(np.uint8)
        expected = np.hypot(0.006, sigma)
        assert background_deviation([image])[0] == pytest.approx(expected, rel=0.15, abs=0.002)
