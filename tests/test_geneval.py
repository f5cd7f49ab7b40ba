"""GenEval's rules on hand-made cases, the graded variants, and colours. The official verdicts: tests/golden."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from unigrpo_cli.cli import app
from unigrpo_cli.episode import Episode, Group, Prompt
from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardOutput, RewardResult
from unigrpo_cli.rewards.conformance import example_samples
from unigrpo_cli.toy.world import COLORS
from unigrpo_cli.training.metrics import rollout_metrics
from unigrpo_plugins.colors import ClipColors, Coloured, cielab, closeness, name_color, named
from unigrpo_plugins.detectors import Detection
from unigrpo_plugins.encoders import shared_encoder
from unigrpo_plugins.geneval import GenEvalOptions, GenEvalReward
from unigrpo_plugins.geneval_rules import DIRECTIONS, HOLDS, KINDS, DetectedObject, component, judge, keep_confident


def _at(x: float, y: float, size: float = 10.0, score: float = 0.95, color: str | None = None) -> DetectedObject:
    return DetectedObject(score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (-50, -50, {"left of", "above"}),  # a diagonal is two relations at once
        (-50, -20, {"left of"}),
        (1.5, 1.5, set()),  # within the shrunk tenth of both extents
        (2.1, 0, set()),  # beyond it by 0.1 of 2.1: the divisor is the unshrunk length
    ],
)
def test_relations(dx: float, dy: float, expected: set[str]) -> None:
    a, b = _at(100 + dx, 100 + dy), _at(100, 100)
    assert {relation for relation in DIRECTIONS if component(a, relation, b) > HOLDS} == expected


def test_thresholds_are_strict_and_counting_has_its_own() -> None:
    seen = {"cat": [_at(0, 0, score=s) for s in (0.3, 0.31, 0.9, 0.91)]}

    def count(tag: str) -> int:
        return len(keep_confident(seen, {"tag": tag}, threshold=0.3, counting_threshold=0.9).get("cat", ()))

    assert count("single_object") == 3
    assert count("counting") == 1


def test_at_most_sixteen_best_first() -> None:
    seen = {"cat": [_at(0, 0, score=0.5 + k / 100) for k in range(20)]}
    kept = keep_confident(seen, {"tag": "x"}, threshold=0.3, counting_threshold=0.9)["cat"]
    assert len(kept) == 16
    assert kept[0].score == pytest.approx(0.69)


def test_the_most_confident_are_judged_for_colour() -> None:
    """Two cats seen, one wanted red: only the best counts."""
    metadata = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    best_blue = {"cat": [_at(0, 0, score=0.9, color="blue"), _at(50, 0, score=0.5, color="red")]}
    assert not judge(best_blue, metadata).correct
    assert judge({"cat": best_blue["cat"][::-1]}, metadata).correct


def test_surplus_is_fine_unless_excluded_and_never_strict() -> None:
    three = {"cat": [_at(50 * k, 0) for k in range(3)]}
    two = {"tag": "two", "include": [{"class": "cat", "count": 2}]}
    assert judge(three, two).correct
    assert not judge(three, two).strict
    counting = two | {"exclude": [{"class": "cat", "count": 3}]}
    verdict = judge(three, counting)
    assert not verdict.correct
    assert verdict.reasons == ("fewer than 3 cat wanted, 3 found",)


POSITION = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1, "color": "red"},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    ],
}


def test_position_needs_its_target_matched() -> None:
    cat = {"cat": [_at(0, 0)]}
    assert judge(cat | {"dog": [_at(50, 0, color="red")]}, POSITION).correct
    wrong_colour = judge(cat | {"dog": [_at(50, 0, color="blue")]}, POSITION)
    assert not wrong_colour.correct
    assert "nothing for cat to be left of" in wrong_colour.reasons
    assert not judge(cat | {"dog": [_at(-50, 0, color="red")]}, POSITION).correct


@pytest.mark.parametrize(
    ("objects", "requirements", "partial"),
    [
        ({"dog": [_at(50, 0, color="red")], "cat": [_at(0, 0)]}, [1, 1, 1, 1], 1.0),
        ({"dog": [_at(-50, 0, color="red")], "cat": [_at(0, 0)]}, [1, 1, 1, 0], 0.75),
        ({"dog": [_at(50, 0, color="red")]}, [1, 1, 0, 0], 0.5),
        ({}, [0, 0, 0, 0], 0.0),
    ],
)
def test_partial_credit(objects: dict, requirements: list[float], partial: float) -> None:
    verdict = judge(objects, POSITION)
    assert [requirement.value for requirement in verdict.requirements] == requirements
    assert verdict.partial == partial


def test_partial_credit_is_bounded() -> None:
    """Sixteen found where one was wanted is 0, not minus fourteen."""
    many = {"cat": [_at(20 * k, 0) for k in range(16)]}
    verdict = judge(many, {"tag": "single_object", "include": [{"class": "cat", "count": 1}]})
    assert verdict.partial == 0.0


def test_counting_counts_by_distance() -> None:
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": 4}]}
    values = [judge({"cat": [_at(20 * k, 0) for k in range(n)]}, metadata).partial for n in range(7)]
    assert values == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5]


def test_cielab_of_known_colours() -> None:
    """White, mid grey and the sRGB primaries under D65, to published two decimals."""
    known = {
        (255, 255, 255): (100.0, 0.0, 0.0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (119, 119, 119): (50.03, 0.0, 0.0),
    }
    for rgb, lab in known.items():
        np.testing.assert_allclose(cielab(np.array(rgb)), lab, atol=0.05)


@pytest.mark.parametrize("name", list(COLORS))
def test_every_colour_is_named_within_its_jitter(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        color = np.clip(np.array(COLORS[name]) + rng.uniform(-10, 10, 3), 0, 255)
        image = np.broadcast_to(color, (8, 8, 3)).astype(np.uint8)
        assert name_color(image, None, (0, 0, 8, 8)) == name


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-50, 0, 1.0),  # 50 - 2 of 50: beyond the half at which the rule holds
        (-3, 0, 2 / 3),  # 3 - 2 of 3 is a third, over a half
        (-4, 0, 1.0),  # 4 - 2 of 4 is just a half
        (-2, 0, 0.0),
        (50, 0, 0.0),  # the wrong side
        (0, -50, 0.0),
        (-10, -20, 2 * 8 / 500**0.5),  # 10 - 2 of the length of (10, 20)
    ],
)
def test_soft_position(dx: float, dy: float, expected: float) -> None:
    """The shrunk component along the wanted direction, over the one at which the rule begins to hold."""
    verdict = judge({"dog": [_at(100, 100, color="red")], "cat": [_at(100 + dx, 100 + dy)]}, POSITION)
    assert verdict.requirements[-1].soft == pytest.approx(expected, abs=1e-12)
    assert verdict.soft == pytest.approx((3 + expected) / 4, abs=1e-12)


def test_soft_position_rises_to_one_where_the_rule_holds() -> None:
    def requirement(degrees: float) -> tuple[float, float]:
        turn = np.deg2rad(degrees)
        cat = _at(100 - 50 * np.cos(turn), 100 - 50 * np.sin(turn))
        last = judge({"dog": [_at(100, 100, color="red")], "cat": [cat]}, POSITION).requirements[-1]
        return last.soft, last.value

    values = [requirement(degrees) for degrees in range(180, -1, -3)]
    soft = [s for s, _ in values]
    assert soft == sorted(soft) and soft[0] == 0.0 and soft[-1] == 1.0
    assert all((s == 1.0) == (v == 1.0) for s, v in values)
    assert 5 < sum(0 < s < 1 for s in soft) < 25


def test_soft_position_is_that_of_the_worst_pair() -> None:
    metadata = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 2, "position": ["left of", 0]}],
    }
    verdict = judge({"dog": [_at(100, 0)], "cat": [_at(50, 0), _at(97, 0)]}, metadata)
    assert verdict.requirements[-1].soft == pytest.approx(2 / 3)
    assert verdict.requirements[-1].value == 0.0


def test_soft_colour_is_the_mean_likeness_of_the_wanted() -> None:
    metadata = {"tag": "colors", "include": [{"class": "cat", "count": 2, "color": "red"}]}
    cats = [
        DetectedObject(0.9, (0, 0, 9, 9), "red", {"red": 0.7, "pink": 0.3}),
        DetectedObject(0.8, (20, 0, 29, 9), "pink", {"red": 0.2, "pink": 0.8}),
    ]
    verdict = judge({"cat": cats}, metadata)
    assert [requirement.value for requirement in verdict.requirements] == [1.0, 0.5]
    assert verdict.soft == pytest.approx((1 + (0.7 + 0.2) / 2) / 2)
    assert judge({"cat": cats[:1]}, metadata).soft == pytest.approx(0.25)  # a wrong count: nothing for the colour


def test_parts_are_means_by_kind_and_none_where_nothing_was_asked() -> None:
    right = judge({"dog": [_at(50, 0, color="red")], "cat": [_at(0, 0)]}, POSITION)
    assert [right.part(kind) for kind in KINDS] == [1.0, 1.0, 1.0]
    no_dog = judge({"cat": [_at(0, 0)]}, POSITION)
    assert [no_dog.part(kind) for kind in KINDS] == [0.5, 0.0, 0.0]
    plain = judge({}, {"tag": "single_object", "include": [{"class": "cat", "count": 1}]})
    assert [plain.part(kind) for kind in KINDS] == [0.0, None, None]
    both = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "color": "red", "position": ["above", 0]}]
    surplus = judge({"dog": [_at(0, 50)], "cat": [_at(0, 0), _at(9, 0)]}, {"include": both})
    assert [surplus.part(kind) for kind in KINDS] == [0.5, 0.0, 0.0]
    assert len(surplus.requirements) == 3  # one 0 for both, as the reference has it


def test_lab_closeness() -> None:
    """1 at a colour, 1/2 between two, falling on the way; the largest is the nearest."""
    red, pink = (cielab(np.array(COLORS[name])) for name in ("red", "pink"))
    assert closeness(red)["red"] == 1.0
    assert closeness(red)["pink"] == 0.0
    way = [closeness(red + k / 20 * (pink - red)) for k in range(21)]
    to_red = [w["red"] for w in way]
    assert to_red == sorted(to_red, reverse=True)
    assert all((w["red"] >= 0.5) == (named(w) == "red") for w in way)
    assert all(0 <= v <= 1 for w in way for v in w.values())


class StubEncoder:
    """Looks at the mean colour of a crop; reads a caption as the colour it names, a weak red in "object" ones."""

    scale = 10.0

    def __init__(self) -> None:
        self.crops: list[np.ndarray] = []
        self.read: list[str] = []

    def images(self, images: list) -> torch.Tensor:
        self.crops += [np.asarray(image) for image in images]
        means = torch.tensor(np.stack([np.asarray(i).reshape(-1, 3).mean(axis=0) for i in images])).float()
        return torch.nn.functional.normalize(means, dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        self.read += texts
        rows = []
        for text in texts:
            color = next(c for c in COLORS if f" {c}" in text)
            rows.append((255, 0, 0) if text.endswith("object") else COLORS[color])
        return torch.nn.functional.normalize(torch.tensor(rows).float(), dim=-1)


def test_clip_colours_follow_genevals_rule() -> None:
    """The mask on grey, cropped to the box; three captions for each colour averaged; a softmax over ten."""
    image = np.zeros((20, 30, 3), np.uint8)
    image[:] = (0, 0, 255)
    image[5:10, 10:18] = (255, 0, 0)
    mask = np.zeros((20, 30), bool)
    mask[5:10, 10:18] = True
    mask[5, 10] = False
    stub = StubEncoder()
    masked, bare = Detection("cup", 0.9, (10, 5, 18, 10), mask), Detection("cup", 0.9, (9.4, 4.6, 18.4, 10.2))
    found = ClipColors(stub).likeness([Coloured(image, masked), Coloured(image, bare)])
    cut, box = stub.crops
    assert cut.shape == (5, 8, 3)
    assert (cut[0, 0] == 0x99).all() and (cut[1:] == (255, 0, 0)).all()
    assert box.shape == (5, 9, 3) and (box[:, 0] == (0, 0, 255)).all()  # without a mask, the surroundings stay
    assert stub.read[:3] == ["a photo of a red cup", "a photo of a red-colored cup", "a photo of a red object"]
    assert len(stub.read) == 30
    mean = np.stack([_unit(2 * _unit(np.array(rgb)) + (1, 0, 0)) for rgb in COLORS.values()])
    logits = 10 * mean @ _unit(cut.reshape(-1, 3).mean(axis=0))
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(list(found[0].values()), expected, atol=1e-5)
    assert named(found[0]) == list(COLORS)[int(expected.argmax())]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def test_clip_colours_with_a_real_encoder() -> None:
    """The embedded CLIP, whose world this is: it tells most colours of a plain square; its key is shared."""
    context = RewardContext("cpu", 0, True, True)
    encoder, _ = shared_encoder(context, "geneval", "embedded", None)
    image = np.full((48, 48, 3), 0x99, np.uint8)
    things = []
    for rgb in COLORS.values():
        one = image.copy()
        one[14:34, 14:34] = rgb
        things.append(Coloured(one, Detection("square", 0.9, (4, 4, 44, 44))))
    found = ClipColors(encoder).likeness(things)
    assert all(sum(f.values()) == pytest.approx(1, abs=1e-5) for f in found)
    assert sum(named(f) == color for f, color in zip(found, COLORS, strict=True)) >= 6
    reward = GenEvalReward(GenEvalOptions(color="clip", clip_model="embedded", clip_pretrained=None))
    reward.setup(context)
    assert reward.colors.encoder is encoder
    reward.teardown()


def _samples(split: str = "train", **options: object) -> RewardOutput:
    reward = GenEvalReward(GenEvalOptions(**options))
    reward.setup(RewardContext("cpu", 0, True, True))
    rows = example_samples(6)
    reward.check_metadata([s.metadata for s in rows])
    return reward.score(RewardBatch(tuple(rows), split=split))


def test_components_and_remarks_of_a_batch() -> None:
    output = _samples()
    assert set(output.components) == {"official", "strict", "partial", "soft", "count", "color", "position"}
    asked = [
        {"color", "position"} & {key for item in s.metadata["include"] for key in item} for s in example_samples(6)
    ]
    for kind in ("color", "position"):
        assert [not math.isnan(v) for v in output.components[kind]] == [kind in own for own in asked]
    assert output.scores == output.components["partial"] == [1.0] * 6
    assert _samples("eval").scores == output.components["official"]
    soft = _samples(mode="soft").scores
    assert soft == output.components["soft"]
    assert all(0.5 < v <= 1 for v in soft) and any(v < 1 for v in soft)
    first = output.info[0]
    assert first["tag"] and first["counts"] and first["judge"] == "geneval (shapes): shapes, lab"


def test_a_part_that_some_prompts_lack_is_logged_for_those_that_have_it() -> None:
    yes = np.array([True, True, False])
    parts = {"color": np.array([0.5, math.nan, 1.0]), "position": np.full(3, math.nan)}
    scored = RewardResult(np.ones(3), yes, parts, [{}] * 3)
    prompt = Prompt("a", "a")
    groups = [Group(prompt, tuple(Episode(prompt, k, k, ()) for k in range(2)))]
    metrics = rollout_metrics(groups, {"geneval": scored}, torch.zeros(2, 1), torch.ones(2, 1))
    assert metrics["reward/geneval/color"] == 0.5
    assert math.isnan(metrics["reward/geneval/position"])


def test_a_detector_refuses_what_it_cannot_see() -> None:
    reward = GenEvalReward(GenEvalOptions())
    reward.setup(RewardContext("cpu", 0, True, True))
    with pytest.raises(RewardError, match=r"cannot see bench.*@detector=mask2former.*@detector=rfdetr"):
        reward.check_metadata([{"include": [{"class": "bench", "count": 1}]}])


def test_another_policy_gets_shapes_only_for_prompts_about_shapes() -> None:
    stranger = RewardContext("cpu", 0, False, True)
    reward = GenEvalReward(GenEvalOptions())
    reward.setup(stranger)
    with pytest.raises(RewardError, match=r"no detector was named.*cannot see bench.*@detector=boxes.*@weights"):
        reward.check_metadata([{"include": [{"class": "heart", "count": 1}, {"class": "bench", "count": 1}]}])
    reward.check_metadata([{"include": [{"class": "heart", "count": 1}]}])
    assert reward.detector_name == "shapes" and reward.colors.name == "lab"
    reward.teardown()
    assert not stranger.shared._held


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "x"}, "@weights has no effect with detector 'auto'"),
        ({"detector": "shapes", "size": "own"}, "@size has no effect"),
        ({"detector": "boxes"}, "needs weights"),
    ],
)
def test_options_without_use_are_refused(options: dict, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        GenEvalReward(GenEvalOptions(**options)).setup(RewardContext("cpu", 0, True, True))


def test_a_tiny_bagel_trains_on_it(tmp_path: Path) -> None:
    """A policy that is not ours, on prompts about shapes, without options."""
    tiny = Path(__file__).parent / "golden" / "bagel_tiny"
    settings = [
        "sampling.height=32",
        "sampling.width=48",
        "sampling.max_new_tokens=4",
        "sampling.steps=4",
        "sampling.window_range=[0,3]",
        "eval.steps=2",
        "eval.limit=1",
        "eval.rewards=[]",
        "train.prompts_per_step=2",
        "train.group_size=2",
        "doctor.at_start=off",
    ]
    arguments = ["train", "--model", str(tiny), "--reward", "geneval", "--steps", "1", "--preset", "paper"]
    sets = [f"--set={s}" for s in settings]
    done = CliRunner().invoke(app, [*arguments, *sets, "--out", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert set(json.loads(done.stdout)["eval_after"]) == {"geneval"}
