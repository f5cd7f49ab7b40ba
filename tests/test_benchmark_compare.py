"""The comparisons run, the ways that are compared give the same, and a way that does not is refused."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import compare, growth, passes, plain, report, sampling, step, words
from benchmarks.cases import CASES, Comparison
from benchmarks.clock import Clock, ratio
from benchmarks.shapes import random_policy
from tests.torch_flops import count_flops
from unigrpo_cli.replay import Batch, collate, replay

ROOT = Path(__file__).parents[1]
TINY = CASES["tiny"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The report of one run, and its Markdown."""
    directory = tmp_path_factory.mktemp("compare")
    files = ["--json", str(directory / "found.json"), "--markdown", str(directory / "found.md")]
    compare.main(["--size", "tiny", *files])
    return json.loads((directory / "found.json").read_text()), (directory / "found.md").read_text()


def test_every_row_and_table_is_there_and_true(finished: tuple[dict, str]) -> None:
    found, markdown = finished
    rows = {(r["part"], r["name"]): r for r in found["rows"]}
    missing = {(r["part"], r["name"]): r["reason"] for r in found["not_run"]}
    assert rows.keys() | missing.keys() == {(r.part, r.name) for r in compare.rows_of(TINY)}
    assert all(part == words.AGAINST and reason == words.INSTALL for (part, _), reason in missing.items())
    assert all(math.isfinite(r["value"]) and r["value"] >= 0 for r in rows.values())
    assert all(r["value"] > 0 for r in rows.values() if r["unit"] != report.RELATIVE)
    for part, name in rows:
        assert f"| {part} | {name} | " in markdown
    assert {"machine", "threads", "torch", "transformers", "diffusers", "commit", "date"} <= set(found["setting"])
    assert set(found["tables"]) == {step.OPERATORS, *map(growth.title, TINY.curves)}
    for curve, values in TINY.curves.items():
        lines = found["tables"][growth.title(curve)]
        assert [line[curve] for line in lines] == list(values)
        assert all(number > 0 for line in lines for number in line.values())


def test_shares_of_a_step_add_up(finished: tuple[dict, str]) -> None:
    found, _ = finished
    rows = {r["name"]: r["value"] for r in found["rows"] if r["part"] == step.STEP}
    phases = sum(rows[name] for name in step.CALLS)
    assert 0.7 * rows[step.WHOLE] < phases < 1.2 * rows[step.WHOLE]  # medians of their own
    operators = found["tables"][step.OPERATORS]
    shares = [line["share, %"] for line in operators]
    assert shares == sorted(shares, reverse=True)
    assert min(shares) > 100 * step.LEAST_SHARE
    assert sum(shares) < 101
    counted = sum(line["share, %"] for line in operators if line["model arithmetic"] == "yes")
    assert counted <= rows["model arithmetic"] < 100


def test_goals_are_the_ones_that_were_set() -> None:
    aims = {(row.name, str(row.goal)) for row in compare.rows_of(CASES["full"]) if row.goal}
    assert aims == {
        ("hidden", ">= 70"),
        ("times faster", ">= 3"),
        ("largest to smallest", "<= 0.5"),
        ("packed / a text pass, K image passes", "<= 0.82"),
        ("whole step, times faster", ">= 1.5"),
        ("update alone, times faster", ">= 1.5"),
    }
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.index("<!-- full on cpu -->") < page.index("<!-- end full on cpu -->")


# ----- ways that do not give the same are refused


@pytest.fixture
def bench() -> Comparison:
    return Comparison(TINY, Clock(CPU, 60), report.Report({}, compare.rows_of(TINY), None))


