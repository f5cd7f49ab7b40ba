"""The shapes world with pictures that are given: reflections, edits, restores, and the rows that pre-train on them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.toy_rows import Mistakes, Mix, Row, Rows
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.suites import SuiteRegistry, training_prompts
from unigrpo_cli.toy import restores
from unigrpo_cli.toy.edits import (
    EDITS,
    draw_edit,
    edit_outcome,
    edit_target,
    edit_targets,
    held_out_edits,
    scene_of,
    target_picture,
    train_edits,
)
from unigrpo_cli.toy.prompts import TAGS, corrupt, draw_metadata, draw_scene
from unigrpo_cli.toy.reflect import by_cell, parse_reflection, reflection_text, repair
from unigrpo_cli.toy.render import CELL
from unigrpo_cli.toy.world import CELLS, Scene, Thing, parse_plan, satisfies
from unigrpo_plugins.colors import name_color
from unigrpo_plugins.detector_shapes import ShapesDetector

WEIGHTS = Path(__file__).parent.parent / "unigrpo_cli/toy/weights/model"


@cache
def shipped() -> MoTPolicy:
    return load_model(WEIGHTS)


def seen_in(image: np.ndarray) -> Scene:
    """The scene that the detector finds."""
    things = []
    for d in ShapesDetector().detect([image])[0]:
        if d.score > 0.3:
            cell = CELLS[3 * int((d.box[1] + d.box[3]) / 32) + int((d.box[0] + d.box[2]) / 32)]
            things.append(Thing(name_color(image, d.mask, d.box), d.label, cell))
    return by_cell(tuple(things))


def scenes(count: int) -> list[tuple[dict, Scene, Scene]]:
    """Requests, true scenes, and what pictures of them may show."""
    rng = np.random.default_rng(5)
    found = []
    for k in range(count):
        metadata = draw_metadata(TAGS[k % 6], rng)
        truth = draw_scene(metadata, rng)
        seen = corrupt(truth, rng) if k % 3 else truth
        found.append((metadata, truth, seen[: k % 5] if k % 7 == 0 else seen))
    return found


def test_reflections_and_pairs_of_scenes_are_inverse() -> None:
    for _, truth, seen in scenes(300):
        found = parse_reflection(reflection_text(seen, truth))
        assert found is not None
        assert (found.seen, found.target) == (by_cell(seen), by_cell(truth))
        assert found.correct == (set(seen) == set(truth))
        assert (" correct " in reflection_text(seen, truth)) == found.correct


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think> </think>",
        "<think> correct",
        "<think> red circle c2 </think>",
        "<think> red circle wrong red c2 </think>",
        "<think> correct , red circle keep c2 </think>",
        "<think> red circle keep c2 , missing red star c2 </think>",
        "<think> missing red star c2 , red circle keep c1 </think>",
        "<think> red circle keep c2 , blue star extra c2 </think>",
        "<think> missing red star </think>",
    ],
)
def test_what_is_no_reflection(text: str) -> None:
    assert parse_reflection(text) is None


@pytest.mark.parametrize(
    ("text", "target", "correct"),
    [
        ("red circle extra c2 , correct", (), True),
        ("red circle wrong red circle c2", (Thing("red", "circle", "c2"),), False),
        ("red circle keep c2", (Thing("red", "circle", "c2"),), False),
    ],
)
def test_a_contradiction_is_read_as_it_stands(text: str, target: Scene, correct: bool) -> None:
    found = parse_reflection(f"<think> {text} </think>")
    assert found is not None
    assert (found.seen, found.target, found.correct) == ((Thing("red", "circle", "c2"),), target, correct)


def test_the_order_of_a_reflection_is_that_of_the_cells() -> None:
    seen = (Thing("red", "circle", "c2"), Thing("white", "square", "b1"), Thing("blue", "heart", "a3"))
    target = (Thing("green", "star", "b3"), Thing("yellow", "square", "b1"), Thing("red", "circle", "c2"))
    assert reflection_text(seen, target) == (
        "<think> white square wrong yellow square b1 , red circle keep c2 , blue heart extra a3 , "
        "missing green star b3 </think>"
    )


def test_a_repair_answers_the_prompt_with_the_fewest_changes() -> None:
    for metadata, truth, seen in scenes(200):
        better = repair(seen, truth, metadata)
        assert satisfies(better, metadata)
        assert len({t.cell for t in set(better) ^ set(seen)}) <= len({t.cell for t in set(truth) ^ set(seen)})
        if satisfies(seen, metadata):
            assert set(better) == set(seen)


def test_true_edits_are_accepted_and_corrupted_ones_are_not() -> None:
    rng = np.random.default_rng(6)
    for row in held_out_edits():
        source, targets = scene_of(row["source"]), edit_targets(row)
        assert edit_target(row) in targets
        assert all(edit_outcome(target, row).strict for target in targets)
        assert not edit_outcome(source, row).done
        assert edit_outcome(source, row).kept == 1 or row["tag"] in ("add", "move")
        for _ in range(5):
            other = by_cell(corrupt(edit_target(row), rng))
            assert edit_outcome(other, row).strict == (other in targets)


A, B, C = Thing("red", "circle", "a1"), Thing("blue", "star", "b2"), Thing("green", "heart", "c3")


@pytest.mark.parametrize(
    ("seen", "done", "kept"),
    [
        ((A, Thing("pink", "star", "b2"), C), True, 1),
        ((A, B, C), False, 1),
        ((A, Thing("pink", "star", "b2")), True, 1 / 2),
        ((A, Thing("pink", "star", "b2"), C, Thing("red", "cross", "a3")), True, 2 / 3),
        ((A, C), False, 1),
        ((Thing("pink", "star", "b2"),), True, 0),
        ((A, Thing("pink", "heart", "b2"), C), False, 1),
        ((), False, 0),
    ],
)
def test_the_outcome_of_an_edit(seen: Scene, done: bool, kept: float) -> None:
    row = {"source": [["red", "circle", "a1"], ["blue", "star", "b2"], ["green", "heart", "c3"]], "cells": ["b2"]}
    row["target"] = [["red", "circle", "a1"], ["pink", "star", "b2"], ["green", "heart", "c3"]]
    outcome = edit_outcome(seen, row)
    assert (outcome.done, outcome.kept) == (done, pytest.approx(kept))


def test_an_edit_leaves_other_cells_as_they_were_to_the_pixel() -> None:
    for row in held_out_edits()[:60]:
        assert seen_in(row["image"]) == by_cell(scene_of(row["source"]))
        painted = target_picture(row)
        assert seen_in(painted) == edit_target(row)
        changed = {t.cell for t in set(scene_of(row["source"])) ^ set(edit_target(row))}
        differs = (painted != row["image"]).any(axis=2).reshape(3, CELL, 3, CELL).any(axis=(1, 3))
        assert {CELLS[k] for k in np.flatnonzero(differs)} == changed


def test_no_edit_or_scene_to_restore_is_in_both_splits() -> None:
    rng = np.random.default_rng(8)
    asked = [{draw_edit(EDITS[k % 5], rng, held)["prompt"] for k in range(500)} for held in (False, True)]
    assert not asked[0] & asked[1]
    tags = restores.FAULTS
    shown = [
        {str(restores.draw_restore(tags[k % 4], rng, held)["scene"]) for k in range(500)} for held in (False, True)
    ]
    assert not shown[0] & shown[1]
    assert not asked[0] & {row["prompt"] for row in held_out_edits()}
    assert not shown[0] & {str(row["scene"]) for row in restores.held_out_restores()}


def test_an_edit_cannot_be_misunderstood() -> None:
    rng = np.random.default_rng(7)
    for k in range(300):
        row = draw_edit(EDITS[k % 5], rng)
        names = Counter((color, shape) for color, shape, _ in row["source"])
        assert max(names.values()) == 1
        assert 1 <= len(row["target"]) <= 4
        assert satisfies(edit_target(row), row)


def test_critiques_and_texts_are_inverse_and_faults_hide_things() -> None:
    rows = restores.held_out_restores()[:80]
    assert Counter(row["tag"] for row in rows) == dict.fromkeys(restores.FAULTS, 20)
    for row in rows:
        critique = restores.true_critique(row)
        assert restores.parse_critique(restores.critique_text(critique)) == critique
        original = restores.original_picture(row)
        assert (restores.degraded_picture(row) == row["image"]).all()
        assert seen_in(original) == critique.scene
        error = np.abs(original.astype(float) - row["image"]).mean()
        assert error > 0.4
        if critique.lost:
            assert {t.cell for t in critique.scene} - {t.cell for t in seen_in(row["image"])} == set(critique.lost)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think> noise ,",
        "<think> red circle c2 </think>",
        "<think> fog , red circle keep c2 </think>",
        "<think> red circle keep c2 , noise </think>",
        "<think> red circle keep c2 , blue star lost c2 </think>",
    ],
)
def test_what_is_no_critique(text: str) -> None:
    assert restores.parse_critique(text) is None


@pytest.mark.parametrize(("name", "count"), [("shapes-reflect", 240), ("shapes-edit", 200), ("shapes-restore", 200)])
def test_suites_of_several_rounds_are_the_same_each_time(name: str, count: int) -> None:
    prompts, again = SuiteRegistry().prompts(name), SuiteRegistry().prompts(name)
    assert len({prompt.id for prompt in prompts}) == len(prompts) == count
    for one, other in zip(prompts, again, strict=True):
        assert (one.id, one.text, one.metadata) == (other.id, other.text, other.metadata)
        assert "image" not in one.metadata
        if name != "shapes-reflect":
            assert one.image.dtype == np.uint8
            assert one.image.shape == (48, 48, 3)
            assert (one.image == other.image).all()
            assert one.text == (one.metadata["prompt"] if name == "shapes-edit" else "")


@pytest.mark.parametrize("source", ["shapes-edit", "shapes-restore"])
def test_training_prompts_with_pictures(source: str) -> None:
    prompts = training_prompts(source)
    assert len({prompt.id for prompt in prompts}) == len(prompts) == 1024
    held = {prompt.text + str(prompt.metadata.get("scene")) for prompt in SuiteRegistry().prompts(source)}
    assert not held & {prompt.text + str(prompt.metadata.get("scene")) for prompt in prompts}


def test_the_shipped_weights_are_one_small_file_that_knows_the_words() -> None:
    assert [path.name for path in WEIGHTS.glob("*.safetensors")] == ["ema.safetensors"]
    assert (WEIGHTS / "ema.safetensors").stat().st_size <= 10_000_000
    policy = shipped()
    for row in [*held_out_edits(), *train_edits()]:
        said = reflection_text(scene_of(row["source"]), edit_target(row))
        assert not policy.unknown_words(row["prompt"] + " " + said + " correct")
    for row in restores.held_out_restores():
        assert not policy.unknown_words(restores.critique_text(restores.true_critique(row)))


def test_rows_of_pre_training_are_what_an_episode_reads() -> None:
    """Token for token: the prompt and each text in the policy's own format; texts are in the grammar."""
    policy = shipped()
    step = next(iter(Rows(policy.tokenizer, 0, Mix(one=0, two=12, edits=6, restores=6), Mistakes())))
    prompted, pictured = step
    assert prompted.source is None and pictured.source is not None
    for ids, length in zip(prompted.rounds[0].ids, prompted.rounds[0].lengths, strict=True):
        own = ids[:length].tolist()
        stop = own.index(policy.stop_id)
        text = policy.decode_text(ids[stop + 1 : length])
        assert own[stop + 1 :] == policy.given("", text).ids.tolist()
        assert own[0] == policy.open_id
        assert parse_plan(text) is not None
    for ids, length in zip(prompted.rounds[1].ids, prompted.rounds[1].lengths, strict=True):
        text = policy.decode_text(ids[:length])
        assert ids[:length].tolist() == policy.given("", text).ids.tolist()
        assert parse_reflection(text) is not None
    for ids, length in list(zip(pictured.rounds[0].ids, pictured.rounds[0].lengths, strict=True))[6:]:
        text = policy.decode_text(ids[:length])
        assert length == 0 or restores.parse_critique(text) is not None


