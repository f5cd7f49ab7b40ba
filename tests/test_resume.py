"""A run that was stopped, killed, damaged or out of room goes on, and ends as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import Result

from tests.chaos import REWARD, chaos, command, differences, write_inputs
from tests.commands import unigrpo
from tools.toy_model import build_model
from unigrpo_cli.config import config_keys, load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import DiskError, WeightsError
from unigrpo_cli.io.atomic import (
    append_line,
    locked,
    new_directory,
    new_file,
    remove_partial,
    update_symlink,
    verify_checksums,
    write_text,
)
from unigrpo_cli.models.mot.bagel import read_release
from unigrpo_cli.run import summary
from unigrpo_cli.run.checkpoint import (
    checkpoints,
    missing_part,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
)
from unigrpo_cli.run.config_diff import EFFECTS, Effect, changes, effect_of
from unigrpo_cli.run.directory import Run
from unigrpo_cli.run.resume import run_to_resume
from unigrpo_cli.run.setup import find_checkpoint
from unigrpo_cli.training.rng_state import put_generators, read_generators, seed_generators
from unigrpo_cli.training.state import prompt_list

EVERY = ("checkpoint", "samples", "trace")
FOUR = ("train.steps=4", "eval.every=2")
TWO = ("train.steps=2", *(f"{key}=1" for key in ("eval.every", *(f"train.{what}_every" for what in EVERY))))
SIGNALS = """
    import os, signal, threading
    when, at, times = os.environ.get("TEST_SIGNALS", "never:0:0").split(":")
    if split == when and step == int(at):
        for _ in range(int(times)):
            threading.Event().wait(0.1)  # until the main thread waits: a signal before that and one after are one
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        threading.Event().wait(0.1)
"""
"""A reward that sends signals, by an environment variable: its file, and with it its identity, stays the same."""


def _command(run: Path, plugin: Path, settings: Sequence[str]) -> list[str]:
    """A training run of the small model beside the reward's file; without the doctor, which changes nothing."""
    return command(run, plugin, (f"model={plugin.with_name('model')}", "doctor.at_start=off", *settings))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward's file, with prompts and a small untrained model beside it."""
    head, body = REWARD.split("def moody(pixels):\n")
    place = tmp_path_factory.mktemp("plugin")
    build_model(seed=0, width=32, layers=2).save(place / "model", "")
    return write_inputs(place, f"{head}def moody(pixels, split, step):\n{SIGNALS}{body}")


