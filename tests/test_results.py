"""The published results: the page comes from its files, intervals are right, commands are valid and rerun."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.commands import unigrpo
from tools.results import (
    RESULTS,
    Cell,
    Claim,
    Table,
    _judged,
    _values,
    _written,
    collect,
    figure_of,
    goal,
    interval,
    page,
    read,
    tables,
    verdict,
)
from unigrpo_cli.config import load_config
from unigrpo_cli.evaluate import load_report

TABLES = [table for table in tables() if table.path.is_file()]


def _cell(values_SP: np.ndarray) -> Cell:
    return Cell([{"seed": str(k)} for k in range(len(values_SP))], values_SP.astype(float))


def test_the_page_is_made_from_the_files() -> None:
    assert (RESULTS / "README.md").read_text() == page(), "run `python -m tools.results`"


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_every_cell_has_valid_settings_and_every_claim_its_cells(table: Table) -> None:
    for cell in table.cells:
        load_config(preset="embedded", overrides=table.texts(cell))
    assert {name for claim in table.claims for name in claim.above} <= set(table.cells)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_row_is_a_run_and_its_values_have_its_score(table: Table) -> None:
    for name, cell in read(table).items():
        train = load_config(preset="embedded", overrides=table.texts(name)).train
        samples = str(train.steps * train.prompts_per_step * train.group_size)
        assert {row["samples"] for row in cell.rows} == {samples}, name
        assert len({row["seed"] for row in cell.rows}) == len(cell.rows), name
        assert {row["seed"] for row in cell.rows} <= set(map(str, table.seeds)), name
        for row, own in zip(cell.rows, cell.values_SP, strict=True):
            before, after = (float(row[f"{when}/{table.judged}"]) for when in ("before", "after"))
            mean, low, high = map(float, row["rise"].split(":"))
            assert own.mean() == pytest.approx(after, abs=6e-4), (name, row["seed"])
            assert mean == pytest.approx(after - before, abs=2e-4), (name, row["seed"])
            assert low <= mean <= high, (name, row["seed"])


def test_the_interval_of_equal_seeds_is_that_of_their_prompts() -> None:
    """400 prompts, half right, the same in each of three seeds: 1.96 * 0.5 / 20 = 0.049 either side."""
    mean, low, high = interval(_cell(np.tile([0, 1], (3, 200))))
    assert (mean, low, high) == pytest.approx((0.5, 0.451, 0.549), abs=0.006)


def test_the_interval_of_seeds_that_differ_is_wider() -> None:
    """Every prompt agrees within a seed: the mean is that of five coins, deviation .49 / 5 ** .5 = .22."""
    mean, low, high = interval(_cell(np.repeat([[0], [0], [1], [1], [1]], 100, axis=1)))
    assert mean == pytest.approx(0.6)
    assert low == pytest.approx(0.2, abs=0.01)
    assert high == pytest.approx(1.0, abs=0.01)


def test_differences_are_paired_by_prompt() -> None:
    """The second cell is right where the first is, and on forty prompts more: the spread of prompts cancels."""
    first = np.tile([0, 1], (3, 200))
    second = first.copy()
    second[:, :80:2] = 1
    mean, low, high = interval(_cell(second), _cell(first))
    assert mean == pytest.approx(0.1)
    assert high - low == pytest.approx(2 * 1.96 * (0.1 * 0.9 / 400) ** 0.5, abs=0.01)
    assert [verdict(low, high), verdict(-0.2, -0.1), verdict(-0.1, 0.1)] == ["holds", "does not hold", "cannot be told"]


def test_the_goal_is_reached_at_the_first_score_of_1_4_times_the_start() -> None:
    row = {"before/geneval": "0.5", "curve": "1:2.0:0.6900 2:4.1:0.7000 3:6.0:0.9000"}
    assert goal(row, "geneval") == ("2", "4.1")
    assert goal(row | {"before/geneval": "0.7"}, "geneval") == ("never", "never")


def test_a_claim_on_a_mean_holds_when_each_seed_is_above_each() -> None:
    cells = {
        name: Cell([{"seed": str(k), "after/clean": v} for k, v in enumerate(values)], np.zeros((len(values), 1)))
        for name, values in (
            ("a", ("0.93", "0.94", "0.95")),
            ("b", ("0.90", "0.91", "0.92")),
            ("c", ("0.91", "0.93", "0.94")),
        )
    }
    cells |= {"few": Cell(cells["a"].rows[:1], cells["a"].values_SP)}
    found = {pair: _judged(Claim("", (pair[0], pair[1:]), "clean"), cells)[0] for pair in ("ab", "ba", "ac", "afew")}
    assert found == {"ab": "holds", "ba": "does not hold", "ac": "cannot be told", "afew": "fewer than 3 seeds"}


def test_claims_are_judged_over_the_seeds_that_both_cells_have() -> None:
    """A fourth seed of the first cell, with every prompt wrong, does not count."""
    right = np.repeat([[1], [1], [1], [0]], 50, axis=1)
    cells = {"a": _cell(right), "b": _cell(np.zeros((3, 50)))}
    assert _judged(Claim("", ("a", "b")), cells) == ("holds", "+1.000 [+1.000, +1.000], 3 seeds")


def test_paired_seeds_cancel() -> None:
    """Seeds differ in every prompt, and both cells alike: paired there is no spread, else that of both."""
    cell = _cell(np.repeat([[0], [0], [1], [1]], 50, axis=1))
    assert interval(cell, cell, paired=True) == (0.0, 0.0, 0.0)
    _, low, high = interval(cell, cell)
    assert high - low > 1


@pytest.mark.parametrize("text", ["0110", "0.500", "0.500 1.000"])
def test_values_are_read_as_they_are_written(text: str) -> None:
    assert _written(_values(text)) == text


def test_every_file_of_data_has_its_table() -> None:
    assert {path.stem for path in RESULTS.glob("*.csv")} <= {table.name for table in tables()}


def test_commands_survive_a_shell() -> None:
    for table in tables():
        for cell in table.cells:
            words = shlex.split(table.command(cell))
            assert [b for a, b in pairwise(words) if a == "--set"] == table.texts(cell)


@pytest.mark.parametrize("table", [table for table in TABLES if table.figure], ids=lambda table: table.name)
def test_a_figure_has_a_line_per_run_that_ends_at_its_score(table: Table) -> None:
    (axes,) = figure_of(table).axes
    rows = [row for cell in read(table).values() for row in cell.rows]
    ends = [line.get_ydata()[-1] for line in axes.lines]
    assert ends == pytest.approx([float(row[f"after/{table.judged}"]) for row in rows], abs=1e-4)


def test_collected_rows_are_those_of_the_runs(tmp_path: Path) -> None:
    """Two one-step runs by the sweep that is printed, collected and read back."""
    table = replace(tables()[0], name="short", seeds=[0, 1], cells={"joint": []})
    settings = ["train.steps=1", "train.prompts_per_step=1", "train.group_size=2", "train.minibatches=1"]
    settings += ["eval.limit=2", "eval.every=1", "doctor.at_start=off", "threads=1"]
    table = replace(table, settings=settings)
    command = shlex.split(table.command("joint").replace("--out runs", f"--out {tmp_path}"))
    assert unigrpo(*command[1:]).exit_code == 0
    (tmp_path / "short.csv").write_text(collect(table, tmp_path, "abc"))
    cell = read(table, tmp_path / "short.csv")["joint"]
    assert [row["seed"] for row in cell.rows] == ["0", "1"]
    assert {(row["steps"], row["samples"]) for row in cell.rows} == {("1", "2")}
    for row in cell.rows:
        step, seconds, score = row["curve"].split(":")
        assert (step, score) == ("1", row["after/geneval"])
        assert 0 < float(seconds) <= float(row["train_seconds"])
    for row, own in zip(cell.rows, cell.values_SP, strict=True):
        run = next((tmp_path / "short" / "joint").glob(f"*seed={row['seed']}*"))
        assert own.tolist() == load_report(run / "eval_after.json").values["geneval"].tolist()


def _files_of(commit: str, folder: Path) -> Path:
    """The files of a commit in a folder, with its plugins as they are installed."""
    if not folder.exists():
        folder.mkdir()
        archive = subprocess.run(["git", "archive", commit], check=True, capture_output=True, cwd=RESULTS.parent)
        subprocess.run(["tar", "-x", "-C", folder], check=True, input=archive.stdout)
        (folder / "unigrpo_plugins").symlink_to("plugins")
    return folder


def test_rows_of_a_table_have_one_toy_model() -> None:
    def model(commit: str) -> str:
        weights = f"{commit}:unigrpo_cli/toy/weights/model/ema.safetensors"
        found = subprocess.run(["git", "rev-parse", weights], capture_output=True, text=True, cwd=RESULTS)
        if found.returncode:
            pytest.skip(f"{commit} is not in this clone")
        return found.stdout

    for table in TABLES:
        commits = {row["commit"] for cell in read(table).values() for row in cell.rows}
        assert len({model(commit) for commit in commits}) == 1, table.name


@pytest.mark.long
def test_three_runs_picked_at_random_score_the_same_again(tmp_path: Path) -> None:
    """With the code of their commits, to the digit with the same torch; another one rounds differently, so there within
    what seeds differ by.
    """
    rows = [(table, row) for table in TABLES for cell in read(table).values() for row in cell.rows]
    for table, row in random.sample(rows, 3):
        one = replace(table, seeds=[int(row["seed"])])
        for command in (*(table.before if "model=" in one.command(row["cell"]) else ()), one.command(row["cell"])):
            words = shlex.split(command.replace("runs/", f"{tmp_path}/"))
            code = _files_of(row["commit"], tmp_path / row["commit"])
            run = [sys.executable, "-m", "unigrpo_cli", *words[1:]]
            subprocess.run(run, check=True, capture_output=True, cwd=code, env=os.environ | {"PYTHONPATH": str(code)})
        (tmp_path / "again.csv").write_text(collect(one, tmp_path, "abc"))
        (again,) = read(one, tmp_path / "again.csv")[row["cell"]].rows
        found, before = (float(r[f"after/{table.judged}"]) for r in (again, row))
        assert found == pytest.approx(before, abs=1e-4 if again["torch"] == row["torch"] else 0.08)