def test_drills_predict_the_verdicts_of_an_edit_plan_without_pictures() -> None:
    """One verdict for each thing of the source, of which one does not stay."""
    policy = load_model(WEIGHTS)
    ((drills,),) = (part.rounds for part in next(iter(Rows(policy.tokenizer, 0, Mix(drills=40), Mistakes()))))
    assert drills.picture is None
    for ids, length, mask in zip(drills.ids, drills.lengths, drills.mask, strict=True):
        said = ids[:length].tolist()
        plan = parse_reflection(policy.decode_text(ids[said.index(policy.stop_id) + 1 : length]))
        assert plan is not None
        assert int(mask.sum()) == len(plan.seen)
        assert len(set(plan.seen) - set(plan.target)) == 1


def test_strokes_paint_the_cells_of_an_edit_plan() -> None:
    """No word is predicted, half have no instruction; four patches of each thing before or after are painted."""
    policy = load_model(WEIGHTS)
    (rows,) = next(iter(Rows(policy.tokenizer, 0, Mix(strokes=40), Mistakes())))
    (strokes,) = rows.rounds
    assert rows.source is not None and strokes.stroke is not None and not strokes.mask.any()
    instructed = 0
    for ids, length, painted in zip(strokes.ids, strokes.lengths, strokes.stroke, strict=True):
        *instruction, text = policy.decode_text(ids[:length]).split("<think>")
        instructed += bool(instruction[0].strip())
        plan = parse_reflection(f"<think>{text}")
        assert plan is not None
        cells = {thing.cell for thing in (*plan.seen, *plan.target)}
        patches = painted.view(3, 2, 3, 2)
        assert {CELLS[3 * row + column] for row, _, column, _ in patches.nonzero().tolist()} == cells
        assert int(painted.sum()) == 4 * len(cells)
    assert 10 < instructed < 30


