"""The benchmark runs, says what it did not do, and counts as torch counts."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from benchmarks import bagel, parts, report
from benchmarks.shapes import SIZES
from unigrpo_cli.models.mot.config import network_shapes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _each_once() -> Iterator[None]:
    """No repeated measurements, however long one takes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bagel, "SHARES", 1e9)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, str]:
    """The report of one run, its Markdown, and what it printed."""
    directory = tmp_path_factory.mktemp("benchmark")
    options = ["--size", "tiny", "--device", "cpu", "--budget-s", "600"]
    files = ["--json", str(directory / "found.json"), "--markdown", str(directory / "found.md")]
    with redirect_stdout(io.StringIO()) as printed:
        bagel.main([*options, *files])
    return json.loads((directory / "found.json").read_text()), (directory / "found.md").read_text(), printed.getvalue()


def test_every_row_is_there_and_is_a_true_number(finished: tuple[dict, str, str]) -> None:
    found, _, _ = finished
    rows = {(r["part"], r["name"]): r["value"] for r in found["rows"]}
    assert list(rows) == [(r.part, r.name) for r in parts.rows_of(SIZES["tiny"], goals=False)]
    assert found["not_run"] == []
    assert all(math.isfinite(value) and value > 0 for value in rows.values())
    lengths = {value for (_, name), value in rows.items() if name == "thinking length"}
    assert lengths == {SIZES["tiny"].thinking}
    for group in SIZES["tiny"].groups:
        part = parts.rollout_part(group)
        stages = sum(rows[part, name] for name in ("prefill", "thinking", "denoising", "decode"))
        assert 0.5 * rows[part, "rollout"] < stages <= rows[part, "rollout"]


def test_rows_are_printed_and_written(finished: tuple[dict, str, str]) -> None:
    found, markdown, printed = finished
    for r in found["rows"]:
        assert f"| {r['part']} | {r['name']} | " in markdown
        assert f"| {r['part']} | {r['name']} | " in printed
    assert {"torch", "commit", "date", "machine", "card", "dtype"} <= set(found["setting"])


def test_what_finds_no_time_is_named(tmp_path: Path) -> None:
    arguments = ["--size", "tiny", "--device", "cpu", "--budget-s", "0"]
    bagel.main([*arguments, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [r["part"] for r in found["rows"]] == ["network"]
    assert len(found["not_run"]) == len(parts.rows_of(SIZES["tiny"], goals=False)) - 1
    reasons = {r["reason"] for r in found["not_run"]}
    assert all("no time" in reason or "needs" in reason for reason in reasons), reasons


def test_what_does_not_fit_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    own = parts.watched_rollout

    def large_groups_do_not_fit(bench: parts.Benchmark, group: int, config: parts.Config) -> parts.Rolled:
        if group == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
        return own(bench, group, config)

    monkeypatch.setattr(parts, "watched_rollout", large_groups_do_not_fit)
    found = bagel.main(["--size", "tiny", "--device", "cpu", "--budget-s", "600"]).json()
    missing = {r["part"]: r["reason"] for r in found["not_run"]}
    assert missing.pop("rollout, group of 4") == "did not fit: needs 2.5 GiB"
    assert list(missing) == ["in all"]
    assert "update, micro-batch 2" in {r["part"] for r in found["rows"]}


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("an error of ours")

    monkeypatch.setattr(parts, "measure_denoise", broken)
    with pytest.raises(RuntimeError, match="an error of ours"):
        bagel.main(["--size", "tiny", "--device", "cpu", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [r["part"] for r in found["rows"]] == ["network"] + ["ceilings"] * 2
    assert {r["reason"] for r in found["not_run"]} == {report.NOT_REACHED}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_runs_on_a_card() -> None:
    found = bagel.main(["--size", "tiny", "--device", "cuda", "--budget-s", "120"]).json()
    assert found["not_run"] == []


def test_sizes_are_what_they_are_called() -> None:
    def count(name: str) -> int:
        return sum(math.prod(shape) for shape in network_shapes(SIZES[name].network).values())

    assert count("7b") == pytest.approx(14.2e9, rel=0.01)  # both experts, without the vision tower
    assert count("100m") == pytest.approx(100e6, rel=0.05)
    assert SIZES["7b"].image_tokens == 1024


def test_the_page_has_room_for_the_table_and_names_the_goals() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.index("<!-- 7b on cuda -->") < page.index("<!-- end 7b on cuda -->")
    aims = {(r.name, str(r.goal)) for r in parts.rows_of(SIZES["7b"], goals=True) if r.goal}
    expected = {
        "rollout": "<= 3",
        "rollout and update": "<= 4",
        "utilisation": ">= 45",
        "peak memory update": "<= 55.9",
    }
    assert aims == set(expected.items())
    assert all(goal.split()[1] in page for goal in expected.values())


def test_a_table_is_replaced_where_it_stands(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("before\n\n<!-- here -->\nold\n<!-- end here -->\n\nafter\n")
    report.put_into(document, "here", "new")
    assert document.read_text() == "before\n\n<!-- here -->\nnew\n<!-- end here -->\n\nafter\n"
    report.put_into(document, "there", "more")
    assert document.read_text().endswith("after\n\n## there\n\n<!-- there -->\nmore\n<!-- end there -->\n")
