"""Agreement of two judges, by hand."""

from __future__ import annotations

import json
import math

import pytest

from unigrpo_plugins.calibration import agreement, calibrate


def _pairs(both: int, only_a: int, only_b: int, neither: int) -> list:
    return [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither


def test_kappa_by_hand() -> None:
    """20, 5, 10, 15 of 50: observed 35/50, by chance .5 x .6 + .5 x .4 = .5, so kappa = .2 / .5."""
    row = agreement(_pairs(20, 5, 10, 15))
    assert row["agreement"] == pytest.approx(0.7)
    assert row["kappa"] == pytest.approx(0.4)
    assert (row["both"], row["only_a"], row["only_b"], row["neither"]) == (20, 5, 10, 15)
    assert (row["correct_a"], row["correct_b"]) == (0.5, 0.6)


def test_kappa_at_its_ends() -> None:
    assert agreement(_pairs(3, 0, 0, 5))["kappa"] == pytest.approx(1.0)
    assert agreement(_pairs(0, 4, 4, 0))["kappa"] == pytest.approx(-1.0)
    assert agreement(_pairs(1, 1, 1, 1))["kappa"] == pytest.approx(0.0)
    always = agreement(_pairs(5, 0, 0, 0))
    assert always["agreement"] == 1.0 and always["kappa"] is None
    nothing = agreement([None])
    assert (nothing["images"], nothing["left_out"], nothing["agreement"]) == (0, 1, None)


def test_rows_by_task_and_class() -> None:
    tags = ["counting", "counting", "colors", "colors", "colors"]
    metadata = [{"tag": tag} for tag in tags]
    rows = calibrate(
        [True, 0.2, 1, 0.5, None],
        [1.0, True, 0, math.nan, 1],
        metadata,
        counts_a=[{"cat": 2}, {"cat": 4}, {"dog": 1}, {}, {}],
        counts_b=[{"cat": 3}, {"cat": 2}, {"dog": 1}, {"dog": 2}, {}],
    )
    assert rows == json.loads(json.dumps(rows))
    everything, colors, counting, cat, dog = rows
    assert (everything["row"], everything["images"], everything["left_out"]) == ("all", 3, 2)
    assert everything["agreement"] == pytest.approx(1 / 3)
    assert (colors["name"], colors["images"], colors["only_a"], colors["agreement"]) == ("colors", 1, 1, 0.0)
    assert (counting["name"], counting["both"], counting["only_b"], counting["kappa"]) == ("counting", 1, 1, 0.0)
    assert cat == {
        "row": "class",
        "name": "cat",
        "images": 2,
        "same": 0.0,
        "mean_difference": -0.5,
        "mean_absolute_difference": 1.5,
    }
    assert (dog["images"], dog["same"], dog["mean_difference"]) == (2, 0.5, 1.0)


def test_lists_must_fit() -> None:
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        calibrate([1.0], [1.0, 0.0], [{}, {}])
    with pytest.raises(ValueError, match="no pictures"):
        calibrate([], [], [])
