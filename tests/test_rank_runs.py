"""Whole commands over two processes: how they begin, what they leave, and how all end when one does.

The longer ones run by `UNIGRPO_LONG_TESTS=1 python -m pytest -q tests/test_rank_runs.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands import Process, command_line, unigrpo
from tests.test_ranks import free_port, launch
from unigrpo_cli.episode import flatten
from unigrpo_cli.parallel import heartbeat
from unigrpo_cli.run.episode_files import load_episodes, save_episodes

SMALL = [
    "train",
    *("--reward", "bright"),
    *("--set", "train.prompts_per_step=4"),
    *("--set", "train.minibatches=2"),
    *("--set", "train.group_size=2"),
    *("--set", "train.checkpoint_every=1"),
    *("--set", "train.samples_every=0"),
    *("--set", "eval.limit=1"),
    *("--set", "eval.steps=2"),
    *("--set", "eval.rewards=[]"),
    *("--set", "sampling.steps=6"),
    *("--set", "doctor.at_start=off"),
    *("--set", "threads=1"),
]
JUDGE = """
from unigrpo_cli import reward

@reward("bright", range=(0.0, 1.0))
def bright(images, step, split):
    return [sum(image.convert("L").histogram()[128:]) / image.width / image.height for image in images]
"""


@pytest.fixture
def judge(tmp_path: Path, small_model: Path) -> list[str]:
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    return ["--plugin", str(path), "--model", str(small_model)]


def run_by_two(*command: object, **variables: str) -> list[Process]:
    return launch(2, command_line, *command, **variables)


def ended(processes: Sequence[Process]) -> list[tuple[int, str, str]]:
    return [process.ended() for process in processes]


def steps_in(run: Path) -> list[int]:
    try:
        return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def until(condition: object, seconds: float = 120.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error")]


def test_a_killed_rank_ends_the_other_and_one_process_goes_on(tmp_path: Path, judge: list[str]) -> None:
    """SIGKILL, as the out-of-memory killer does it: one line that names the rank, and no hang in a collective."""
    run = tmp_path / "run"
    with patch.object(heartbeat, "BEAT", 0.2):  # which a fork takes along
        first, second = run_by_two(*SMALL, *judge, "--out", run, "--steps", 500, UNIGRPO_SILENCE="2")
    until(lambda: len(steps_in(run)) >= 2 or first.code is not None)
    second.send(signal.SIGKILL)
    began = time.monotonic()
    code, _, errors = first.ended()
    assert time.monotonic() - began < 60
    assert code == 1
    (line,) = error_lines(errors)
    assert line.startswith("error: rank 1 is gone: no sign of it for 2 s"), errors
    done = max(int(p.name[5:]) for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit())
    resumed = unigrpo("train", *judge[:2], "--resume", "auto", "--out", run, "--steps", done + 1, "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["steps"] == done + 1
    assert steps_in(run) == list(range(1, done + 2))


@pytest.mark.long
def test_a_rollout_by_two_is_that_of_one(tmp_path: Path) -> None:
    """Three groups on two ranks, and a saved one, of which the first has none: the same episodes and rewards."""
    command = ["rollout", "--limit", "3", "--group-size", "2", "--reward", "jpeg,length:0", "--json"]
    command += ["--set", "sampling.steps=6", "--set", "threads=1"]
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    pair = run_by_two(*command, "--out", two)
    alone = unigrpo(*command, "--out", one)
    assert alone.exit_code == 0, alone.output
    (code, output, errors), (other, silent, _) = ended(pair)
    assert code == other == 0, errors
    assert silent == "", "one rank speaks"
    summary = json.loads(output)
    assert (summary["episodes"], summary["groups"]) == (6, 3)
    assert sorted(p.name for p in (two / "images").iterdir()) == sorted(p.name for p in (one / "images").iterdir())
    rows = [json.loads((folder / "rewards.json").read_text()) for folder in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert a.pop("rewards") == pytest.approx(b.pop("rewards"), rel=1e-3)
        del a["components"], b["components"]
        assert a == b
    drawn = [flatten(load_episodes(folder)) for folder in (one, two)]
    for mine, theirs in zip(*drawn, strict=True):
        assert mine.prompt == theirs.prompt
        torch.testing.assert_close(mine.images[0].latent, theirs.images[0].latent, rtol=1e-4, atol=1e-4)
    first = load_episodes(two)[:1]
    save_episodes(first, tmp_path / "first")
    scoring = ["rollout", "--from", tmp_path / "first", "--reward", "jpeg,length:0", "--out", again]
    scored = ended(run_by_two(*scoring, "--set", "reward.scoring_rank=first", "--set", "threads=1"))
    assert [code for code, _, _ in scored] == [0, 0], scored
    assert json.loads((again / "rewards.json").read_text()) == json.loads((two / "rewards.json").read_text())[:2]
    assert [e.seed for e in flatten(load_episodes(again))] == [e.seed for e in flatten(first)]


@pytest.mark.long
def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path: Path, judge: list[str]) -> None:
    run = tmp_path / "run"
    pair = run_by_two(*SMALL, *judge, "--out", run, "--steps", 500, "--json")
    until(lambda: len(steps_in(run)) >= 1)
    pair[1].send(signal.SIGTERM)
    (code, output, errors), (other, silent, _) = ended(pair)
    assert code == other == 130, errors
    summary = json.loads(output)
    assert summary["interrupted"]
    assert silent == "", "one rank speaks"
    steps = steps_in(run)
    assert steps == list(range(1, summary["steps"] + 1))
    assert (run / "checkpoints" / f"step_{summary['steps']:06d}" / "state.json").is_file()
    more = ["--resume", run, "--steps", len(steps) + 1, "--json"]
    (code, output, errors), _ = ended(run_by_two(*SMALL, *judge, *more))
    assert code == 0, errors
    assert json.loads(output)["steps"] == len(steps) + 1


@pytest.mark.long
def test_a_judge_that_fails_on_one_rank_is_one_line_and_loses_no_step(tmp_path: Path, judge: list[str]) -> None:
    path = tmp_path / "judge.py"
    fails = '    if split == "train" and step == 2 and os.environ["RANK"] == "1":\n        raise OSError("gone")\n'
    head, tail = JUDGE.split("    return")
    path.write_text("import os\n" + head + fails + "    return" + tail)
    run = tmp_path / "run"
    more = ["--set", "train.checkpoint_every=0", "--out", run, "--steps", 5]
    both = ended(run_by_two(*SMALL, *judge, *more))
    assert [code for code, _, _ in both] == [3, 3], both
    (line,) = [line for _, _, errors in both for line in error_lines(errors)]
    assert line.startswith("error: rank 1: reward 'bright'")
    assert "OSError: gone" in line
    assert (run / "checkpoints" / "step_000002" / "state.json").is_file()


ONE_SIDED = """
import os
from unigrpo_cli import hookimpl

