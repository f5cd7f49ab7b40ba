"""The commands: what they print and write, and that bad input is one clear line and loses nothing."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import Result

from tests.commands import Process, command_line, unigrpo
from unigrpo_cli.cli import common, completion

FAST = ["--set", "train.prompts_per_step=2", "--set", "train.group_size=4", "--set", "eval.limit=2"]


def _refused(result: Result, code: int, *says: str) -> None:
    """A non-zero exit, one line on stderr that says so, no traceback."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.output
    assert "Traceback" not in result.output
    for text in says:
        assert text in errors[0], errors[0]


def _reward(folder: Path, body: str, name: str = "mine") -> Path:
    path = folder / f"{name}.py"
    path.write_text(
        f'import time\nfrom unigrpo_cli import reward\n\n@reward("{name}")\ndef {name}(images):\n    {body}\n'
    )
    return path


# ----- what works


def test_generate_writes_the_picture_with_its_story(tmp_path: Path) -> None:
    prompt = "three red circles above a blue square"
    out = tmp_path / "out"
    result = unigrpo("generate", prompt, "--out", out, "--json", "-n", 2)
    assert result.exit_code == 0, result.output
    images = json.loads(result.stdout)["images"]
    assert len(images) == 2
    for row in images:
        path = Path(row["path"])
        with Image.open(path) as image:
            assert image.size == (48, 48)
            inside = json.loads(image.text["unigrpo"])
        assert inside == json.loads(path.with_suffix(".json").read_text())
        assert inside["prompt"] == prompt
        assert inside["reasoning"].startswith("<think>")
    assert images[0]["reasoning"] != images[1]["reasoning"]
    assert (out / "sheet.png").is_file()


def test_generate_is_repeatable_and_seeds_differ(tmp_path: Path) -> None:
    def pixels(name: str, *more: str) -> bytes:
        result = unigrpo("generate", "a red heart", "--out", tmp_path / name, "--json", *more)
        return Image.open(json.loads(result.stdout)["images"][0]["path"]).tobytes()

    first = pixels("a")
    assert first == pixels("b") == pixels("c", "--set", "sampling.batch_size=1")
    assert first != pixels("d", "--seed", "5")