def test_a_baseline_that_paints_otherwise_is_refused(bench: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    own = plain.velocity
    monkeypatch.setattr(plain, "velocity", lambda *given: own(*given) * 1.001)
    with pytest.raises(AssertionError, match="latents differ"):
        sampling.measure_sampling(bench, sampling.LARGE)


def test_a_baseline_that_writes_otherwise_is_refused(bench: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    own = plain.uniform
    monkeypatch.setattr(plain, "uniform", lambda *given: 1 - own(*given))
    with pytest.raises(AssertionError, match="wrote other words"):
        sampling.measure_sampling(bench, sampling.LARGE)


def test_passes_that_add_up_to_another_gradient_are_refused(bench: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    own = plain.one_step
    monkeypatch.setattr(plain, "one_step", lambda batch, k: own(batch, 0))
    with pytest.raises(AssertionError, match="gradients differ"):
        passes.measure_replay(bench, passes.SMALL, 2, 24)


def test_a_loop_with_other_times_is_refused(bench: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    own = plain.FlowMatchEulerDiscreteScheduler
    monkeypatch.setattr(plain, "FlowMatchEulerDiscreteScheduler", lambda shift: own(shift=1.01 * shift))
    with pytest.raises(AssertionError, match="latents differ"):
        sampling.measure_denoising(bench)


# ----- arithmetic


def _episode_batch(context: int, copies: int) -> tuple[Any, Batch]:
    size = replace(TINY.small, pixels=128)
    policy = random_policy(size, CPU, torch.float32)
    for name, parameter in policy.network.named_parameters():
        parameter.requires_grad_(".layers." in name)
    return policy, collate([passes.drawn(policy, size, context, copies)])


@pytest.mark.parametrize(("text", "image"), [(True, True), (False, True), (True, False)])
def test_operations_of_a_pass_are_torchs_count(text: bool, image: bool) -> None:
    policy, batch = _episode_batch(60, 3)

    def forward_and_backward() -> None:
        scores = replay(policy, batch, text=text, image=image)
        pulls = [*([scores.log_prob_BL] if text else []), *scores.velocities]
        torch.stack([pull.sum() for pull in pulls]).sum().backward()

    scored = int(batch.actions.mask_BL.sum()) if text else 0
    counted = passes.operations(TINY.small.network, 60, 3 if image else 0, 64, scored)
    assert counted == pytest.approx(count_flops(forward_and_backward), rel=0.01)


def test_drawn_episodes_are_as_long_as_asked() -> None:
    _, batch = _episode_batch(60, 3)
    assert batch.chunks[0].length_B == [60]
    assert batch.actions.images[0].x_BKND.shape[1:3] == (3, 64)


def test_the_large_network_is_as_large_as_it_is_called() -> None:
    policy_weights = sum(math.prod(s) for s in compare_shapes(CASES["full"].large))
    assert policy_weights == pytest.approx(105e6, rel=0.03)


def compare_shapes(size: Any) -> list[tuple[int, ...]]:
    from unigrpo_cli.models.mot.config import network_shapes

    return list(network_shapes(size.network).values())


# ----- measuring


def test_variants_take_turns_and_the_first_of_each_is_not_counted() -> None:
    called: list[str] = []
    runs = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    times = Clock(CPU, 60).parallel_map(runs, share_s=60, most=3)
    assert "".join(called) == "ab" * 4
    assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3}
    called.clear()
    Clock(CPU, 60).parallel_map(runs, share_s=0, warm=True)
    assert "".join(called) == "ab"


def test_a_ratio_is_the_median_of_rounds() -> None:
    """The second round was disturbed, both variants alike; the third only in one of them."""
    times = {"slow": [3.0, 30.0, 3.0], "fast": [1.0, 10.0, 5.0]}
    assert ratio(times, "slow", "fast") == 3.0


def test_seconds_of_the_processor_leave_out_waiting() -> None:
    waiting = {p: Clock(CPU, 60, processor=p).once(lambda: time.sleep(0.05)) for p in (True, False)}
    assert waiting[True] < 0.03 <= 0.05 <= waiting[False]


def _event(name: str, parent: Any = None) -> Any:
    return SimpleNamespace(name=name, cpu_parent=parent)


def test_operators_belong_to_whoever_called_them() -> None:
    network = _event(step.NETWORK)
    back = _event("autograd::engine::evaluate_function: MmBackward0")
    update = _event("Optimizer.step#AdamW.step")
    assert step.place_of(_event("aten::mm", _event("aten::linear", network))) == step.NETWORK
    assert step.place_of(_event("aten::mm", back)) == step.BACKWARD
    assert step.place_of(_event("aten::add_", update)) == step.OPTIMIZER
    assert step.place_of(_event("aten::randn")) == step.REST
    assert step.is_arithmetic("aten::mm", step.BACKWARD)
    assert not step.is_arithmetic("aten::copy_", step.NETWORK)
    assert not step.is_arithmetic("aten::mul", step.OPTIMIZER)


def test_only_a_difference_may_be_nothing() -> None:
    rows = [report.Row("p", "seconds", "s"), report.Row("p", "apart", report.RELATIVE)]
    found = report.Report({}, rows, None)
    found.add("p", "apart", 0.0)
    with pytest.raises(ValueError, match="measured 0"):
        found.add("p", "seconds", 0.0)
    found.add_line("a curve", {"G": 4, "s": 0.123456, "fast": "yes"})
    assert "| G | s | fast |\n|---|---|---|\n| 4 | 0.123 | yes |" in found.markdown()