@hookimpl
def unigrpo_combine_rewards(rewards):
    if os.environ.get("RANK") == "0":
        raise OSError("no advantages here")
"""


@pytest.mark.long
def test_when_the_first_rank_fails_alone_the_other_ends_as_it_does(tmp_path: Path, judge: list[str]) -> None:
    """The place where ranks meet goes with it, so it stays until it was heard: one line, one code, no noise."""
    hook = tmp_path / "hook.py"
    hook.write_text(ONE_SIDED)
    more = ["--plugin", hook, "--out", tmp_path / "run", "--steps", 1]
    (code, _, errors), (other, _, silent) = ended(run_by_two(*SMALL, *judge, *more))
    assert code == other == 3, errors + silent
    (line,) = error_lines(errors)
    assert line.startswith("error: rank 0:") and "no advantages here" in line
    assert not silent


def test_who_waits_for_the_others_can_be_interrupted() -> None:
    """They meet outside Python, where no signal is seen; another rank may take half an hour to come."""
    port = free_port()
    (process,) = launch(1, command_line, "train", WORLD_SIZE="2", MASTER_PORT=str(port))

    def meets() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(meets)
    time.sleep(0.5)
    process.send(signal.SIGTERM)
    code, _, errors = process.ended(20)
    assert code == 130
    assert errors.splitlines()[-1] == "interrupted"


@pytest.mark.long
def test_what_is_wrong_for_all_is_said_once(tmp_path: Path, judge: list[str]) -> None:
    run = tmp_path / "run"
    both = ended(run_by_two(*SMALL, *judge, "--set", "train.prompts_per_step=2", "--out", run))
    assert [code for code, _, _ in both] == [2, 2]
    (line,) = [line for _, _, errors in both for line in error_lines(errors)]
    assert "2 ranks x train.minibatches=2 must divide it" in line
    assert not run.exists()


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_what_one_process_does(tmp_path: Path, judge: list[str], launcher: str) -> None:
    """The lines of examples/launch, on a CPU: the run says how many ranks there are, and ends well."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        *("--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ]
    lines = {"torchrun": torchrun, "accelerate": accelerate}
    run = tmp_path / "run"
    own = ["-m", "unigrpo_cli", *SMALL, *judge, "--out", str(run), "--steps", "1"]
    done = subprocess.run([*lines[launcher], *own], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 ranks, sharded layers: each draws 2 prompts x 2 = 4 episodes" in done.stdout
    assert "warning:" not in done.stderr
    assert steps_in(run) == [1]


def test_an_evaluation_by_two_is_that_of_one(tmp_path: Path) -> None:
    """Two pictures for a prompt of each task: the same report and pictures, told once; and a gate that fails."""
    command = ["eval", "--limit", "1", "--samples", "2", "--reward", "jpeg,geneval", "--json"]
    command += ["--set", "eval.steps=2", "--set", "threads=1"]
    pair = run_by_two(*command, "--fail-under", "jpeg=1.1", "--out", tmp_path / "two")
    alone = unigrpo(*command, "--out", tmp_path / "one")
    assert alone.exit_code == 0, alone.output
    (code, output, errors), (other, silent, _) = ended(pair)
    assert (code, other) == (4, 0), errors
    (line,) = error_lines(errors)
    assert "under --fail-under jpeg=1.1" in line
    assert silent == "", "one rank speaks"
    one, two = json.loads(alone.stdout), json.loads(output)
    assert json.loads((tmp_path / "two" / "eval.json").read_text()) == two
    assert one.pop("run") != two.pop("run")
    assert one["scores"]["jpeg"]["mean"] == pytest.approx(two["scores"]["jpeg"]["mean"], rel=1e-3)
    assert one["scores"]["geneval"] == two["scores"]["geneval"]
    folders = [tmp_path / name / "images" for name in ("one", "two")]
    pictures = [{path.name: Image.open(path) for path in folder.glob("*.png")} for folder in folders]
    assert sorted(pictures[0]) == sorted(pictures[1]) == [f"{k:05d}.png" for k in range(one["n"])]
    for name in pictures[0]:
        stories = [json.loads(x[name].text["unigrpo"]) for x in pictures]
        assert all(stories[0][key] == stories[1][key] for key in ("prompt", "reasoning"))
        grey = [np.asarray(x[name], dtype=int) for x in pictures]
        assert abs(grey[0] - grey[1]).max() <= 1


DISMANTLED = """
import atexit

class Late:
    def __del__(self):
        print("taken apart", flush=True)

def command(**how):
    atexit.register(print, "said at the end")
    return app(**how)

late = Late()
from unigrpo_cli import cli
app, cli.app = cli.app, command
cli.main()
"""


@pytest.mark.parametrize(
    ("asked", "code", "world", "last"),
    [
        ("--version", 0, 2, "said at the end"),
        ("--verzion", 2, 2, "said at the end"),
        ("--version", 0, 1, "taken apart"),
    ],
)
def test_one_of_several_ends_before_python_takes_itself_apart(asked: str, code: int, world: int, last: str) -> None:
    """Its threads may still want Python, which aborts; one process alone ends as any program."""
    command = [sys.executable, "-c", DISMANTLED, asked]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": str(world)})
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, last)


def test_a_command_of_one_process_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    refused = unigrpo("generate", "a red circle", "--out", tmp_path / "pictures")
    assert refused.exit_code == 2
    assert "run in several processes; start this without a launcher" in refused.stderr
