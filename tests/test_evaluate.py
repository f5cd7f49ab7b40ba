"""Means, intervals and paired differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import UsageError
from unigrpo_cli.evaluate import bootstrap, compare, limited, load_report, resampled, summarise


def _summary(values: np.ndarray, tasks: list[str] | None = None, texts: list[str] | None = None):
    n = len(values)
    return summarise(
        {"r": values},
        np.array(tasks or ["t"] * n),
        [str(k) for k in range(n)],
        texts or [str(k) for k in range(n)],
        noise={"seed": 0},
    )


def test_the_interval_is_the_normal_one_for_many_prompts() -> None:
    """400 prompts, half right: 1.96 * 0.5 / 20 = 0.049 either side."""
    values = np.tile([0.0, 1.0], 200)
    low, high = bootstrap(values, [str(k) for k in range(400)], seed=1)
    assert low == pytest.approx(0.5 - 0.049, abs=0.006)
    assert high == pytest.approx(0.5 + 0.049, abs=0.006)


def test_images_of_one_prompt_do_not_count_as_many() -> None:
    """Ten images of each of ten prompts, all alike within a prompt: the interval is that of ten, not a hundred."""
    values = np.repeat(np.tile([0.0, 1.0], 5), 10)
    texts = [str(k // 10) for k in range(100)]
    low, high = bootstrap(values, texts, seed=1)
    alone = bootstrap(values[::10], texts[::10], seed=1)
    assert (low, high) == pytest.approx(alone)
    assert high - low > 0.5


def test_pictures_that_share_an_instruction_count_each() -> None:
    """400 pictures to restore have one text, the empty one: the interval is that of 400 prompts, not of one."""
    source = np.zeros((4, 4, 3), np.uint8)
    prompts = [Prompt(str(k), "", {}, image=source) for k in range(400)]
    low, high = bootstrap(np.tile([0.0, 1.0], 200), [resampled(p) for p in prompts], seed=1)
    assert high - low == pytest.approx(2 * 0.049, abs=0.012)
    assert resampled(Prompt("a#2", "a", {})) == "a"


def test_means_by_image_and_by_task() -> None:
    result = _summary(np.array([1.0, 1.0, 1.0, 0.0]), tasks=["a", "a", "a", "b"])
    assert result.scores["r"].mean == 0.75
    assert result.scores["r"].task_mean == 0.5
    assert result.per_task == {"a": {"r": 1.0}, "b": {"r": 0.0}}


def test_abstentions_are_left_out() -> None:
    result = _summary(np.array([1.0, np.nan, 0.0, np.nan]))
    assert result.scores["r"].mean == 0.5
    assert result.scores["r"].n == 2
    assert "r" not in _summary(np.array([np.nan, np.nan])).scores


def test_paired_differences_see_what_unpaired_intervals_cannot() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, 300)
    one, two = _summary(first), _summary(first + 0.05 + rng.normal(0, 0.01, 300))
    found = compare(one, two)["r"]
    assert found["mean"] == pytest.approx(0.05, abs=0.002)
    assert 0.045 < found["ci95"][0] < found["ci95"][1] < 0.055
    assert one.scores["r"].ci95[1] > two.scores["r"].ci95[0], "the plain intervals overlap"


def test_different_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        compare(_summary(np.ones(3)), _summary(np.ones(4)))


def test_reports_can_be_read_again(tmp_path: Path) -> None:
    result = _summary(np.array([1.0, np.nan, 0.0]), tasks=["a", "a", "b"])
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(result.report(values=True), allow_nan=False))
    again = load_report(path)
    assert again.scores == result.scores
    assert again.prompt_ids == result.prompt_ids
    np.testing.assert_array_equal(again.values["r"], result.values["r"])


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["scores"]["r"].update(ci95=None),
        lambda report: report["scores"]["r"].update(mean="high"),
        lambda report: report["values"].update(r=[1.0]),
        lambda report: report["values"].update(r=[10**400, 0, 0]),
        lambda report: report.update(noise=float("nan")),
        lambda report: report.pop("texts"),
    ],
)
def test_a_damaged_report_is_one_line_with_its_path(tmp_path: Path, change: Callable) -> None:
    report = json.loads(json.dumps(_summary(np.array([1.0, np.nan, 0.0])).report(values=True)))
    change(report)
    (tmp_path / "eval.json").write_text(json.dumps(report))
    with pytest.raises(UsageError, match="eval.json is not an evaluation"):
        load_report(tmp_path / "eval.json")


def test_limits_are_per_task() -> None:
    prompts = [Prompt(str(k), str(k), {"tag": "ab"[k % 2]}) for k in range(10)]
    assert [p.id for p in limited(prompts, 2)] == ["0", "1", "2", "3"]
    assert limited(prompts, 0) == prompts