def taught(mistakes: Mistakes, rounds: int, count: int = 40) -> list[tuple[Row, list[str]]]:
    """Rows that begin with a prompt, and the texts of each."""
    policy, rng = shipped(), np.random.default_rng(0)
    rows = Rows(policy.tokenizer, 0, Mix(one=0, two=1), mistakes)
    found = [rows.prompted(rng, rounds) for _ in range(count)]
    found = [row for row in found if row.rounds[-1].ids]  # those with a reflection
    return [(row, [policy.decode_text(torch.tensor(one.ids)) for one in row.rounds]) for row in found]


def test_what_is_taught_is_true_although_contexts_show_mistakes() -> None:
    """Each reflection says what the picture before it shows, and its own picture shows what it asks for."""
    wrong = 0
    for row, texts in taught(Mistakes(), rounds=3):
        assert row.rounds[2].kept is None
        for before, one, text in zip(row.rounds, row.rounds[1:], texts[1:], strict=False):
            said = parse_reflection(text)
            assert said is not None and before.kept is not None
            assert said.seen == seen_in(before.kept)
            assert said.target == seen_in(one.picture)
            wrong += not said.correct
    assert 20 < wrong < 70


def test_taught_mistakes_are_those_that_were_asked_for() -> None:
    for row, texts in taught(Mistakes(ignored=1.0), rounds=2):
        said = parse_reflection(texts[1])
        assert said is not None
        assert (seen_in(row.rounds[1].picture) == said.target) == said.correct
    for row, texts in taught(Mistakes(overlooked=1.0), rounds=2):
        said = parse_reflection(texts[1])
        assert said is not None
        assert said.correct or not said.seen
        assert seen_in(row.rounds[1].picture) == said.target


def test_wrong_plans_of_contexts_are_not_predicted() -> None:
    silent = [row.rounds[0].start == len(row.rounds[0].ids) for row, _ in taught(Mistakes(), rounds=2, count=100)]
    assert 0.3 < np.mean(silent) < 0.6
    every = Mistakes(wrong_plans=0.45)
    assert not any(row.rounds[0].start == len(row.rounds[0].ids) for row, _ in taught(every, rounds=2, count=100))
