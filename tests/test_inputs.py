"""What a run reads before its model: prompts held out by hash, and what is refused before anything is fetched."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from unigrpo_cli.cli import app
from unigrpo_cli.config import load_config
from unigrpo_cli.models.mot.config import BAGEL
from unigrpo_cli.run.inputs import with_suite
from unigrpo_cli.suites import SuiteRegistry, as_prompts, split, training_prompts
from unigrpo_cli.suites.prompts import TRAINING
from unigrpo_cli.toy.edits import train_edits

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
TEXTS = [f"a {color} {shape}" for color in COLORS for shape in ("circle", "square", "heart", "star", "triangle")]
QUICK = ("train.prompts_per_step=2", "train.group_size=2", "eval.steps=2", "sampling.max_new_tokens=8", "threads=1")


def _run(*arguments: object, sets: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), *(x for s in sets for x in ("--set", s))])


def _file(folder: Path, count: int) -> Path:
    path = folder / "my.txt"
    path.write_text("\n".join(TEXTS[:count]) + "\n")
    return path


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (19, 0), (20, 2), (29, 2), (35, 3)])
def test_a_tenth_is_held_out_from_twenty_texts_on(count: int, held_out: int) -> None:
    prompts = as_prompts([{"prompt": text} for text in TEXTS[:count]])
    train, rest = split(prompts)
    assert (len(train), len(rest)) == (count - held_out, held_out)
    assert sorted(p.id for p in train + rest) == sorted(p.id for p in prompts)
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert {p.text for p in split(shuffled)[1]} == {p.text for p in rest}, "the order of the file decides nothing"


def test_equal_texts_stay_on_one_side() -> None:
    train, rest = split(as_prompts([{"prompt": text} for text in TEXTS * 2]))
    assert not {p.text for p in train} & {p.text for p in rest}
    assert len(rest) == 6


def test_what_auto_stands_for(tmp_path: Path) -> None:
    assert with_suite(load_config()).eval.suite == "shapes"
    path = _file(tmp_path, 30)
    config = with_suite(load_config(named={"prompts": str(path)}))
    assert config.eval.suite == f"held-out:{path}"
    assert config.eval.rewards == (), "those of the preset are about shapes"
    held_out = SuiteRegistry().prompts(config.eval.suite)
    train = training_prompts(config.prompts, config.eval.suite)
    assert (len(train), len(held_out)) == (27, 3)
    own = load_config(named={"prompts": str(path)}, overrides=['eval.rewards=["jpeg"]'])
    assert with_suite(own).eval.rewards == ("jpeg",)
    chosen = load_config(named={"prompts": str(path), "eval.suite": "shapes"})
    assert with_suite(chosen) == chosen
    assert len(training_prompts(chosen.prompts, chosen.eval.suite)) == 30


def test_built_in_prompts_have_a_suite_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINING, "shapes-edit", lambda: train_edits(30))
    done = _run("train", "--reward", "edit", "--dry-run", sets=("sampling.program=edit",))
    assert done.exit_code == 0, done.output
    assert "too few prompts" not in done.output


@pytest.mark.parametrize(
    ("count", "evaluated", "says"),
    [(20, 2, "18 prompts to train on, 2 held out"), (5, 5, "too few prompts to hold some out")],
)
def test_a_run_on_a_file_evaluates_and_draws_its_own_prompts(
    tmp_path: Path, small_model: Path, count: int, evaluated: int, says: str
) -> None:
    path = _file(tmp_path, count)
    out = tmp_path / "run"
    more = ("--prompts", path, "--model", small_model, "--steps", 1, "--out", out)
    result = _run("train", "--reward", "jpeg", *more, sets=QUICK)
    assert result.exit_code == 0, result.output
    assert says in result.stdout
    report = json.loads((out / "eval_after.json").read_text())
    assert report["n"] == evaluated
    shown = {json.loads(file.read_text())["prompt"] for file in (out / "samples").rglob("*.json")}
    assert shown
    assert shown <= set(TEXTS[:count])
    assert set(report["scores"]) == {"jpeg"}
    again = _run("train", "--resume", out, "--steps", 1, "--json")
    assert again.exit_code == 0, again.output
    assert says not in again.output, "the run's configuration names the suite"


UNCHECKED = (
    (["--reward", "YOURS"], 3, ("unknown reward 'YOURS'",)),
    (["--reward", "clip@modle=x"], 3, ("'modle'", "did you mean model")),
    (["--reward", "jpeg", "--prompts", "none.txt"], 2, ("no prompts file none.txt",)),
    (["--reward", "geneval", "--prompts", "p.txt"], 3, ("metadata 'include'", "1 of 4", "'an elephant'")),
    (["--reward", "jpeg", "--set", "eval.suite=none.txt"], 2, ("none.txt",)),
    (["--reward", "jpeg", "--set", "eval.every=1", "--set", "eval.best=clip"], 2, ("eval.best=clip",)),
    (["--reward", "length", "--set", "sampling.think=false"], 3, ("needs reasoning",)),
    (["--reward", "jpeg:0"], 2, ("weight 0",)),
    (["--reward", "clip"], 3, ("'clip'", "say which model")),
    (["--reward", "jpeg,ocr:0"], 3, ("'ocr'", "name a recogniser")),
    (["--reward", "hpsv2"], 3, ("'hpsv2'", "@weights=FILE")),
    (["--reward", "aesthetic"], 3, ("'aesthetic'", "no head for")),
    (["--reward", "vlm"], 3, ("'vlm'", "no judge was named")),
    (["--reward", "geneval", "--prompts", "dogs.jsonl"], 3, ("'geneval'", "no detector was named", "dog")),
    (["--reward", "geneval@weights=x"], 3, ("'geneval'", "@weights has no effect")),
)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("arguments", "code", "says"), UNCHECKED)
def test_what_needs_no_weights_is_checked_before_anything_is_fetched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    says: tuple[str, ...],
    dry_run: bool,
) -> None:
    def fetched(*_: object, **how: object) -> str:
        if how.get("local_files_only"):
            raise FileNotFoundError("not in the cache")
        raise AssertionError("a model is fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\na blue heart\na green star\nan elephant\n")
    (tmp_path / "dogs.jsonl").write_text('{"prompt": "a dog", "include": [{"class": "dog", "count": 1}]}\n')
    more = ["--dry-run"] if dry_run else []
    result = _run("train", "--model", BAGEL, "--set", "memory_gb=80", *arguments, *more)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.exit_code == code, line
    assert all(words in line for words in says), line
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".txt", ".jsonl")] == []
