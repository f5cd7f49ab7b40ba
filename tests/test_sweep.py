"""A sweep: its product, names and tables; killed and resumed it ends as one that nobody disturbed."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import statistics
from pathlib import Path

import pytest

from tests.chaos import REWARD, SETTINGS, differences, write_inputs
from tests.commands import Process, command_line, unigrpo
from tools.toy_model import build_model
from unigrpo_cli.config import Config, load_config, to_toml
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.atomic import locked
from unigrpo_cli.run.sweep import CLAIMS, cells_of, row_of, runs_of, sweep_directory

KILLER = """
    import os, signal
    left = os.environ.get("TEST_KILL_AFTER")
    if left is not None and split == "train":
        os.environ["TEST_KILL_AFTER"] = left = str(int(left) - 1)
        if left == "0":
            os.kill(os.getpid(), signal.SIGKILL)
"""
"""A reward that kills its process at its n-th scoring of a rollout."""
TINY = (
    *("train.steps=2", "train.checkpoint_every=1", "train.samples_every=0", "eval.every=0", "eval.best="),
    *("sampling.steps=3", "sampling.window_range=[0,2]", "sampling.window_size=1", "doctor.at_start=off"),
)
SEEDS = 5 if os.environ.get("UNIGRPO_LONG_TESTS") else 1
VARY = ["--vary", "train.lr_image=1e-3", "--vary", "train.lr_image=1e-4"]
VARY += ["--seeds", ",".join(map(str, range(SEEDS)))]


def _configured(more: list[str], seed: int | None) -> Config:
    return load_config(overrides=more, named={"seed": seed})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts, a reward, and the settings of a sweep as a TOML file."""
    place = tmp_path_factory.mktemp("sweep")
    head, body = REWARD.split("def moody(pixels):\n")
    write_inputs(place, f"{head}def moody(pixels, split):\n{KILLER}{body}")
    build_model(seed=0, width=32, layers=2).save(place / "model", "")
    given = (f"model={place / 'model'}", f"prompts={place / 'prompts.txt'}", f"eval.suite={place / 'prompts.txt'}")
    config = load_config(overrides=[*SETTINGS, *TINY, *given, 'reward.names=["moody"]'])
    (place / "settings.toml").write_text(to_toml(config))
    return place


def _sweep(place: Path, out: Path) -> list[str]:
    return ["sweep", str(place / "settings.toml"), "--plugin", str(place / "moody.py"), "--out", str(out)]


def test_keys_make_the_product_and_repeated_keys_the_values() -> None:
    vary = ["train.lr_image=1e-4", "train.lr_image=2e-4", "sampling.window_range=[0, 4]", "sampling.steps=9"]
    runs = runs_of(vary, [3, 4], _configured)
    assert [run.name for run in runs] == [
        f"lr_image={rate}_window_range=0-4_steps=9_seed={seed}" for rate in (0.0001, 0.0002) for seed in (3, 4)
    ]
    assert [run.cell for run in runs[:2]] == ["lr_image=0.0001_window_range=0-4_steps=9"] * 2
    assert [(r.config.train.lr_image, r.config.seed) for r in runs] == [(1e-4, 3), (1e-4, 4), (2e-4, 3), (2e-4, 4)]
    assert all(r.config.sampling.window_range == (0, 4) for r in runs)
    both = runs_of(["sampling.steps=9", "eval.steps=8"], [], _configured)
    assert both[0].name == "sampling.steps=9_eval.steps=8_seed=0", "equal last parts are written in full"
    assert runs_of([], [7], _configured)[0].name == "seed=7"


