"""Trends of rewards: a t statistic in closed form, and the warning that held-out and trained ones part."""

from __future__ import annotations

import math
import random

import pytest

from unigrpo_cli.watch import parting, trend


def test_a_trend_by_hand() -> None:
    """0, 1, 1, 2: slope .6, residuals -.1 .3 -.3 .1, so t = .6 / sqrt(.1 / 5)."""
    assert trend([0.0, 1.0, 1.0, 2.0]) == pytest.approx(0.6 / math.sqrt(0.2 / 2 / 5))
    assert trend([2.0, 1.0, 1.0, 0.0]) == pytest.approx(-0.6 / math.sqrt(0.2 / 2 / 5))


def test_straight_lines_flat_ones_and_gaps() -> None:
    assert trend([1.0, 2.0, 3.0]) == math.inf
    assert trend([3.0, 2.0, 1.0]) == -math.inf
    assert trend([1.0, 1.0, 1.0]) == 0.0
    assert trend([1.0, 2.0]) == 0.0
    assert trend([0.0, math.nan, 1.0, 1.0, 2.0]) == pytest.approx(trend([0.0, math.nan, 1.0, 1.0, 2.0, math.nan]))


def test_noise_alone_is_seldom_clear() -> None:
    draw = random.Random(0)
    clear = sum(abs(trend([draw.gauss(0, 1) for _ in range(20)])) > 3 for _ in range(2000))
    assert clear / 2000 < 0.015


def test_only_opposite_clear_trends_are_told() -> None:
    up, down = [0.1, 0.2, 0.4, 0.5, 0.6], [0.9, 0.8, 0.6, 0.5, 0.4]

    def history(trained: list[float], watched: list[float]) -> list[dict[str, float]]:
        return [{"a": x, "b": y} for x, y in zip(trained, watched, strict=True)]

    assert parting(history(up, down), ["a"], ["b"]) == ["b"]
    assert parting(history(up, up), ["a"], ["b"]) == []
    assert parting(history(down, down), ["a"], ["b"]) == []
    assert parting(history(up, [0.5, 0.4, 0.6, 0.5, 0.4]), ["a"], ["b"]) == []
    assert parting(history(up, down), ["a"], []) == []