@pytest.fixture(scope="module")
def alone(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps that nobody disturbs."""
    run = tmp_path_factory.mktemp("alone") / "run"
    os.environ["UNIGRPO_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # as the tests' own fixture has it, which is younger
    _done(unigrpo(*_command(run, plugin, FOUR)))
    return run


@pytest.fixture
def copy(alone: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(alone, tmp_path / "run", symlinks=True))


def _done(result: Result, code: int = 0) -> Result:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def _lines(result: Result, word: str) -> list[str]:
    return [line for line in result.stderr.splitlines() if word in line]


# ----- resumed is uninterrupted


ROUNDS = "sampling.program=reflect sampling.rounds=2 advantage.credit=reward-to-go"


@pytest.mark.parametrize(
    "settings",
    ["", pytest.param("dtype=bfloat16", marks=pytest.mark.long), f"dtype=bfloat16 train.finetune=lora {ROUNDS}"],
)
def test_half_the_steps_and_the_other_half_are_all(tmp_path: Path, plugin: Path, alone: Path, settings: str) -> None:
    """Weights, moments, generators, facts, metrics, samples, evaluations and links, with a reward that draws."""
    whole, parts = tmp_path / "whole" if settings else alone, tmp_path / "parts"
    half, all_steps = (1, TWO) if settings else (2, FOUR)
    if settings:
        _done(unigrpo(*_command(whole, plugin, (*settings.split(), *all_steps))))
    _done(unigrpo(*_command(parts, plugin, (*settings.split(), *all_steps, f"train.steps={half}"))))
    again = _done(unigrpo(*_command(parts, plugin, (*settings.split(), *all_steps))))
    assert f"changed: train.steps: {half} -> {2 * half} (changes no result)" in again.output
    changed = [f"checkpoints/step_{half:06d}/{name}" for name in ("README.md", "state.json")]
    assert differences(whole, parts) == changed, "train.steps was another then, and an evaluation followed"
    files = {p.name for p in (whole / "checkpoints" / "last").iterdir()}
    weights = "adapter_model.safetensors" if "train.finetune=lora" in settings else "ema.safetensors"
    assert {weights, "optimizer.safetensors", "generators.safetensors", "state.json", "SHA256SUMS"} <= files
    moments = load_file(whole / "checkpoints" / "last" / "optimizer.safetensors")
    assert any(value.abs().max() > 0 for value in moments.values())


@pytest.mark.parametrize(("kills", "seed"), [(1, 1), pytest.param(3, 5, marks=pytest.mark.long)])
def test_chaos(tmp_path: Path, plugin: Path, capsys: pytest.CaptureFixture, kills: int, seed: int) -> None:
    """SIGKILLs, one at least inside a checkpoint's writing, and the same to the bit."""
    assert (
        chaos(tmp_path, kills, seed, ("train.steps=4", f"model={plugin.with_name('model')}", "doctor.at_start=off"))
        == 0
    )
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith(f"{kills} kill")
    assert " 0 inside" not in verdict


def test_states_of_generators_come_back() -> None:
    seed_generators(3)
    random.gauss(0, 1)
    np.random.randn()
    kept = read_generators()

    def draw() -> tuple:
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(2).tolist()

    first, second = draw(), draw()
    assert first != second
    put_generators(kept)
    assert draw() == first


def test_another_environment_and_another_number_of_threads_are_told_of(copy: Path, plugin: Path) -> None:
    environment = copy / "environment.json"
    versions = json.loads(environment.read_text())
    environment.write_text(json.dumps(versions | {"torch": "1.0", "gone": "2"}))
    again = _done(unigrpo(*_command(copy, plugin, ("train.steps=5", "train.micro_batch_size=1"))))
    (line,) = _lines(again, "bitwise reproducible")
    assert f"package versions changed (torch 1.0 -> {versions['torch']})" in line
    assert "train.micro_batch_size: 32 -> 1 (changes results by rounding alone)" in again.output
    assert json.loads(environment.read_text()) == versions


def test_abstentions_are_remembered(copy: Path, plugin: Path) -> None:
    """The share that stops a run is one over the last samples, those before the resume too."""
    kept = json.loads((copy / "checkpoints" / "last" / "state.json").read_text())["record"]["abstained"]
    assert len(kept["moody"]) > 0
    assert not any(kept["moody"])
    state = copy / "checkpoints" / "step_000004" / "state.json"
    content = json.loads(state.read_text())
    content["record"]["abstained"]["moody"] = [True] * 400
    state.write_text(json.dumps(content))
    _seal(state.parent)
    stopped = _done(unigrpo(*_command(copy, plugin, ("train.steps=5",))), 3)
    assert "reward.max_abstain=0.25" in " ".join(stopped.stderr.split())


def _seal(checkpoint: Path) -> None:
    """Sums over what is there now: for a checkpoint that a test has changed."""
    names = sorted(p.name for p in checkpoint.iterdir() if p.name != "SHA256SUMS")
    done = subprocess.run(["sha256sum", *names], cwd=checkpoint, capture_output=True, text=True, check=True)
    (checkpoint / "SHA256SUMS").write_text(done.stdout)


# ----- interrupts


@pytest.mark.parametrize(
    ("signals", "left"),
    [
        ("train:1:1", {2}),  # once in step 2: it is finished, its samples are owed
        ("eval:2:1", {2}),  # once in the samples of step 2
        ("train:2:2", {2}),  # twice in step 3: it is dropped
        ("train:3:1", {2, 4}),  # once in the last step: evaluation, samples, final evaluation are owed
    ],
)
def test_interrupted_is_uninterrupted(
    tmp_path: Path, plugin: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, signals: str, left: set[int]
) -> None:
    run = tmp_path / "run"
    before = set(threading.enumerate())  # other tests leave threads behind that wait for a call for ever
    monkeypatch.setenv("TEST_SIGNALS", signals)
    stopped = _done(unigrpo(*_command(run, plugin, FOUR)), 130)
    assert {int(p.name[5:]) for p in checkpoints(run)} == left
    sheets = {int(p.stem[5:]) for p in (run / "samples").glob("step_*.png")}
    assert sheets == ({0, 2} if signals == "train:2:2" or 4 in left else {0}), "none that is not due, none halfway"
    assert ("this step" in stopped.stderr) == (not signals.startswith("eval"))
    for thread in set(threading.enumerate()) - before:  # a reward left in the middle of a call still draws numbers
        if thread.name.startswith("reward"):
            thread.join(60)
            assert not thread.is_alive(), f"the run has ended and {thread.name!r} has not"
    monkeypatch.delenv("TEST_SIGNALS")
    _done(unigrpo(*_command(run, plugin, FOUR)))
    assert not differences(alone, run)


def test_an_interrupt_before_the_first_step_leaves_nothing(
    tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_SIGNALS", "eval:0:1")
    stopped = _done(unigrpo(*_command(tmp_path / "run", plugin, FOUR)), 130)
    assert "interrupted" in stopped.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_loading(
    tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr("unigrpo_cli.run.prepare.load_policy", lambda *_: signal.raise_signal(number))
    stopped = _done(unigrpo(*_command(tmp_path / "run", plugin, FOUR)), 130)
    assert stopped.stderr.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "run").exists()


def test_a_step_whose_weights_move_is_finished_and_a_checkpoint_too(
    tmp_path: Path, plugin: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in the optimizer, and again while the checkpoint is written: all of it is whole."""
    step, calls = torch.optim.AdamW.step, []

    def moving(optimizer: torch.optim.AdamW) -> None:
        calls.append(step(optimizer))
        if len(calls) == 3:  # two updates a step: the first of step 2
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def saving(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)
        save_file(*arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", moving)
    monkeypatch.setattr("unigrpo_cli.run.checkpoint.save_file", saving)
    stopped = _done(unigrpo(*_command(tmp_path / "run", plugin, FOUR)), 130)
    assert "weights of this step are moving" in stopped.stderr
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_000002"]
    monkeypatch.undo()
    monkeypatch.setenv("UNIGRPO_DISABLE_PLUGIN_AUTOLOAD", "1")
    _done(unigrpo(*_command(tmp_path / "run", plugin, FOUR)))
    assert not differences(alone, tmp_path / "run")


def test_an_interrupt_while_the_summary_is_written(copy: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is complete by then: its summary is written whole."""
    of_run = summary.of_run

    def interrupted(*arguments: Any) -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        return of_run(*arguments)

    monkeypatch.setattr(summary, "of_run", interrupted)
    _done(unigrpo(*_command(copy, plugin, ("train.steps=5",))))
    written = json.loads((copy / "summary.json").read_text())
    assert written["steps"] == 5
    assert written["eval_after"]


# ----- damage


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "harm", "what"),
    [
        ("optimizer.safetensors", _flip, "sha256 differs"),
        ("ema.safetensors", _cut, "has 500 bytes of"),
        ("SHA256SUMS", Path.unlink, "was not completed"),
        ("tokenizer.json", Path.unlink, "is missing"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken(
    copy: Path, plugin: Path, alone: Path, name: str, harm: Callable[[Path], None], what: str
) -> None:
    last = copy / "checkpoints" / "step_000004"
    harm(last / name)
    if harm is not _flip:  # seen without reading: who only wants weights takes the one before, too
        assert newest_checkpoint(copy).name == "step_000002"
        assert find_checkpoint(str(copy))[0] == str(copy / "checkpoints" / "step_000002")
        with pytest.raises(WeightsError, match="not complete"):
            find_checkpoint(str(last))
    refused = _done(unigrpo("train", "--resume", last, "--plugin", plugin), 5)
    (line,) = _lines(refused, "error:")
    assert name in line and what in line and "step_000002" in line
    resumed = _done(unigrpo(*_command(copy, plugin, FOUR)))
    (line,) = _lines(resumed, "is damaged")
    assert name in line and what in line
    aside = copy / "checkpoints" / "damaged_step_000004"
    assert aside.is_dir()
    shutil.rmtree(aside)
    assert not differences(alone, copy)


def test_no_whole_checkpoint_is_an_error(copy: Path, plugin: Path) -> None:
    for path in checkpoints(copy):
        _flip(path / "ema.safetensors")
    refused = _done(unigrpo(*_command(copy, plugin, FOUR)), 5)
    assert "no intact checkpoint (2 damaged)" in _lines(refused, "error:")[0]


def test_sums_are_what_sha256sum_checks(alone: Path) -> None:
    for path in checkpoints(alone):
        done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        others = {"SHA256SUMS", "README.md"}  # the card may be edited
        summed = {line.split(":")[0] for line in done.stdout.splitlines()}
        assert summed == {file.name for file in path.iterdir()} - others


def test_a_checkpoint_of_an_earlier_format(copy: Path, plugin: Path) -> None:
    for path in checkpoints(copy):
        content = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({"format": 2, "tune": "full", "step": content["step"]}))
    last = copy / "checkpoints" / "step_000004"
    for given in (("--resume", copy), ("--resume", last)):
        (line,) = _lines(_done(unigrpo("train", "--plugin", plugin, *given), 5), "error:")
        assert "checkpoint format 2; this version reads format 3" in line
    with pytest.raises(WeightsError, match="copy the directory without state"):
        find_checkpoint(str(last))


def test_what_killed_writes_left_is_cleaned(copy: Path, plugin: Path, alone: Path) -> None:
    folder = copy / "checkpoints"
    shutil.copytree(folder / "step_000004", folder / "step_000009.partial")
    (folder / "step_000004").rename(folder / "replaced_step_000004")  # killed between two renames
    shutil.copytree(folder / "step_000002", folder / "replaced_step_000002")
    for name in ("config.toml.partial", "samples/step_000004.png.partial"):
        (copy / name).write_text("half")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    resumed = _done(unigrpo(*_command(copy, plugin, FOUR)))
    assert len(_lines(resumed, "half written")) == 4
    assert not differences(alone, copy)


# ----- a state.json that was changed


def _changed(content: dict, path: tuple, value: object) -> dict:
    """A copy of a JSON object with another value at a path; ... removes it."""
    copied = json.loads(json.dumps(content))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copied


def _leaves(content: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values of a JSON object; of each list the first, and of each row of many numbers."""
    yield path
    inner: Any = enumerate(content[:1]) if isinstance(content, list) else ()
    if isinstance(content, dict):
        numbers = len(content) > 5 and all(isinstance(value, (int, float)) for value in content.values())
        inner = list(content.items())[: 1 if numbers else None]
    for key, value in inner:
        yield from _leaves(value, (*path, key))


def test_a_changed_state_file_is_refused_in_one_line(copy: Path) -> None:
    """A wrong type, a missing or an unknown field anywhere: a WeightsError, and never another exception."""
    checkpoint = copy / "checkpoints" / "step_000004"
    content = json.loads((checkpoint / "state.json").read_text())
    free = ("config",)  # compared with the present configuration key by key
    paths = [path for path in _leaves(content) if path and path[0] not in free and "options" not in path]
    assert len(paths) > 40
    accepted, said = [], []
    for path in paths:
        for value in (..., None, "x\0", -1, 10**30, [[1]], {"a": {}}, True):
            (checkpoint / "state.json").write_text(json.dumps(_changed(content, path, value)))
            try:
                read_state(checkpoint)
                accepted.append((path, value))
            except WeightsError as error:
                said.append(str(error))
            missing_part(checkpoint)
    assert not [line for line in said if "\n" in line]
    wrong = [(path, value) for path, value in accepted if value is ... and len(path) == 1]
    assert not wrong, "a field of the file is needed"
    typed = {("step",), ("base",), ("files",), ("trained",), ("record",), ("rewards",), ("record", "monitor", "first")}
    assert not [path for path, value in accepted if path in typed and value in (None, [[1]], {"a": {}}, True)]


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"format": 3}', '{"format": "3"}', "[" * 100_000, '{"format": NaN}', "\xff\xfe"]
)
def test_a_state_file_that_is_no_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"is damaged|checkpoint format"):
        read_state(tmp_path)


def test_a_sealed_but_wrong_state_ends_a_resume_with_one_line(copy: Path, plugin: Path) -> None:
    for path in checkpoints(copy):
        content = json.loads((path / "state.json").read_text())
        content["record"]["best"] = {"reward": 3, "value": "high", "step": []}
        (path / "state.json").write_text(json.dumps(content))
        _seal(path)
    (line,) = _lines(_done(unigrpo(*_command(copy, plugin, FOUR)), 5), "error:")
    assert "no intact checkpoint" in line
    last = copy / "checkpoints" / "step_000004"
    (line,) = _lines(_done(unigrpo("train", "--resume", last, "--plugin", plugin), 5), "error:")
    assert "record.best.reward" in line


# ----- a metrics.jsonl that was changed

METRICS = [
    {"step": 1, "loss": 0.5, "time": 7.5},
    {"step": 1, "eval/a": 1.0, "time": 8.5},
    {"step": 2, "loss": 0.1},
    {"step": 3, "loss": 0.2},
]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines, []),
        (lambda lines: [*lines, '{"step": 4, "lo'], []),  # cut by a kill
        (lambda lines: [], ["lacks 3 of the 3 steps"]),
        (lambda lines: lines[:1], ["lacks 2 of the 3 steps"]),
        (lambda lines: lines[2:], ["lacks 1 of the 3 steps"]),
        (lambda lines: lines * 2, ["had 4 lines twice"]),
        (lambda lines: [*lines[:2], "garbage", '{"step": "2"}', *lines[2:]], ["has 2 unreadable lines"]),
        (lambda lines: ["[]", *lines[:2], lines[3], lines[3]], ["1 unreadable", "had 1 lines twice", "lacks 1"]),
    ],
    ids=["whole", "killed", "emptied", "cut", "head cut", "doubled", "garbage", "all"],
)
def test_a_changed_metrics_file_is_reported(tmp_path: Path, change: Callable, says: list[str]) -> None:
    run, lines = Run(tmp_path), [json.dumps(row) for row in METRICS]
    killed = len(change(lines)) == 5 and not says
    run.metrics.write_text("".join(line + "\n" for line in change(lines))[: -1 if killed else None])
    found = run.forget_after(3)
    assert len(found) == len(says) and all(part in line for part, line in zip(says, found, strict=True)), found
    kept = run.metrics.read_text().splitlines()
    assert kept == [line for line in lines if line in change(lines)]
    assert not [line for line in run.forget_after(3) if "lacks" not in line], "said once"


def test_a_finished_run_is_left_as_it_is(copy: Path, plugin: Path, tmp_path: Path) -> None:
    """Another reward and no steps left: nothing is evaluated, and no file changes."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and not path.is_symlink()}
    more = ["--reward", "moody,geneval", "--set", "eval.seed=9", "--json"]
    again = _done(unigrpo("train", "--resume", copy, "--plugin", plugin, *more))
    assert "not used, because no step is left: eval.seed, reward.names" in " ".join(again.stderr.split())
    assert "--steps 104" in again.stderr
    assert json.loads(again.stdout) == json.loads((copy / "summary.json").read_text())
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and not path.is_symlink()} == before
    (copy / "metrics.jsonl").write_text("")
    told = _done(unigrpo("train", "--resume", copy, "--plugin", plugin))
    assert len(_lines(told, "lacks 4 of the 4 steps")) == 1


# ----- where to go on


def test_one_command_line_begins_and_goes_on(tmp_path: Path, plugin: Path, alone: Path, copy: Path) -> None:
    """--resume auto --out DIR: missing, empty, or killed before the first checkpoint."""
    run = tmp_path / "begun"
    run.mkdir()
    (run / ".lock").touch()
    (run / "config.toml.partial").write_text("half")
    _done(unigrpo(*_command(run, plugin, ("train.steps=0",))))
    assert (run / "summary.json").is_file() and not (run / "config.toml.partial").exists()
    for path in (copy / "checkpoints", copy / "summary.json", copy / "eval_after.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _done(unigrpo("train", "--resume", copy, "--plugin", plugin))
    assert not differences(alone, copy)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    refused = _done(unigrpo(*_command(tmp_path / "other", plugin, FOUR)), 2)
    assert "files that are not a run's" in refused.stderr
    refused = _done(unigrpo("train", "--resume", tmp_path / "other"), 2)
    assert "holds no checkpoint and no config.toml" in refused.stderr


def test_later_checkpoints_are_set_aside(copy: Path, plugin: Path, alone: Path) -> None:
    resumed = _done(unigrpo("train", "--resume", copy / "checkpoints" / "step_000002", "--plugin", plugin))
    (line,) = _lines(resumed, "is renamed to")
    assert "step_000004" in line and "later_step_000004" in line
    assert verify_checksums(copy / "checkpoints" / "later_step_000004") is None
    shutil.rmtree(copy / "checkpoints" / "later_step_000004")
    assert not differences(alone, copy)


def test_two_processes_do_not_write_one_run(copy: Path, plugin: Path) -> None:
    before = sorted(copy.rglob("*"))
    with locked(copy):
        refused = _done(unigrpo(*_command(copy, plugin, FOUR)), 2)
    assert "being written by another process" in _lines(refused, "error:")[0]
    assert sorted(copy.rglob("*")) == before


def test_links_lead_to_checkpoints_and_are_none(copy: Path, plugin: Path, alone: Path) -> None:
    for name in ("last", "best"):
        assert not os.path.isabs(os.readlink(copy / "checkpoints" / name))
    assert [p.name for p in checkpoints(copy)] == ["step_000002", "step_000004"]
    best = copy / "checkpoints" / "best"
    assert Path(find_checkpoint(str(best))[0]).resolve() == best.resolve()
    _done(unigrpo("train", "--resume", copy / "checkpoints" / "last", "--plugin", plugin))
    assert not differences(alone, copy)
    assert "no such checkpoint" in _done(unigrpo("train", "--resume", copy / "checkpoints" / "step_7"), 2).stderr


def test_a_link_to_a_run_is_that_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "monday"
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    (run / "config.toml").touch()
    (tmp_path / "latest").symlink_to(run)
    assert run_to_resume(str(tmp_path / "latest"), None) == (tmp_path / "latest", None)
    (run / "checkpoints" / "last").symlink_to("step_000002")
    (run / "checkpoints" / "step_000002" / "state.json").touch()
    (tmp_path / "good").symlink_to(run / "checkpoints" / "last")
    for link in (run / "checkpoints" / "last", tmp_path / "good"):
        assert run_to_resume(str(link), None) == (run, run / "checkpoints" / "step_000002")


def test_auto_takes_the_newest_run_also_before_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in ((300, "old"), (200, "killed"), (100, "rollout")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
        os.utime(tmp_path / "runs" / name / "config.toml", (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "rollout" / "episodes.json").touch()
    (tmp_path / "runs" / "old" / "checkpoints").mkdir()
    os.utime(tmp_path / "runs" / "old" / "checkpoints", (1e9 - 250, 1e9 - 250))
    assert run_to_resume("auto", None) == (Path("runs/killed"), None)
    os.utime(tmp_path / "runs" / "old" / "checkpoints", (1e9, 1e9))
    assert run_to_resume("auto", None) == (Path("runs/old"), None)


def test_a_metrics_line_cut_short_within_a_letter_is_dropped(tmp_path: Path) -> None:
    run, whole = Run(tmp_path), '{"step": 1, "skipped": "a\u2028b é"}\n'
    run.metrics.write_bytes(whole.encode() + b'{"step": 2, "skipped": "\xc3')
    run.forget_after(2)
    assert run.metrics.read_text(encoding="utf-8") == whole


# ----- which checkpoints stay


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    for step in range(1, 13):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    update_symlink(tmp_path / "checkpoints" / "last", "step_000012")
    prune_checkpoints(tmp_path, keep=2, every=5, best=7)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [5, 7, 10, 11, 12]
    prune_checkpoints(tmp_path, keep=1, every=0, best=None)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [12]


def test_the_best_by_a_held_out_reward_is_kept(tmp_path: Path, small_model: Path) -> None:
    """Evaluations of .5, .9, .2 and .3 after steps 1 to 4."""
    plugin = write_inputs(
        tmp_path,
        "from unigrpo_cli import reward\n\nTOLD = iter([0, 0, 0.5, 0.9, 0.2, 0.3, 0, 0, 0])\n\n"
        '@reward("told", range=(0, 1))\ndef told(images, split):\n'
        '    value = next(TOLD) if split == "eval" else 0.5\n'
        "    return [value + 0.01 * (k % 2) for k in range(len(images))]\n",
    )
    (tmp_path / "model").symlink_to(small_model)
    more = ("train.steps=4", "train.samples_every=0", "train.checkpoint_every=0", "train.keep_checkpoints=1")
    told = _command(tmp_path / "run", plugin, (*more, "eval.every=1", "eval.best=told"))
    _done(unigrpo(*(word if word != "moody" else "told" for word in told)))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_000002", "step_000004"]
    assert os.readlink(tmp_path / "run" / "checkpoints" / "best") == "step_000002"
    record = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())["record"]
    assert record["best"]["step"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [round(r["eval/told"], 1) for r in rows if "eval/told" in r] == [0.5, 0.9, 0.2, 0.3]
    assert [r["step"] for r in rows if "eval/told" in r] == [1, 2, 3, 4]


def test_a_best_that_is_not_evaluated_is_refused_early(tmp_path: Path, plugin: Path) -> None:
    refused = _done(unigrpo(*_command(tmp_path / "run", plugin, ("eval.best=modesty",))), 2)
    assert "did you mean moody" in refused.stderr
    refused = _done(unigrpo(*_command(tmp_path / "run", plugin, ("eval.every=0",))), 2)
    assert "set eval.every" in refused.stderr
    assert not (tmp_path / "run").exists()


# ----- what has changed


def test_a_key_is_learned_from_unless_it_is_classed() -> None:
    assert EFFECTS.keys() <= config_keys().keys()
    assert effect_of("train.unheard_of") is effect_of("train.lr_text") is Effect.LEARNED


def test_changes_are_told_by_class() -> None:
    old = load_config(overrides=["train.lr_text=0.1", "train.betas=[0.8,0.9]", "eval.steps=3"])
    new = load_config(overrides=["train.steps=3", "train.betas=[0.8,0.9]", "train.finetune=lora", "train.lr_text=0.2"])
    kept = json.loads(json.dumps(old.model_dump(mode="json")))
    kept["train"]["forgotten"] = 1  # of another version
    found = {c.key: c for c in changes(kept, new)}
    assert {k: c.effect for k, c in found.items()} == {
        "train.steps": Effect.NONE,
        "eval.steps": Effect.MEASURED,
        "train.lr_text": Effect.LEARNED,
        "train.finetune": Effect.REFUSED,
    }
    assert str(found["train.lr_text"]) == "train.lr_text: 0.1 -> 0.2 (changes what is learned from here on)"
    assert not changes(kept, old)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("train.finetune=lora", "train.finetune=full"),
        ("train.experts=text", "train.experts=both"),
        ("train.lora_rank=3", "train.lora_rank=64"),
        ("train.extra_modules=['head']", "leave it out"),
    ],
)
def test_what_cannot_change_is_refused(alone: Path, plugin: Path, setting: str, remedy: str) -> None:
    refused = _done(unigrpo("train", "--resume", alone, "--plugin", plugin, "--set", setting), 2)
    (line,) = _lines(refused, "error:")
    assert setting.split("=")[0] in line and remedy in line and "--model" in line


def test_another_model_or_out_is_refused(alone: Path, plugin: Path, tmp_path: Path) -> None:
    refused = _done(unigrpo("train", "--resume", alone, "--plugin", plugin, "--model", "elsewhere"), 2)
    assert "model the run started from" in refused.stderr
    refused = _done(unigrpo("train", "--resume", alone, "--plugin", plugin, "--out", tmp_path / "b"), 2)
    assert "leave out --out" in refused.stderr


def test_what_is_learnt_from_here_on_is_warned_of(copy: Path, plugin: Path, tmp_path: Path) -> None:
    """Rates, prompts and a reward whose file was edited: each in one line."""
    edited = tmp_path / plugin.name
    edited.write_text(plugin.read_text() + "# better now\n")
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\na blue square\n")
    sets = ["--set", "train.lr_text=1e-5", "--set", "eval.seed=7", "--prompts", prompts, "--steps", "5"]
    resumed = _done(unigrpo("train", "--resume", copy, "--plugin", edited, *sets))
    for text in (
        "train.lr_text: 0.001 -> 1e-05 (changes what is learned",
        "eval.seed: 42 -> 7 (evaluations before and after are not comparable)",
        "training prompts have changed",
        "reward 'moody' has changed",
        "no difference is reported",
    ):
        assert len(_lines(resumed, text)) == 1, text


def test_the_reference_must_be_what_it_was(tmp_path: Path, plugin: Path) -> None:
    """A base may move; one with other weights is refused."""
    base = Path(shutil.copytree(plugin.with_name("model"), tmp_path / "base"))
    run = tmp_path / "run"
    small = [*_command(run, plugin, ("train.steps=1", "eval.every=0", "eval.best=''")), "--model", base]
    _done(unigrpo(*small))
    before = read_release(base).digest()
    base.rename(tmp_path / "moved")
    moved = unigrpo("train", "--resume", run, "--plugin", plugin, "--model", tmp_path / "moved", "--steps", "2")
    assert json.loads((run / "checkpoints" / "last" / "state.json").read_text())["reference"] == before
    _done(moved)
    weights = load_file(tmp_path / "moved" / "ema.safetensors")
    name = min(weights)
    weights[name] = weights[name] + 1
    save_file(weights, tmp_path / "moved" / "ema.safetensors")
    (line,) = _lines(_done(unigrpo("train", "--resume", run, "--plugin", plugin, "--steps", "3"), 5), "error:")
    assert "does not hold the weights that this run started from" in line


def test_prompts_are_told_apart_by_all_they_hold(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"x" * 20000)
    one = [Prompt("a", "a", {"tag": "t", "image": str(picture)}, str(picture)), Prompt("b", "b")]
    kept = prompt_list(one)
    assert kept.count == 2 and kept == prompt_list(list(one))
    moved = tmp_path / "b.png"
    shutil.copy(picture, moved)
    assert prompt_list([Prompt("a", "a", {"tag": "t", "image": str(moved)}, str(moved)), one[1]]) == kept
    picture.write_bytes(b"x" * 19999 + b"y")
    others = [one, one[::-1], [one[0], Prompt("b", "c")], [one[0], Prompt("b", "b", {"n": 1})], [one[0]]]
    assert len({prompt_list(p).digest for p in others} | {kept.digest}) == len(others) + 1


# ----- no room


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Lets no file of this process grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_checkpoint(
    copy: Path, plugin: Path, alone: Path, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    shutil.rmtree(copy / "checkpoints" / "step_000004")
    small_files(350_000)  # the weights have room, the moments have not
    stopped = _done(unigrpo(*_command(copy, plugin, FOUR)), 1)
    small_files(resource.RLIM_INFINITY)
    (line,) = _lines(stopped, "error:")
    assert "checkpoints/step_000004 cannot be written" in line and f"--resume {copy}" in line
    assert not list(copy.rglob("*.partial"))
    _done(unigrpo(*_command(copy, plugin, FOUR)))
    assert not differences(alone, copy)


@pytest.mark.parametrize(
    "where",
    ["directory.append_line", "samples.new_directory", pytest.param("samples.new_file", marks=pytest.mark.long)],
)
def test_no_room_for_metrics_or_samples(
    copy: Path, plugin: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    shutil.rmtree(copy / "checkpoints" / "step_000004")

    def full(path: Path, *_: object, **__: object) -> None:
        raise DiskError(f"{path} cannot be written (No space left on device); free disk space or fix permissions")

    monkeypatch.setattr(f"unigrpo_cli.run.{where}", full)
    (line,) = _lines(_done(unigrpo(*_command(copy, plugin, FOUR)), 1), "error:")
    assert "No space left" in line and f"--resume {copy}" in line
    monkeypatch.undo()
    monkeypatch.setenv("UNIGRPO_DISABLE_PLUGIN_AUTOLOAD", "1")
    _done(unigrpo(*_command(copy, plugin, FOUR)))
    assert not differences(alone, copy)


def test_a_line_is_written_whole_or_not(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, "a" * 50)
    small_files(80)
    with pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written"):
        append_line(path, "b" * 50)
    small_files(resource.RLIM_INFINITY)
    assert path.read_text() == "a" * 50 + "\n"


FULL_DISK = """
import subprocess, sys
from pathlib import Path
from typer.testing import CliRunner
from tests.chaos import command
from unigrpo_cli.cli import app

place, plugin = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "none", place], check=True)
line = command(place / "run", plugin, ("train.steps=6", "train.keep_checkpoints=5"))
stopped = CliRunner().invoke(app, line)
print(stopped.stderr, stopped.exit_code, sorted(p.name for p in (place / "run" / "checkpoints").iterdir()))
subprocess.run(["mount", "-o", "remount,size=200m", place], check=True)
print(CliRunner().invoke(app, line).exit_code)
"""


@pytest.mark.long
def test_a_disk_that_is_full(tmp_path: Path, plugin: Path) -> None:
    """A file system of 50 MB, checkpoints of 19: the third is one too many, until there is more room."""
    mounts = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(mounts, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here without privileges")
    place = tmp_path / "small"
    place.mkdir()
    root = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL_DISK, str(place), str(plugin)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    said = done.stdout
    assert "No space left on device" in said, said + done.stderr
    assert "1 ['best', 'last', 'step_000002', 'step_000003']" in said
    assert said.splitlines()[-1] == "0"


# ----- files


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ValueError, match="halfway"):
        _write_half_a_file(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    with pytest.raises(DiskError, match=r"a\.txt cannot be written \(No space"), new_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"


def test_a_directory_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "d"
    for text in ("old", "new"):
        with new_directory(path, sums=True) as partial:
            (partial / "a").write_text(text)
            assert not path.exists() or (path / "a").read_text() == "old"
    assert (path / "a").read_text() == "new"
    assert verify_checksums(path) is None
    with pytest.raises(KeyboardInterrupt):
        _write_half_a_directory(path)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert remove_partial(tmp_path) == []
    for line, wrong in (("", "empty"), ("0  ../a\n", "no checksum"), (f"{'0' * 64}  a\n", "differs")):
        (path / "SHA256SUMS").write_text(line)
        assert wrong in str(verify_checksums(path))


def _write_half_a_file(path: Path) -> None:
    with new_file(path) as partial:
        partial.write_text("ne")
        raise ValueError("halfway")


def _write_half_a_directory(path: Path) -> None:
    with new_directory(path, sums=True) as partial:
        (partial / "a").write_text("half")
        raise KeyboardInterrupt


def test_later_lines_and_sheets_are_forgotten(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for row in ({"step": 1, "loss": 0.5}, {"step": 1, "eval/a": 1.0}, {"step": 2, "loss": 0.1}):
        run.log(row)
    lines = run.metrics.read_text().splitlines(keepends=True)
    for name in ("samples/step_000002", "traces/step_000001", "traces/step_000002"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("step_000001.png", "step_000002.png", "progress.png"):
        (tmp_path / "samples" / name).touch()
    run.forget_after(1)
    assert run.metrics.read_text() == "".join(lines[:2])
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["progress.png", "step_000001.png"]
    assert [p.name for p in (tmp_path / "traces").iterdir()] == ["step_000001"]
    run.forget_after(1, evaluated=False)
    assert run.metrics.read_text() == lines[0]
