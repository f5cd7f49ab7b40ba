"""The comparisons run, the ways that are compared give the same, and a way that does not is refused."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import compare, plain, report, sampling, words
from benchmarks.cases import CASES, Comparison
from benchmarks.clock import Clock, ratio
from unigrpo_cli.models.mot.config import network_shapes

TINY = CASES["tiny"]
CPU = torch.device("cpu")


def test_every_row_is_there_and_true(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")]
    compare.main(["--size", "tiny", *files])
    found, markdown = json.loads((tmp_path / "found.json").read_text()), (tmp_path / "found.md").read_text()
    rows = {(r["part"], r["name"]): r for r in found["rows"]}
    missing = {(r["part"], r["name"]): r["reason"] for r in found["not_run"]}
    assert rows.keys() | missing.keys() == {(r.part, r.name) for r in compare.rows_of(TINY)}
    assert all(part == words.AGAINST and reason == words.INSTALL for (part, _), reason in missing.items())
    assert all(math.isfinite(r["value"]) and r["value"] >= 0 for r in rows.values())
    assert all(r["value"] > 0 for r in rows.values() if r["unit"] != report.RELATIVE)
    for part, name in rows:
        assert f"| {part} | {name} | " in markdown
    assert {"machine", "threads", "torch", "transformers", "diffusers", "commit", "date"} <= set(found["setting"])


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("velocity", lambda own: lambda *given: own(*given) * 1.001, "latents differ"),
        ("uniform", lambda own: lambda *given: 1 - own(*given), "wrote other words"),
    ],
)
def test_a_baseline_that_samples_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, name, wrong, says) -> None:
    monkeypatch.setattr(plain, name, wrong(getattr(plain, name)))
    bench = Comparison(TINY, Clock(CPU, 60), report.Report({}, compare.rows_of(TINY), None))
    with pytest.raises(AssertionError, match=says):
        sampling.measure_sampling(bench, sampling.LARGE)


def test_the_large_network_is_as_large_as_it_is_called() -> None:
    weights = sum(math.prod(s) for s in network_shapes(CASES["full"].large.network).values())
    assert weights == pytest.approx(105e6, rel=0.03)


def test_variants_take_turns_and_the_first_of_each_is_not_counted() -> None:
    called: list[str] = []
    runs = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    times = Clock(CPU, 60).in_turn(runs, share_s=60, most=3)
    assert "".join(called) == "ab" * 4
    assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_rounds() -> None:
    """The second round was disturbed, both variants alike; the third only in one of them."""
    times = {"slow": [3.0, 30.0, 3.0], "fast": [1.0, 10.0, 5.0]}
    assert ratio(times, "slow", "fast") == 3.0


def test_seconds_of_the_processor_leave_out_waiting() -> None:
    waiting = {p: Clock(CPU, 60, processor=p).once(lambda: time.sleep(0.05)) for p in (True, False)}
    assert waiting[True] < 0.03 <= 0.05 <= waiting[False]


def test_only_a_difference_may_be_nothing() -> None:
    rows = [report.Row("p", "seconds", "s"), report.Row("p", "apart", report.RELATIVE)]
    found = report.Report({}, rows, None)
    found.add("p", "apart", 0.0)
    with pytest.raises(ValueError, match="measured 0"):
        found.add("p", "seconds", 0.0)
