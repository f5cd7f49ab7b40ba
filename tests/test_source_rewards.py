"""Rewards of pictures that come from pictures: edit, source-fidelity, improvement, original, reflection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from unigrpo_cli import RewardContext, Sample, reward
from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.conformance import edit_samples, several_round_samples
from unigrpo_cli.rewards.loaded import RewardLimits
from unigrpo_cli.rewards.registry import Plugins, RewardEntry
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.toy.edits import edit_target, scene_of, source_picture, target_picture, train_edits
from unigrpo_cli.toy.reflect import reflection_text
from unigrpo_cli.toy.render import render
from unigrpo_cli.toy.restores import (
    Critique,
    critique_text,
    degraded_picture,
    original_picture,
    train_restores,
    true_critique,
)
from unigrpo_cli.toy.world import Thing, plan_text
from unigrpo_plugins.reflection import ReflectionReward, true_share
from unigrpo_plugins.shapes import OriginalReward
from unigrpo_plugins.sources import EditReward, ImprovementReward, SourceFidelityReward, changed_boxes

CLASSES = (EditReward, SourceFidelityReward, ImprovementReward, ReflectionReward, OriginalReward)
SCENE = (Thing("red", "circle", "a1"), Thing("blue", "star", "c2"))


def _plugins(*factories: object) -> Plugins:
    plugins = Plugins()
    plugins.load()
    known = {entry.name for entry in plugins.rewards.entries}
    for kind in CLASSES:  # an editable install knows only the entry points of its day
        if kind.name not in known:
            plugins.rewards.add_entry(RewardEntry(kind.name, "unigrpo-cli", "-", load=lambda kind=kind: kind))
    for factory in factories:
        plugins.rewards.add(factory.__unigrpo_reward__.name, factory)
    return plugins


def _scored(text: str, samples: Sequence[Sample], *factories: object, split: str = "train") -> RewardResult:
    context, limits = RewardContext("cpu", 0, True, True), RewardLimits(max_abstain=1.0)
    with Scorer(parse_rewards([text]), _plugins(*factories), context, limits) as rewards:
        (found,) = rewards.score(samples, split=split).values()
        return found


def _edit(tag: str, pixels: np.ndarray | None = None) -> Sample:
    row = next(row for row in train_edits(40) if row["tag"] == tag and len(row["source"]) > 2)
    row.pop("image")
    picture = target_picture(row) if pixels is None else pixels
    return Sample(row["prompt"], picture, "", row, source=source_picture(row))


# ----- edit


@pytest.mark.parametrize("tag", ["add", "remove", "recolor", "reshape", "move"])
def test_an_edit_is_done_and_all_else_kept(tag: str) -> None:
    """The target is right, the source is not done, and one other thing lost costs its share of the things."""
    whole = _edit(tag)
    target, source = edit_target(whole.metadata), scene_of(whole.metadata["source"])
    others = [thing for thing in target if thing in source]
    less = render(tuple(t for t in target if t != others[0]), np.random.default_rng(0))
    samples = [whole, replace(whole, pixels=whole.source), replace(whole, pixels=less)]
    found = _scored("edit", samples)
    expected = [1.0, 0.0, (len(others) - 1) / len(others)]
    assert found.scores.tolist() == pytest.approx(expected)
    assert _scored("edit", samples, split="eval").scores.tolist() == [1.0, 0.0, 0.0]
    assert found.components["kept"].tolist()[1] == 1.0
    assert found.components["strict"].tolist() == [1.0, 0.0, 0.0]


# ----- likeness to the source


def test_likeness_of_pixels_is_measured_outside_the_mask() -> None:
    source = np.zeros((6, 6, 3), np.uint8)
    changed = source.copy()
    changed[:2, :2] = 255
    left = Sample("p", changed, None, {"mask": [[0, 0, 1 / 3, 1 / 3]]}, source=source)
    assert _scored("source-fidelity", [left]).scores.tolist() == [1.0]
    assert _scored("source-fidelity", [replace(left, metadata={})]).scores.tolist() == pytest.approx([1 - 4 / 36])
    moved = replace(left, metadata={"mask": [[0.5, 0.5, 1, 1]]})
    assert _scored("source-fidelity", [moved]).scores.tolist() == pytest.approx([1 - 4 / 27])
    larger = replace(left, source=np.zeros((12, 12, 3), np.uint8))
    assert _scored("source-fidelity", [larger]).scores.tolist() == [1.0]


@pytest.mark.parametrize("tag", ["add", "remove", "recolor", "reshape", "move"])
def test_what_an_edit_may_change_is_not_compared(tag: str) -> None:
    """Untouched cells of the target are equal to the pixel, so a right edit keeps the whole of the rest."""
    sample = _edit(tag)
    assert changed_boxes(sample.metadata)
    assert _scored("source-fidelity", [sample]).scores.tolist() == [1.0]
    assert _scored("source-fidelity", [replace(sample, metadata={})]).scores[0] < 1


def test_likeness_by_clip_is_one_for_the_source_itself() -> None:
    samples = [replace(s, pixels=s.source) for s in edit_samples()] + edit_samples()
    found = _scored("source-fidelity@by=clip", samples).scores
    assert found[:8].tolist() == pytest.approx([1.0] * 8, abs=1e-5)
    assert found[8:].min() < 0.99


def test_without_a_source_there_is_nothing_to_compare() -> None:
    with pytest.raises(RewardError, match="sampling.program=edit"):
        _scored("source-fidelity", [Sample("p", np.zeros((6, 6, 3), np.uint8))])
    with Scorer(parse_rewards(["source-fidelity"]), _plugins(), RewardContext("cpu", 0, True, True)) as rewards:
        with pytest.raises(RewardError, match="needs the picture that an episode starts from"):
            rewards.check_needs([{}], has_reasoning=True, has_source=False, split="train")


# ----- improvement


@reward("grey", range=(0, 255))
def grey(pixels, gain=1.0):
    return [None if p.mean() == 99 else gain * float(p.mean()) for p in pixels]


def test_improvement_is_after_minus_before() -> None:
    def sample(after: int, before: int) -> Sample:
        return Sample("p", np.full((2, 2, 3), after, np.uint8), source=np.full((2, 2, 3), before, np.uint8))

    samples = [sample(30, 10), sample(10, 30), sample(99, 10), sample(10, 99)]
    found = _scored("improvement@of=grey", samples, grey)
    assert found.scores[:2].tolist() == [20, -20]
    assert np.isnan(found.scores[2:]).all(), "it abstains where the other reward does, on either picture"
    assert (found.components["after"][0], found.components["before"][0]) == (30, 10)
    with Scorer(parse_rewards(["improvement@of=grey"]), _plugins(grey), RewardContext("cpu", 0, True, True)) as rewards:
        assert rewards.ranges["improvement"] == (-255, 255)
    (spec,) = parse_rewards(["improvement"], {"improvement.of": "grey@gain=2"})
    with Scorer([spec], _plugins(grey), RewardContext("cpu", 0, True, True)) as rewards:
        assert rewards.score(samples[:2])["improvement"].scores.tolist() == [40, -40]
    with pytest.raises(RewardError, match="does not score a picture by itself"):
        _scored("improvement@of=reflection", samples)
    for other, said in (("ocr", "name a recogniser"), ("reflection", "does not score a picture by itself")):
        with Scorer(
            parse_rewards([f"improvement@of={other}"]), _plugins(), RewardContext("cpu", 0, True, True), local=False
        ) as rewards:
            with pytest.raises(RewardError, match=said):
                rewards.check_options([], "train")


def test_a_restored_picture_improves_towards_the_original() -> None:
    rows = [{k: v for k, v in row.items() if k != "image"} for row in train_restores(8)]
    pairs = [(original_picture(m), degraded_picture(m), m) for m in rows]
    restored = [Sample("", a, "", m, source=b) for a, b, m in pairs]
    assert _scored("original", restored).scores.tolist() == [1.0] * 8
    found = _scored("improvement@of=original", restored).scores
    wanted = [np.abs(a.astype(float) - b).mean() / 255 for a, b, _ in pairs]
    assert found.tolist() == pytest.approx(wanted)
    assert min(wanted) > 0


# ----- reflections


def test_statements_are_counted() -> None:
    """Seen 2 of 2 and a true verdict: 1; one thing wrong in colour: 1 of 3 things and the verdict; and so on."""
    asked = {"include": [{"class": thing.shape, "color": thing.color, "count": 1} for thing in SCENE]}
    wrong = (Thing("red", "circle", "a1"), Thing("green", "star", "c2"))
    more = (*SCENE, Thing("blue", "heart", "b3"))
    told = {
        reflection_text(SCENE, SCENE): 1.0,
        reflection_text(SCENE, more): 2 / 3,  # things right, but the picture is right already
        reflection_text(wrong, wrong): 2 / 4,  # one of three things, and the verdict
        "words outside the grammar": 0.0,
    }
    for text, share in told.items():
        assert true_share(text, SCENE, asked) == pytest.approx(share), text
    assert true_share(reflection_text((), ()), (), {}) == 1.0


def test_each_text_is_about_the_picture_that_was_looked_at() -> None:
    """The plan is about none; the reflection about picture 1, not about the last one."""
    rng = np.random.default_rng(0)
    other = (Thing("green", "heart", "b2"),)
    asked = {
        "include": [{"class": "star", "color": "blue", "count": 1}, {"class": "circle", "color": "red", "count": 1}]
    }
    segments = (plan_text(other), render(SCENE, rng), reflection_text(SCENE, SCENE), render(other, rng))
    sample = Sample("p", segments[3], "", asked, segments=segments)
    lie = replace(sample, segments=(*segments[:2], reflection_text(other, SCENE), segments[3]))
    found = _scored("reflection", [sample, lie, Sample("p", segments[3], plan_text(other), asked)])
    assert found.segments[0] == {"text_2": 1.0}
    assert found.segments[1]["text_2"] == 0.0
    assert found.segments[2] == {}
    assert np.isnan(found.scores[2]), "there is no text after a picture"
    assert found.components["all_true"][:2].tolist() == [1.0, 0.0]


def test_edit_plans_and_critiques_are_about_the_source() -> None:
    edit = next(s for s in edit_samples() if len(s.metadata["source"]) > 1)
    assert _scored("reflection", [edit]).segments == [{"text_1": 1.0}]
    row = {k: v for k, v in train_restores(4)[0].items() if k != "image"}
    truth = true_critique(row)
    source = degraded_picture(row)
    lie = Critique("blur" if truth.fault != "blur" else "cast", truth.scene, truth.lost)
    samples = [Sample("", source, critique_text(c), row, source=source) for c in (truth, lie)]
    share = len(truth.scene) / (len(truth.scene) + 1)
    assert [s["text_1"] for s in _scored("reflection", samples).segments] == pytest.approx([1.0, share])


@pytest.mark.parametrize("name", ["plan", "fidelity"])
def test_plans_are_the_text_right_before_the_picture(name: str) -> None:
    """A reflection that asks for the right thing is a plan for the next picture."""
    rng = np.random.default_rng(0)
    other = (Thing("green", "heart", "b2"),)
    asked = {
        "include": [{"class": "star", "color": "blue", "count": 1}, {"class": "circle", "color": "red", "count": 1}]
    }
    segments = (plan_text(other), render(other, rng), reflection_text(other, SCENE), render(SCENE, rng))
    sample = Sample("p", segments[3], "", asked, segments=segments)
    assert _scored(name, [sample]).scores.tolist() == [1.0]
    assert _scored(name, [sample.by_round()[0]]).scores.tolist() == [float(name == "fidelity")]
    edit = edit_samples()[2]
    assert _scored(name, [edit]).scores.tolist() == [1.0]


def test_samples_of_two_rounds_have_words_on_their_picture() -> None:
    """Half of the words that `rewards test` scores are true."""
    shares = [row["text_2"] for row in _scored("reflection", several_round_samples()).segments]
    assert [share == 1 for share in shares] == [True, True, False, False] * 2


def test_reflections_need_no_source() -> None:
    """A program that looks at its own picture starts from none."""
    with Scorer(parse_rewards(["reflection"]), _plugins(), RewardContext("cpu", 0, True, True)) as rewards:
        rewards.check_needs([{}], has_reasoning=True, has_source=False, split="train")


def test_an_edit_plan_may_name_things_in_any_order() -> None:
    row = next(row for row in train_edits(40) if len(row["target"]) > 1)
    pixels, metadata = row["image"], {key: value for key, value in row.items() if key != "image"}
    plans = [plan_text(scene) for scene in (edit_target(row), edit_target(row)[::-1])]
    samples = [Sample("p", pixels, plan, metadata, segments=(plan, pixels)) for plan in plans]
    assert _scored("plan", samples).scores.tolist() == [1.0, 1.0]