@pytest.mark.parametrize("option", ["--no-think", "--set=sampling.think=false"])
def test_generate_without_thinking(tmp_path: Path, option: str) -> None:
    result = unigrpo("generate", "a red heart", option, "--out", tmp_path / "o", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"][0]["reasoning"] is None


def test_generate_from_a_file_and_unknown_words(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red heart\na purple elephant\n")
    result = unigrpo("generate", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["images"]) == 2
    assert "no word for elephant" in result.stderr


def test_rollout_writes_episodes_that_can_be_scored_again(tmp_path: Path) -> None:
    out = tmp_path / "a"
    result = unigrpo("rollout", "--reward", "geneval,clip", "--limit", 2, "--group-size", 3, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["episodes"] == 6
    assert set(summary["rewards"]) == {"geneval", "clip"}
    rows = json.loads((out / "rewards.json").read_text())
    assert len(list((out / "images").glob("*.png"))) == len(rows) == 6
    again = unigrpo("rollout", "--from", out, "--reward", "geneval", "--out", tmp_path / "b", "--json")
    assert json.loads(again.stdout)["rewards"]["geneval"] == pytest.approx(summary["rewards"]["geneval"])
    other = unigrpo("rollout", "--from", out, "--reward", "plan", "--out", tmp_path / "c", "--json")
    assert other.exit_code == 0, other.output


def test_eval_reports_means_intervals_and_tasks(tmp_path: Path, small_model: Path) -> None:
    others = ["--compare", "embedded", "--compare", small_model]
    result = unigrpo("eval", "--limit", 2, *others, "--out", tmp_path / "e", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["n"] == 12
    assert set(report["scores"]) == {"clip", "geneval", "plan", "fidelity", "clean"}
    for score in report["scores"].values():
        assert score["ci95"][0] <= score["mean"] <= score["ci95"][1]
    assert len(report["per_task"]) == 6
    assert len(list((tmp_path / "e" / "images").glob("*.png"))) == 12
    assert [other["model"] for other in report["compare"]] == ["embedded", str(small_model)]
    itself, untrained = report["compare"]
    assert itself["difference"]["geneval"] == {"mean": 0.0, "ci95": [0.0, 0.0]}, "compared with itself"
    assert untrained["n"] == report["n"] and set(untrained["scores"]) == set(report["scores"])
    for name, found in untrained["difference"].items():
        mean = untrained["scores"][name]["mean"] - report["scores"][name]["mean"]
        assert found["mean"] == pytest.approx(mean), name
        assert found["ci95"][0] <= found["mean"] <= found["ci95"][1]
    assert untrained["difference"]["clean"]["ci95"][1] < 0, "an untrained model paints specks"
    table = [line.split("  ")[1] for line in result.stderr.splitlines() if line.startswith("  ")]
    assert table.count("difference, paired") == 2 and str(small_model) in table
    assert json.loads((tmp_path / "e" / "eval.json").read_text()) == report


def test_eval_gate(tmp_path: Path) -> None:
    short = ("--limit", 1, "--set", "eval.steps=2")
    assert unigrpo("eval", *short, "--fail-under", "geneval=0", "--out", tmp_path / "a").exit_code == 0
    failed = unigrpo("eval", *short, "--fail-under", "geneval=1.01", "--out", tmp_path / "b")
    _refused(failed, 4, "under --fail-under geneval=1.01")


def test_eval_of_geneval_prompts_by_clip(tmp_path: Path) -> None:
    """The 553 prompts run through; what the embedded model cannot read, it says."""
    result = unigrpo("eval", "--suite", "geneval", "--limit", 1, "--reward", "clip", "--out", tmp_path / "e", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n"] == 6
    assert "has no word for" in result.stderr


def test_rewards_list_info_new_and_test(tmp_path: Path) -> None:
    listed = json.loads(unigrpo("rewards", "list", "--json").stdout)["rewards"]
    assert {"clip", "geneval"} <= {row["name"] for row in listed}
    assert all(row["state"] == "ok" for row in listed)
    assert "mode" in {
        o["option"] for o in json.loads(unigrpo("rewards", "info", "geneval", "--json").stdout)["options"]
    }
    for kind in ("function", "class"):
        made = unigrpo("rewards", "new", f"my_{kind}", "--kind", kind, "--out", tmp_path)
        assert made.exit_code == 0, made.output
        tested = unigrpo("rewards", "test", f"my_{kind}", "--plugin", tmp_path / f"my_{kind}.py", "--json")
        assert tested.exit_code == 0, tested.output
        assert all(c["ok"] for c in json.loads(tested.stdout)["checks"])


def test_a_broken_plugin_is_listed_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unigrpo("--help").exit_code == 0
    result = unigrpo("rewards", "test", "mine", "--plugin", _reward(tmp_path, "return [1.0]"))
    assert result.exit_code == 3
    assert "1 scores for 8 samples" in result.output


# ----- what is refused


UNKNOWN = [
    (["train", "--lr", "1e-5"], "no option --lr: use --set train.lr_text and train.lr_image"),
    (["train", "--output-dir", "x"], "no option --output-dir: use --out"),
    (["generate", "x", "--guidance-scale=4"], "no option --guidance-scale: use --set eval.guidance_text"),
    (["train", "--wandb"], "no option --wandb: use --report-to wandb"),
    (["completions"], "no command completions: use `unigrpo --install-completion`"),
    (["train", "--rewrad", "clip"], "--help"),
    (["train", "--steps", "many"], "--help"),
    (["trian"], "--help"),
]


@pytest.mark.parametrize(("arguments", "says"), UNKNOWN)
def test_unknown_options_and_commands_are_one_line_each(arguments: list[str], says: str) -> None:
    """Words of other tools and misspelt ones."""
    code, output, errors = Process(command_line, *arguments).ended()
    (line,) = errors.splitlines()
    assert (code, output) == (2, "")
    assert line.startswith("error: ") and says in line


def test_help_works_beside_broken_plugins_and_shows_the_reward_grammar() -> None:
    for command in ([], ["train"]):
        broken = {"UNIGRPO_PLUGINS": "/nowhere.py", "UNIGRPO_PLUGINS_DIR": "/nowhere"}
        code, output, errors = Process(command_line, *command, "--help", **broken).ended()
        assert (code, errors) == (0, "")
    assert "[alias=]name[:weight](@key=value)*" in output.replace("\n", "").replace(" ", "")


def test_completion_of_rewards_settings_and_presets() -> None:
    assert "geneval" in completion.rewards("gen")
    assert "clip:0.5,geneval" in completion.rewards("clip:0.5,gen")
    assert completion.settings("train.lr_t") == ["train.lr_text="]
    assert completion.presets("pap") == ["paper"]


def test_generate_passes_through_at_most_six_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command to the sampler, and none of them plans memory."""
    import unigrpo_cli.rollout

    passed: list[str] = []
    sampler = unigrpo_cli.rollout.sample_image

    def noted(*arguments: object) -> object:
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_name != "generate":
            frame = frame.f_back
            passed.append(frame.f_code.co_filename)
        return sampler(*arguments)

    monkeypatch.setattr(unigrpo_cli.rollout, "sample_image", noted)
    result = unigrpo("generate", "a red heart", "--out", tmp_path / "o", "--set", "sampling.batch_size=0")
    assert result.exit_code == 0, result.output
    ours = {name for name in passed if "unigrpo_cli" in name}
    assert 1 < len(ours) <= 6, ours
    assert not any("memory" in Path(name).parts for name in ours)


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a \x1b[31mred\x1b]0;title\x07 heart\x9b2J\n")
    result = unigrpo("generate", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "g")
    assert result.exit_code == 0, result.output
    assert "a \\x1b[31mred" in result.stdout
    assert not set("\x1b\x07\x9b") & set(result.output)


def test_commands_in_messages_quote_paths(tmp_path: Path) -> None:
    out = tmp_path / "my run; $(x)"
    plugin = _reward(tmp_path, "raise ValueError('no')")
    more = ("--limit", 1, "--group-size", 2, "--out", out)
    result = unigrpo("rollout", "--reward", "mine", "--plugin", plugin, *more)
    assert f"unigrpo rollout --from '{out}'" in result.stderr
    for path in (Path(__file__).parents[1] / "unigrpo_cli").rglob("*.py"):
        found = re.findall(r"unigrpo \w+ (?:--\w+ )\{(?!quoted\()[^}]*\}", path.read_text())
        assert not found, f"{path}: {found}: put it in quoted()"


def test_a_reward_that_hangs_lets_the_process_end(tmp_path: Path, small_model: Path) -> None:
    plugin = _reward(tmp_path, "time.sleep(600)")
    more = ["--plugin", plugin, "--model", small_model, "--out", tmp_path / "run", "--set", "threads=1"]
    hung = Process(command_line, "train", "--reward", "mine", *more, *FAST, "--set", "reward.timeout_s=0.2")
    code, _, errors = hung.ended(60)
    assert code == 3, errors


def test_a_plugin_cannot_spoil_stdout_or_the_working_directory(tmp_path: Path, small_model: Path) -> None:
    """It prints by every way, changes directory, and leaves a child running that inherits what can be inherited."""
    plugin = tmp_path / "rude.py"
    plugin.write_text(RUDE)
    flags = "rollout --limit 1 --group-size 2 --out kept/run --json --reward rude --plugin rude.py --set threads=1"
    arguments = [*flags.split(), "--model", str(small_model)]
    began = time.monotonic()
    reading, writing = os.pipe()
    rude = Process(_into_a_pipe, tmp_path, writing, arguments)
    os.close(writing)
    with open(reading) as output:
        printed = output.read()
    assert time.monotonic() - began < 80, "stdout ends although the child lives on"
    while rude.code is None:  # to join it would be to join its child, too
        time.sleep(0.01)
    said = rude.files[1].read_text()
    assert rude.code == 0, said
    assert json.loads(printed)["episodes"] == 2
    assert all(f"{where} {how}" in said for where in ("import", "setup", "score") for how in WAYS)
    assert (tmp_path / "kept" / "run" / "rewards.json").is_file()


def _into_a_pipe(folder: Path, pipe: int, arguments: list[str]) -> None:
    """A command in a directory, with a pipe as its stdout."""
    os.chdir(folder)
    os.dup2(pipe, 1)
    os.close(pipe)
    command_line(*arguments)


WAYS = ("print", "write", "child", "shell")
RUDE = """
import os, subprocess, sys, time
from unigrpo_cli import hookimpl

def rude(where, folder):
    print(where, "print")
    os.write(1, f"{where} write\\n".encode())
    subprocess.run([sys.executable, "-c", f"print({where!r}, 'child')"], check=True)
    os.system(f"echo {where} shell")
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)

rude("import", "a")

class Rude:
    name, range = "rude", (0.0, 1.0)

    def __init__(self, options):
        pass

    def setup(self, context):
        rude("setup", "b")

    def score(self, batch):
        assert os.path.basename(os.getcwd()) == "b", "it keeps a directory of its own"
        rude("score", "c")
        if os.fork() == 0:
            time.sleep(90)
            os._exit(0)
        return [0.5 + k / 10 for k in range(len(batch))]

@hookimpl
def unigrpo_register_rewards(registry):
    registry.add("rude", Rude)
"""


def test_a_plugin_that_ends_the_process_is_reported(tmp_path: Path) -> None:
    plugin = _reward(tmp_path, "__import__('os')._exit(0)")
    code, _, errors = Process(command_line, "rewards", "test", "mine", "--plugin", plugin).ended()
    assert code == 3
    assert "os._exit(0)" in errors


@pytest.mark.parametrize(("status", "child", "ends"), [(0, False, 3), (7, False, 7), (0, True, 0)])
def test_only_a_success_that_is_none_is_changed(
    status: int, child: bool, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children of a reward may end by os._exit(0); multiprocessing ends them so."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with common._noticed_exit():
        if child:
            monkeypatch.setattr(os, "getpid", lambda: -1)
        os._exit(status)
    assert ended == [ends]


def test_text_is_shown_as_it_is(tmp_path: Path) -> None:
    """Brackets are markup to the console library, not to us."""
    result = unigrpo("generate", "a [/x] [red] heart", "--out", tmp_path / "g[b]")
    assert result.exit_code == 0, result.output
    assert "a [/x] [red] heart" in result.stdout
    assert "g[b]" in result.stdout
    plugin = _reward(tmp_path, "raise ValueError('no [/judge]\\nat all')")
    _refused(
        unigrpo(
            "rollout",
            "--reward",
            "mine",
            "--plugin",
            plugin,
            "--limit",
            1,
            "--group-size",
            2,
            "--out",
            tmp_path / "r",
        ),
        3,
        "no [/judge] at",
    )


def test_a_reward_that_fails_leaves_the_sampled_episodes(tmp_path: Path) -> None:
    plugin = _reward(tmp_path, "raise ValueError('x')")
    out = tmp_path / "o"
    result = unigrpo("rollout", "--reward", "mine", "--plugin", plugin, "--limit", 1, "--group-size", 2, "--out", out)
    _refused(result, 3, "'mine'")
    assert "--from" in result.stderr
    again = unigrpo("rollout", "--from", out, "--reward", "geneval", "--out", tmp_path / "b", "--json")
    assert json.loads(again.stdout)["episodes"] == 2
    _refused(unigrpo("rollout", "--from", out, "--reward", "geneval", "--limit", 2), 2, "leave out --limit")


def test_eval_takes_configured_rewards(tmp_path: Path) -> None:
    result = unigrpo("eval", "--limit", 1, "--set", 'reward.names=["clip"]', "--out", tmp_path / "e", "--json")
    assert "clip" in json.loads(result.stdout)["scores"]


def test_debug_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIGRPO_DEBUG", "1")
    assert unigrpo("generate").exception is not None