@pytest.mark.parametrize(
    ("vary", "seeds", "said"),
    [
        (["train.lr_image"], [], "section.key=value"),
        (["seed=1"], [], "--seeds 0,1,2"),
        (["train.lr_imag=1"], [], "train.lr_image"),
        (["train.lr_image=1e-4", "train.lr_image=0.0001"], [], "each value once"),
        ([], [1, 1], "each seed once"),
    ],
)
def test_what_cannot_be_swept(vary: list[str], seeds: list[int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        runs_of(vary, seeds, _configured)


@pytest.mark.parametrize(
    ("key", "values", "names"),
    [
        ("advantage.discount", ["0.5"], ["discount=0.5_seed=0"]),
        ("reward.options.moody.gain", ["-1", "1"], ["gain=-1_seed=0", "gain=1_seed=0"]),
        ("prompts", ["a/b", "a b"], ["prompts=a-b_seed=0", r"prompts=a-b_[0-9a-f]{8}_seed=0"]),
        ("prompts", ["a", "A"], ["prompts=a_seed=0", r"prompts=A_[0-9a-f]{8}_seed=0"]),
        ("prompts", ["ж" * 130], [r"prompts=ж+_[0-9a-f]{8}"]),
    ],
)
def test_names_keep_signs_differ_and_fit_a_file_system(key: str, values: list[str], names: list[str]) -> None:
    runs = runs_of([f"{key}={value}" for value in values], [], _configured)
    for run, name in zip(runs, names, strict=True):
        assert re.fullmatch(name, run.name) and len(run.name.encode()) < 200, run.name
    assert len({run.cell for run in runs}) == len(runs), "other values are other cells"


@pytest.mark.parametrize("summary", [{"steps": None}, {"steps": "2"}, {"steps": 10**6, "eval_after": 3}])
def test_a_damaged_summary_ends_no_sweep(tmp_path: Path, summary: dict) -> None:
    (run,) = runs_of([], [], _configured)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "summary.json").write_text(json.dumps({"interrupted": False} | summary))
    row = row_of(run, tmp_path)
    assert row["state"] == ("finished" if summary["steps"] == 10**6 else "unfinished")
    assert cells_of([row])[0]["scores"] == {}


def test_an_unknown_program_is_found_before_the_first_run(place: Path, tmp_path: Path) -> None:
    vary = ["--vary", "sampling.program=once", "--vary", "sampling.program=reflekt"]
    done = unigrpo(*_sweep(place, tmp_path / "s"), *vary)
    assert done.exit_code == 2 and "reflect" in done.stderr, done.output
    assert not (tmp_path / "s").exists()


def test_cells_have_mean_and_deviation_over_finished_seeds() -> None:
    rows = [{"cell": "a", "state": "finished", "eval_after": {"r": value}} for value in (0.2, 0.4, 0.9)]
    cells = cells_of([*rows, {"cell": "a", "state": "unfinished"}, {"cell": "b", "state": "failed"}])
    assert cells[0]["finished"] == 3 and cells[1] == {"cell": "b", "finished": 0, "scores": {}}
    assert cells[0]["scores"]["r"] == {"mean": pytest.approx(0.5), "std": statistics.stdev([0.2, 0.4, 0.9]), "n": 3}


def test_a_killed_sweep_that_is_resumed_ends_as_an_undisturbed_one(place: Path, tmp_path: Path) -> None:
    """Two values with each seed, two steps a run; the kill is between the steps of the second value's first run."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    done = unigrpo(*_sweep(place, alone), *VARY, "--json")
    assert done.exit_code == 0, done.output
    dead = Process(command_line, *_sweep(place, killed), *VARY, TEST_KILL_AFTER=str(2 * SEEDS + 2))
    code, _, errors = dead.ended(600)
    assert code == -signal.SIGKILL, errors
    states = [row["state"] for row in json.loads((killed / "sweep.json").read_text())["runs"]]
    assert states == ["finished"] * SEEDS + ["unfinished"] * SEEDS
    assert len((killed / "lr_image=0.0001_seed=0" / "metrics.jsonl").read_text().splitlines()) == 1
    again = unigrpo(*_sweep(place, killed), *VARY)
    assert again.exit_code == 0, again.output
    content = json.loads(done.stdout)
    assert json.loads((killed / "sweep.json").read_text()) == content | {"directory": str(killed)}
    assert (killed / "sweep.csv").read_text() == (alone / "sweep.csv").read_text()
    for row in content["runs"]:
        assert differences(alone / row["run"], killed / row["run"]) == [], row["run"]
    assert len({row["eval_after"]["moody"] for row in content["runs"]}) == 2 * SEEDS, "all differ"
    with (alone / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["cell"] for line in lines] == ["lr_image=0.001"] * SEEDS + ["lr_image=0.0001"] * SEEDS
    assert [int(line["seed"]) for line in lines] == [*range(SEEDS)] * 2
    assert float(lines[-1]["after/moody"]) == content["runs"][-1]["eval_after"]["moody"]
    (killed / "lr_image=0.0001_seed=0").rename(tmp_path / "removed")
    other = unigrpo(*_sweep(place, killed), *VARY[:2], "--seeds", "0", "--json")
    kept = [row for row in content["runs"] if row["run"] != "lr_image=0.0001_seed=0"]
    found = sorted(json.loads(other.stdout)["runs"], key=lambda row: row["run"])
    assert found == sorted(kept, key=lambda row: row["run"]), "runs of other commands stay, if their directories do"
    (tmp_path / "removed").rename(killed / "lr_image=0.0001_seed=0")
    before = {path: path.stat().st_mtime_ns for path in killed.glob("*/metrics.jsonl")}
    unigrpo(*_sweep(place, killed), *VARY)  # a finished sweep trains nothing again
    assert before == {path: path.stat().st_mtime_ns for path in killed.glob("*/metrics.jsonl")}


def test_a_run_that_fails_or_is_claimed_stops_no_other(place: Path, tmp_path: Path) -> None:
    """One value does not fit in memory, and another process holds a run; a sweep's settings cannot change."""
    out = tmp_path / "s"
    held = out / CLAIMS / "memory_gb=0.0_seed=1"
    vary = ["--vary", "memory_gb=1e-5", "--vary", "memory_gb=0", "--seeds", "0,1"]
    unigrpo(*_sweep(place, out), "--vary", "memory_gb=1e-5", "--seeds", "0")
    held.mkdir(parents=True)
    with locked(held):
        done = unigrpo(*_sweep(place, out), *vary, "--json")
    assert done.exit_code == 1, done.output
    assert "2 of 4 runs failed" in done.stderr
    rows = json.loads(done.stdout)["runs"]
    assert [row["state"] for row in rows] == ["failed", "failed", "finished", "unfinished"]
    assert "memory" in rows[0]["error"]
    other = unigrpo(*_sweep(place, out), *vary, "--set", "train.group_size=3")
    assert other.exit_code == 2
    assert "train.group_size: 2 -> 3" in other.stderr


def test_a_setting_that_is_newer_than_a_sweep_is_not_taken_from_the_preset(tmp_path: Path) -> None:
    base = load_config(overrides=["train.lr_decay=40"])
    (tmp_path / "sweep.toml").write_text(re.sub(r"lr_decay = .*\n", "", to_toml(base)))
    (tmp_path / "cell_seed=0").mkdir()
    with pytest.raises(UsageError, match=r"other settings \(train.lr_decay: 0 -> 40"):
        sweep_directory(tmp_path, base)
