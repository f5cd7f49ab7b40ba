"""GenEval's rules on hand-made cases, the graded variants, and colours. The official verdicts: tests/golden."""

from __future__ import annotations

import numpy as np
import pytest

from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardContext
from unigrpo_cli.shapes.world import COLORS
from unigrpo_plugins.colors import cielab, name_color
from unigrpo_plugins.geneval import GenEvalOptions, GenEvalReward
from unigrpo_plugins.geneval_rules import Seen, judge, keep_confident, relations


def _at(x: float, y: float, size: float = 10.0, score: float = 0.95, color: str | None = None) -> Seen:
    return Seen(score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color)


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
    assert relations(_at(100 + dx, 100 + dy), _at(100, 100)) == expected


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
    ("objects", "atoms", "partial"),
    [
        ({"dog": [_at(50, 0, color="red")], "cat": [_at(0, 0)]}, [1, 1, 1, 1], 1.0),
        ({"dog": [_at(-50, 0, color="red")], "cat": [_at(0, 0)]}, [1, 1, 1, 0], 0.75),
        ({"dog": [_at(50, 0, color="red")]}, [1, 1, 0, 0], 0.5),
        ({}, [0, 0, 0, 0], 0.0),
    ],
)
def test_partial_credit(objects: dict, atoms: list[float], partial: float) -> None:
    verdict = judge(objects, POSITION)
    assert [atom.value for atom in verdict.atoms] == atoms
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


def test_a_detector_refuses_what_it_cannot_see() -> None:
    reward = GenEvalReward(GenEvalOptions())
    reward.setup(RewardContext("cpu", 0, True, True))
    with pytest.raises(RewardError, match="cannot see bench"):
        reward.check_metadata([{"include": [{"class": "bench", "count": 1}]}])
