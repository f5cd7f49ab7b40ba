"""`unigrpo report` without a browser: what is read, what is in the page, what is served and exported."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import pytest
from commands import unigrpo
from made_run import DENOMINATOR, GROUPS, HOSTILE, LENGTH, MEMBERS, made_run, made_trace
from matplotlib.figure import Figure
from PIL import Image

from unigrpo_cli.errors import UsageError
from unigrpo_cli.report.build import spread_out, write_report
from unigrpo_cli.report.curves import _draw
from unigrpo_cli.report.page import block, document
from unigrpo_cli.report.pictures import packed_map
from unigrpo_cli.report.runs import MOST_POINTS, read_curves, read_runs
from unigrpo_cli.report.serve import ReportServer
from unigrpo_cli.report.steps import decided

ROOT = Path(__file__).parents[1]


def _lines(path: Path, rows: list[dict], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


# ----- what is read


def test_curves_hold_every_metric_at_its_step(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "time": 10.0, "loss": 0.5, "warnings": []},
        {"step": 2, "time": 13.0, "loss": None, "warnings": ["entropy text"]},
        {"step": 2, "time": 14.0, "eval/geneval": 0.25},
        {"step": 3, "time": 19.0, "loss": 0.25, "warnings": ["entropy text"], "skipped": "a NaN"},
        {"step": 4, "time": 20.0, "loss": 0.125, "warnings": []},
    ]
    path = _lines(tmp_path / "metrics.jsonl", rows, end='\n{"step": 5, "lo')  # the run still writes
    curves = read_curves(path)
    assert curves.steps == (1, 2, 3, 4)
    assert curves.values == {"loss": (0.5, None, 0.25, 0.125), "eval/geneval": (None, 0.25, None, None)}
    assert curves.times == (0.0, 4.0, 9.0, 10.0)
    assert [(w.text, w.first, w.last) for w in curves.warnings] == [("entropy text", 2, 3)]
    assert curves.skipped == ((3, "a NaN"),)


def test_long_curves_are_thinned_evenly_and_keep_their_end(tmp_path: Path) -> None:
    steps = 2 * MOST_POINTS + 1
    rows = [{"step": s, "loss": s} for s in range(1, steps + 1)]
    rows.append({"step": 6, "eval/geneval": 0.5})
    curves = read_curves(_lines(tmp_path / "metrics.jsonl", rows))
    assert curves.stride == 3
    assert curves.steps[-1] == steps
    assert 6 in curves.steps  # an evaluation, which few steps have, always stays
    assert len(curves.steps) <= MOST_POINTS


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UsageError, match="line 2.*--resume"):
        read_curves(path)


@pytest.mark.parametrize(
    ("first", "second", "most_points", "lines", "shared"),
    [(4000, 3999, MOST_POINTS, 1, 1999), (4001, 3999, MOST_POINTS, 1, 666), (1, 0, MOST_POINTS, 1, 0), (3, 7, 1, 2, 0)],
)
def test_seeds_of_other_lengths_share_steps(
    tmp_path: Path, first: int, second: int, most_points: int, lines: int, shared: int
) -> None:
    members = []
    for seed, steps in enumerate((first, second)):
        run = made_run(tmp_path / str(seed), seed=seed, traced=(), steps=1)
        rows = [{"step": s, "reward/clip": s} for s in range(1, steps + 1)] or [{"step": 1, "reward/clip": 0}]
        curves = read_curves(_lines(run / "metrics.jsonl", rows), most_points)
        members.append(replace(read_runs([run])[0], curves=curves))
    steps = [set(run.curves.steps) for run in members]
    assert len(steps[0] & steps[1]) >= shared
    axes = Figure().add_subplot()
    _draw(axes, members, "reward/clip", "#000000")
    curves_drawn = [line for line in axes.lines if len(line.get_xdata()) and line.get_label()[0] != "_"]
    assert len(curves_drawn) == lines, "a line and a band, or a line for each seed"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.toml", "[train]\nsteps = '5'\n"),
        ("config.toml", "[train]\nlr_text = nan\n"),
        ("config.toml", "[train]\nlr_text = [1.0, inf]\n"),
        ("config.toml", "model = 1979-05-27\n"),
        ("metrics.jsonl", '{"step": 1, "warnings": 3}\n'),
        ("metrics.jsonl", '{"step": 1, "warnings": [["x"]]}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": 1%s}\n' % ("0" * 400)),
        ("metrics.jsonl", '{"step": 1%s}\n' % ("0" * 400)),
        ("metrics.jsonl", '{"step": "1"}\n'),
        ("metrics.jsonl", "[]\n"),
        ("eval_after.json", '{"scores": {"r": {"mean": 1, "ci95": [0, 1]}}}'),
        ("eval_after.json", '{"n": 3, "scores": {"r": {"mean": 1, "ci95": null}}}'),
        ("eval_after.json", '{"n": 3, "scores": {"r": 0.5}}'),
        ("eval_after.json", '{"n": 3, "scores": {"r": {"mean": "1", "ci95": [0, 1]}}}'),
        ("eval_after.json", "[]"),
        ("summary.json", '{"difference": {"r": 3}}'),
        ("eval.json", '{"n": 3, "scores": {"r": {"mean": 1, "ci95": [0, 1]}}, "compare": ["x"]}'),
        ("eval.json", '{"n": 3, "scores": {"r": {"mean": 1, "ci95": [0, 1%s]}}}' % ("0" * 400)),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    (made_run(tmp_path / "run", traced=()) / file).write_text(content)
    with pytest.raises(UsageError, match=file):
        write_report(read_runs([tmp_path / "run"]), tmp_path / "r.html")


def test_seeds_of_one_setting_belong_together(tmp_path: Path) -> None:
    """What changes no result, and the seed, do not split; a learning rate does."""
    for name, seed, own in (("a", 0, ()), ("b", 1, ("device=cpu",)), ("c", 0, ("train.lr_text=5e-4",))):
        made_run(tmp_path / name, seed=seed, settings=own, traced=())
    a, b, c = read_runs([tmp_path])  # a directory of runs stands for them
    assert (a.name, b.name, c.name) == ("a", "b", "c")
    assert a.same_setting == b.same_setting != c.same_setting


def test_a_setting_that_is_newer_than_a_run_has_its_default_there(tmp_path: Path) -> None:
    """Equal to a run that sets the default, unequal to one that sets another value."""
    for name, own in (("a", ()), ("b", ("train.lr_decay=0",)), ("c", ("train.lr_decay=7",))):
        made_run(tmp_path / name, settings=own, traced=())
    file = tmp_path / "a" / "config.toml"
    file.write_text(re.sub(r"lr_decay = .*\n", "", file.read_text()))
    a, b, c = read_runs([tmp_path])
    assert a.same_setting == b.same_setting != c.same_setting


def test_names_of_runs_are_different(tmp_path: Path) -> None:
    paths = [made_run(tmp_path / folder / "run", traced=()) for folder in ("x", "y")]
    assert [run.name for run in read_runs([*paths, paths[0]])] == ["x/run", "y/run"]


def test_evaluations_are_read_with_all_comparisons(tmp_path: Path) -> None:
    score = {"geneval": {"mean": 0.5, "ci95": [0.4, 0.6], "task_mean": 0.5, "n": 9}}
    difference = {"geneval": {"mean": 0.1, "ci95": [0.0, 0.2]}}
    compare = [{"model": name, "scores": score, "n": 9, "difference": difference} for name in ("second", "third")]
    report = {"model": "first", "scores": score, "n": 9, "compare": compare}
    (tmp_path / "eval.json").write_text(json.dumps(report))
    (run,) = read_runs([tmp_path])
    assert [(s.label, s.against) for s in run.scores] == [("first", None), ("second", "first"), ("third", "first")]
    assert run.scores[2].difference == difference


@pytest.mark.parametrize("given", ["nothing", "empty", "file"])
def test_what_is_no_run_is_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    done = unigrpo("report", tmp_path / given, "--out", tmp_path / "r.html")
    assert done.exit_code == 2
    assert given in done.output
    assert not (tmp_path / "r.html").exists()


# ----- what is computed


@pytest.mark.parametrize(
    ("rewards", "weights", "advantages", "shares"),
    [
        # advantages are the scaled sum: shares of the variance. clip varies by 2, geneval by 1, both alike
        ([(0, 0), (2, 1)], (1, 1), [-1, 1], (2 / 3, 1 / 3)),
        ([(0, 0), (2, 1)], (1, 2), [-1, 1], (1 / 2, 1 / 2)),
        ([(0, 1), (2, 0)], (1, 1), [-1, 1], (2, -1)),  # the second works against
        ([(0, 5), (1, 5)], (1, 1), [-1, 1], (1, 0)),  # a constant decides nothing
        # each reward divided by its own deviation: 100 times the scale is no more influence
        ([(0, 0), (100, 0), (0, 1), (100, 1)], (1, 1), [-2, 0, 0, 2], (1 / 2, 1 / 2)),
    ],
)
def test_shares_of_the_rewards(rewards: list, weights: tuple, advantages: list, shares: tuple) -> None:
    rows = [dict(zip(("clip", "geneval"), own, strict=True)) for own in rewards]
    found = decided(rows, dict(zip(("clip", "geneval"), weights, strict=True)), advantages)
    assert tuple(found.values()) == pytest.approx(shares, abs=1e-6)


def test_a_group_without_spread_is_decided_by_nothing() -> None:
    assert decided([{"clip": 1.0}, {"clip": 1.0}], {"clip": 1.0}, [0.0, 0.0]) == {}
    assert decided([{"clip": 1.0}, {"clip": None}], {"clip": 1.0}, [0.5, None]) == {}


def test_maps_are_exact_to_half_a_level() -> None:
    values = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32) * 1e-7
    packed = packed_map(values)
    levels = np.frombuffer(base64.b64decode(str(packed["levels"])), "<i2").reshape(3, 16)
    assert np.abs(levels * float(packed["scale"]) - values).max() <= 0.5001 * float(packed["scale"])  # type: ignore[arg-type]
    assert packed_map(np.array([np.nan, 0.0], np.float32))["scale"] == 0.0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_every_beginning_of_the_order_is_spread_over_the_run(count: int) -> None:
    order = spread_out(range(count))
    assert sorted(order) == list(range(count))
    for kept in range(2, count + 1):
        gaps = np.diff(sorted(order[:kept]))
        assert gaps.max() <= 4 * (count - 1) / (kept - 1) or gaps.max() == 1


# ----- the page


def test_no_text_ends_its_element() -> None:
    text = block("data-x", {"prompt": HOSTILE})
    assert text.count("<") == 2  # those of the element itself
    assert json.loads(text[text.index(">") + 1 : text.rindex("<")]) == {"prompt": HOSTILE}


def test_the_policy_allows_these_programs_and_no_network() -> None:
    page = "".join(document("title <b>", [block("data-runs", {})]))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    programs = re.findall(r"<script(?: type=\"text/plain\" data-later)?>(.*?)</script>", page, re.DOTALL)
    assert len(programs) == 9
    assert {base64.b64encode(hashlib.sha256(p.encode()).digest()).decode() for p in programs} == allowed
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    assert "<title>title &lt;b&gt;</title>" in page


def test_our_programs_never_make_markup_of_text() -> None:
    for path in (ROOT / "unigrpo_cli" / "report" / "page").iterdir():
        banned = re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|https?://(?!www\.w3)",
            path.read_text(),
        )
        assert not banned, path.name


def test_traces_are_thinned_to_the_size_with_a_word_about_it(tmp_path: Path) -> None:
    runs = read_runs([made_run(tmp_path / "run", traced=tuple(range(1, 7)))])
    whole = write_report(runs, tmp_path / "whole.html")
    assert whole.notes == ()
    assert whole.size == (tmp_path / "whole.html").stat().st_size
    (one,) = re.findall(r'id="data-step-0-1">.*', (tmp_path / "whole.html").read_text())
    limit = whole.size - 2 * len(one)
    small = write_report(runs, tmp_path / "small.html", largest=limit)
    assert small.size <= limit
    (note,) = small.notes
    assert re.search(r"of 6 steps of run .*--serve", note)
    kept = re.findall(r'id="data-step-0-(\d+)"', (tmp_path / "small.html").read_text())
    assert {"1", "6"} <= set(kept)
    assert len(kept) < 6


def test_the_command_writes_the_page_and_the_curves(tmp_path: Path) -> None:
    paths = [made_run(tmp_path / name, seed=k) for k, name in enumerate("ab")]
    done = unigrpo("report", *paths, "--out", tmp_path / "out" / "r.html", "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["bytes"] == (tmp_path / "out" / "r.html").stat().st_size
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("L").resize((64, 64)).getdata())) > 10  # something is drawn


# ----- served


@pytest.fixture
def server(tmp_path: Path):
    own = ReportServer([made_run(tmp_path / "run", steps=3, traced=(1,))])
    thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield own
    own.stop()
    thread.join()
    own.server_close()


def _get(server: ReportServer, path: str, **headers: str) -> bytes:
    with urlopen(Request(server.url + path, headers=headers), timeout=20) as answer:
        return answer.read()


def test_a_served_page_follows_the_run(server: ReportServer, tmp_path: Path) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert b"connect-src 'self'" in _get(server, "")
    (run,) = json.loads(_get(server, "runs.json"))["runs"]
    assert (run["curves"]["steps"], run["traced"]) == ([1, 2, 3], [1])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n')
    (run,) = json.loads(_get(server, "runs.json"))["runs"]
    assert run["curves"]["steps"] == [1, 2, 3, 4]
    assert json.loads(_get(server, "step.json?run=run&step=1"))["step"] == 1


def test_a_served_page_names_what_it_cannot_read_and_finds_new_runs(tmp_path: Path, server: ReportServer) -> None:
    assert b"connect-src" in _get(server, "", Host="localhost"), "a name without a port"
    server.paths = [tmp_path]
    made_run(tmp_path / "жук", steps=2, traced=(2,))
    found = json.loads(_get(server, "runs.json"))["runs"]
    assert [run["name"] for run in found] == ["run", "жук"]
    assert json.loads(_get(server, f"step.json?run={quote('жук')}&step=2"))["step"] == 2
    (tmp_path / "жук" / "config.toml").write_text("[train]\nsteps = '5'\n")
    with pytest.raises(HTTPError) as refused:
        _get(server, "runs.json")
    assert refused.value.code == 500
    assert "жук/config.toml" in refused.value.read().decode()


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("step.json?run=run&step=2", {}, 404),
        ("step.json?run=9&step=1", {}, 404),
        ("step.json?run=-1&step=1", {}, 404),
        ("step.json?run=0&step=1", {}, 404),
        ("step.json?run=..%2F..&step=1", {}, 404),
        ("config.toml", {}, 404),
        ("", {"Host": "evil.example"}, 403),
    ],
)
def test_only_the_report_is_served_and_only_to_this_machine(
    server: ReportServer, path: str, headers: dict[str, str], code: int
) -> None:
    with pytest.raises(HTTPError) as refused:
        _get(server, path, **headers)
    assert refused.value.code == code


# ----- UNIPO


def test_unipo_reads_the_export(tmp_path: Path) -> None:
    """The facts of its schema: a header with the algorithm, entries by step, tokens as lists of equal length."""
    run = made_run(tmp_path / "run")
    done = unigrpo("report", run, "--export", "unipo", tmp_path / "data", "--json")
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "data" / "run.jsonl").read_text().splitlines()
    header, *entries = map(json.loads, lines)
    assert header["type"] == "header"
    assert header["algorithm"] == "grpo"
    assert header["totalSteps"] == len(entries) == 6
    assert {"task", "dataset", "reward_strategy", "model_name", "reference_model_name", "hparams"} <= header.keys()
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert all(entry["is_first_step_after_rollout_phase"] is True for entry in entries)
    assert all({"policy_objective", "reward"} <= entry["metrics"].keys() for entry in entries)
    assert [entry["step"] for entry in entries if "prompts" in entry] == [1, 3, 6]
    first = entries[0]
    assert first["metrics"]["reward"] == pytest.approx(first["metrics"]["reward/clip"] + 0.4)
    assert len(first["prompts"]) == GROUPS
    assert first["prompts"][1]["prompt"] == HOSTILE
    responses = first["prompts"][0]["responses"]
    assert len(responses) == MEMBERS
    trace = made_trace(1).groups[0].episodes[2].segments[1]
    tokens = responses[2]["tokens"]
    assert {len(column) for column in tokens.values()} == {LENGTH}
    assert tokens["strings"] == ["a", " star", " <b>", " b2", ""]
    assert np.subtract(tokens["log_probs"], tokens["old_log_probs"]) == pytest.approx(trace.log_ratio_L, abs=1e-5)
    assert tokens["token_objective"] == pytest.approx(list(-trace.loss_L * DENOMINATOR), rel=1e-5)
    assert responses[2]["response_length"] == LENGTH


def test_unipo_gets_every_step_of_a_long_run_and_no_reward_that_was_not_given(tmp_path: Path) -> None:
    steps = 2 * MOST_POINTS + 1
    run = made_run(tmp_path / "run", steps=3, traced=(1, 2, 3))
    rows = [{"step": s, "reward/clip": 0.5, "reward/geneval": 0.1, "text/loss": 0.0} for s in range(1, steps + 1)]
    rows[1]["reward/clip"] = None
    rows.append({"step": steps + 1, "eval/geneval": 0.5})
    _lines(run / "metrics.jsonl", rows)
    done = unigrpo("report", run, "--export", "unipo", tmp_path / "data")
    assert done.exit_code == 0, done.output
    assert "1 steps are left out" in " ".join(done.output.split())
    header, *entries = map(json.loads, (tmp_path / "data" / "run.jsonl").read_text().splitlines())
    assert header["totalSteps"] == len(entries) == steps - 1
    assert [entry["step"] for entry in entries if "prompts" in entry] == [1, 3]
    assert {entry["metrics"]["reward"] for entry in entries} == {0.6}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--serve", "--out", "r.html"], "--out writes files"),
        (["--serve", "--export", "unipo", "data"], "--export writes files"),
        (["--port", "0"], "add --serve"),
    ],
)
def test_options_that_exclude_each_other(tmp_path: Path, options: list[str], said: str) -> None:
    done = unigrpo("report", made_run(tmp_path / "run", traced=()), *options)
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize(("viewer", "runs", "said"), [("unipo2", 1, "unipo"), ("unipo", 2, "one run, not 2")])
def test_an_export_that_cannot_be(tmp_path: Path, viewer: str, runs: int, said: str) -> None:
    paths = [made_run(tmp_path / str(k), traced=()) for k in range(runs)]
    done = unigrpo("report", *paths, "--export", viewer, tmp_path / "data")
    assert done.exit_code == 2
    assert said in done.output
