"""Whole runs of the embedded model and of a small one: report, files, resuming, interrupting, adapters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.commands import unigrpo
from unigrpo_cli.cli import app
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.hub import embedded_directory
from unigrpo_cli.models.lora import adapter_of, load_adapters, save_adapters
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.schedule import prompts_for, window_of

SMALL = [
    "train",
    *("--set", "train.prompts_per_step=2"),
    *("--set", "train.minibatches=2"),
    *("--set", "train.group_size=3"),
    *("--set", "train.samples_every=0"),
    *("--set", "train.trace_every=0"),
    *("--set", "eval.limit=1"),
    *("--set", "eval.steps=2"),
    *("--set", "sampling.max_new_tokens=6"),
    *("--set", "sampling.steps=4"),
    *("--set", "sampling.window_range=[0, 3]"),
    *("--set", "threads=1"),
    *("--set", "doctor.at_start=off"),  # it has tests of its own, and the first below
]


def _train(out: Path, *more: str | Path, reward: str = "clip") -> dict:
    result = unigrpo(*SMALL, "--reward", reward, "--out", out, "--json", *more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_report_and_files(tmp_path: Path) -> None:
    out, began = tmp_path / "run", time.time()
    own = ("train.checkpoint_every=1", "train.samples_every=1", "doctor.at_start=stop", "sampling.max_new_tokens=20")
    settings = [word for setting in own for word in ("--set", setting)]
    summary = _train(out, "--steps", "2", *settings, reward="geneval,clip")
    assert {"run", "steps", "seconds", "eval_before", "eval_after", "checkpoint"} <= set(summary)
    assert summary["steps"] == 2
    assert summary["ratio_step0_max_abs_log"] == {"text": 0.0, "image": 0.0}
    assert 0 <= summary["rollout_drift_max_abs"]["text"] <= 1e-5
    assert summary["rollout_drift_max_abs"]["image"] <= 1e-5
    assert {"geneval", "clip", "plan"} <= set(summary["eval_before"]) == set(summary["eval_after"])
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert began < rows[0]["time"] < rows[1]["time"] < time.time()
    page = (Path(__file__).parents[1] / "docs" / "files.md").read_text()
    documented = set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL)))
    for key in {key for row in rows for key in row}:
        known = re.sub(r"/step_\d+$", "/step_0", key)
        if key.startswith("reward/") and not key.endswith(("/abstained", "/spread")):
            known = "reward/NAME/PART" if key.count("/") == 2 else "reward/NAME"
        elif key.startswith("reward/"):
            known = f"reward/NAME/{key.rsplit('/', 1)[1]}"
        assert known in documented, key
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["last", "step_000001", "step_000002"]
    for name in (
        "config.toml",
        "environment.json",
        "doctor.json",
        "eval_before.json",
        "eval_after.json",
        "samples/progress.png",
    ):
        assert (out / name).is_file(), name
    assert (out / "samples" / "step_000000.png").is_file()
    assert (out / "samples" / "step_000002.png").is_file()
    again = unigrpo("eval", "--model", out, "--limit", "1", "--out", tmp_path / "e", "--json", "--set", "eval.steps=2")
    scores = json.loads(again.stdout)["scores"]
    assert scores["geneval"]["mean"] == pytest.approx(summary["eval_after"]["geneval"])


def _metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_the_machine = ("time", "seconds/", "memory/", "warnings")  # a phase may be slower by chance
    return [{k: v for k, v in row.items() if not k.startswith(of_the_machine)} for row in rows]


def test_a_reward_that_fails_in_the_middle_loses_nothing(tmp_path: Path, small_model: Path) -> None:
    plugin = tmp_path / "fickle.py"
    body = '    if split == "train" and step == 1 and {broken}:\n        raise OSError("judge is down")\n'
    head = 'from unigrpo_cli import reward\n\n@reward("fickle")\ndef fickle(prompts, step, split):\n'
    tail = "    return [float(len(p) % 3 + k % 2) for k, p in enumerate(prompts)]\n"
    plugin.write_text(head + body.format(broken=True) + tail)
    run = tmp_path / "run"
    more = ["--plugin", plugin, "--model", small_model, "--steps", "2", "--out", run]
    result = unigrpo(*SMALL, "--reward", "fickle", *more)
    assert result.exit_code == 3
    assert "judge is down" in result.stderr
    assert (run / "checkpoints" / "step_000001").is_dir()
    plugin.write_text(head + body.format(broken=False) + tail)
    resumed = unigrpo("train", "--resume", run, "--plugin", plugin, "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["steps"] == 2
    assert len(_metrics(run)) == 2


@pytest.mark.long
def test_an_interrupted_run_can_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        "from unigrpo_cli.cli import main; main()",
        *SMALL,
        "--reward",
        "clip",
        "--out",
        str(run),
    ]
    process = subprocess.Popen(
        [*command, "--steps", "500", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    summary = json.loads(output)
    assert summary["interrupted"]
    steps = summary["steps"]
    assert 1 <= steps < 500
    assert unigrpo("generate", "a red heart", "--model", run, "--out", tmp_path / "g").exit_code == 0
    resumed = unigrpo("train", "--resume", "auto", "--out", run, "--steps", str(steps + 1), "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["steps"] == steps + 1
    assert len(_metrics(run)) == steps + 1


def test_adapters_train_save_and_load(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lora = ["--set", "train.finetune=lora", "--set", "train.lora_rank=4", "--set", "train.lr_image=1e-2"]
    summary = _train(run, "--steps", "1", *lora)
    assert summary["ratio_step0_max_abs_log"] == {"text": 0.0, "image": 0.0}
    checkpoint = run / "checkpoints" / "step_000001"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in checkpoint.iterdir()}
    assert not (checkpoint / "ema.safetensors").exists()

    def painted(*model: str | Path) -> bytes:
        out = tmp_path / f"g{len(list(tmp_path.iterdir()))}"
        result = unigrpo("generate", "a red heart", "--out", out, "--json", *model)
        assert result.exit_code == 0, result.output
        return Path(json.loads(result.stdout)["images"][0]["path"]).read_bytes()[-2000:]

    assert painted("--model", run) == painted("--adapter", checkpoint)
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


def test_adapters_of_a_model_directory(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Saved without asking anybody what the base looks like, in names that peft itself reads."""
    import peft

    base, checkpoint = embedded_directory(), tmp_path / "adapter"
    policy = prepare_policy(load_model(str(base)), load_config(overrides=["train.finetune=lora", "train.lora_rank=2"]))
    save_adapters(policy.network, checkpoint, str(base))
    assert not [warning for warning in recwarn if "config" in str(warning.message)]
    saved = load_file(checkpoint / "adapter_model.safetensors")
    read = peft.PeftModel.from_pretrained(load_model(str(base)).network, str(checkpoint)).state_dict()
    assert len(saved) == 2 * 2 * 7 * 4, "A and B, two experts, seven matrices, four layers"
    for name, value in saved.items():
        assert torch.equal(read[name.replace(".weight", ".default.weight")], value), name
    dropout = json.loads((checkpoint / "adapter_config.json").read_text()) | {"lora_dropout": 0.5}
    (checkpoint / "adapter_config.json").write_text(json.dumps(dropout))
    network = load_model("embedded").network
    load_adapters(network, checkpoint)
    assert not any(module.training for module in network.modules())
    save_file(dict(list(saved.items())[1:]), checkpoint / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="1 tensors of the adapter are missing"):
        load_adapters(load_model("embedded").network, checkpoint)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["sampling.think=false", "eval.rewards=[]"], marks=pytest.mark.long),
        ["objective.text_weight=0", "objective.grad_through_context=false"],
        pytest.param(["sampling.think=false", "eval.rewards=[]", "train.finetune=lora"], marks=pytest.mark.long),
    ],
)
def test_a_run_that_leaves_weights_untouched_can_be_resumed(
    tmp_path: Path, settings: list[str], small_model: Path
) -> None:
    more = [word for setting in settings for word in ("--set", setting)]
    _train(tmp_path / "run", "--model", small_model, "--steps", "1", *more)
    resumed = unigrpo("train", "--resume", tmp_path / "run", "--steps", "2", "--json")
    assert resumed.exit_code == 0, resumed.output


@pytest.mark.parametrize(("updates", "stop"), [(2, 3), pytest.param(1, 4, marks=pytest.mark.long)])
def test_divergence_stops_after_three_bad_steps_with_finite_weights(
    tmp_path: Path, updates: int, stop: int, small_model: Path
) -> None:
    """The first update is finite and huge; what follows is refused, whether in the same step or in the next."""
    rates = ["--set", "train.lr_text=1e18", "--set", "train.lr_image=1e18", "--set", f"train.minibatches={updates}"]
    run = tmp_path / "run"
    result = unigrpo(*SMALL, "--reward", "clip", "--model", small_model, "--out", run, "--steps", "9", *rates)
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "3 steps in a row were skipped" in said
    assert f"resume from a checkpoint before step {stop - 2} with lower train.lr_text" in said
    assert "--resume" in said
    assert ["skipped" in row for row in _metrics(run)] == [False] * (stop - 3) + [True] * 3
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    assert checkpoint.name == f"step_{stop:06d}"
    assert all(v.isfinite().all() for v in load_file(checkpoint / "ema.safetensors").values())
    assert len(list((run / "bad_steps").iterdir())) == 3


def test_adapters_off_is_the_start() -> None:
    """The reference of LoRA is the same network without its adapters; afterwards they are on again."""
    config = load_config(overrides=["train.finetune=lora", "train.lora_rank=4"])
    start = load_model("embedded")
    policy = prepare_policy(load_model("embedded"), config)
    assert adapter_of(policy.network)
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.tensor([[1, 9, 12, 2]])

    def states(model) -> torch.Tensor:
        with torch.no_grad():
            return model.forward(model.empty_context(1), ids).hidden_BLC

    with policy.reference() as reference:
        assert torch.equal(states(reference), states(start))
    assert not torch.allclose(states(policy), states(start), atol=1e-2)
    names = [n for n, p in policy.network.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in n for n in names)


def test_a_frozen_copy_is_the_start() -> None:
    """The reference of full tuning stays where training began, and is not trained."""
    start = load_model("embedded")
    policy = prepare_policy(load_model("embedded"), load_config())
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    ids = torch.tensor([[1, 9, 12, 2]])
    with torch.no_grad(), policy.reference() as reference:
        here, there = (m.forward(m.empty_context(1), ids).hidden_BLC for m in (reference, start))
        moved = policy.forward(policy.empty_context(1), ids).hidden_BLC
    assert torch.equal(here, there)
    assert not torch.allclose(moved, there, atol=1e-2)
    assert not any(p.requires_grad for p in policy.frozen.parameters())


def test_each_expert_has_its_learning_rate() -> None:
    config = load_config(overrides=["train.lr_text=0.5", "train.lr_image=0.25"])
    policy = prepare_policy(load_model("embedded"), config)
    groups = {g["expert"]: g for g in make_optimizer(policy, config).param_groups}
    assert (groups["text"]["lr"], groups["image"]["lr"]) == (0.5, 0.25)
    named = {id(p): n for n, p in policy.network.named_parameters()}
    assert all("_moe_gen" in named[id(p)] for p in groups["image"]["params"])
    assert not any("_moe_gen" in named[id(p)] for p in groups["text"]["params"])


@pytest.mark.parametrize("setting", ["sampling.think=false", "train.experts=text", "train.experts=image"])
def test_a_run_of_one_kind_says_so(tmp_path: Path, setting: str, small_model: Path) -> None:
    """What the command reports of first ratios, where one kind of action is not drawn or not trained."""
    more = ["--set", "eval.rewards=[]"] if "think=false" in setting else []
    summary = _train(tmp_path / "run", "--model", small_model, "--steps", "1", "--set", setting, *more)
    row = _metrics(tmp_path / "run")[0]
    assert all(value == value for value in row.values())
    kinds = {"sampling.think=false": {"image"}, "train.experts=text": {"text"}, "train.experts=image": {"image"}}
    for kind in ("text", "image"):
        trained = f"{kind}/first_max_abs_log_ratio" in row
        assert trained == (kind in kinds[setting])
        assert (summary["ratio_step0_max_abs_log"][kind] == 0.0) == trained
        assert row.get(f"{kind}/first_max_abs_log_ratio", 0.0) == 0.0


def test_prompts_go_round_and_depend_on_the_step_alone() -> None:
    config = load_config(overrides=["train.prompts_per_step=4", "train.minibatches=1"])
    prompts = [Prompt(str(k), str(k)) for k in range(10)]
    seen = [p.text for step in range(5) for p in prompts_for(prompts, config, step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(p.text for p in prompts)
    assert seen[:10] != seen[10:]
    assert prompts_for(prompts, config, 3) == prompts_for(prompts, config, 3)
    few = prompts_for(prompts[:1], config, 0)
    assert len({p.id for p in few}) == 4, "a prompt that comes twice in a step gets noise of its own"
    pair = [Prompt("a", "same"), Prompt("b", "same")]
    assert sorted(p.id for p in prompts_for(pair, config, 0)) == ["a", "a@1", "b", "b@1"], "ids count, not texts"
    odd = [Prompt("a", "a"), Prompt("a@1", "b")]
    for step in range(5):
        assert len({p.id for p in prompts_for(odd, config, step)}) == 4, "also where a list has such names itself"


def test_the_window_is_drawn_per_step() -> None:
    config = load_config()
    starts = {window_of(config, step).start for step in range(40)}
    low, high = config.sampling.window_range
    assert starts == set(range(low, high - config.sampling.window_size + 1))
    assert window_of(config, 7) == window_of(config, 7)


@pytest.mark.long
def test_a_held_out_reward_that_falls_is_told_of_once(tmp_path: Path) -> None:
    """Weight 0: never trained on, only watched; it parts from the trained one, and the run says so."""
    plugin = tmp_path / "two.py"
    plugin.write_text(
        "from unigrpo_cli import reward\n\n"
        '@reward("up", range=(0, 100))\ndef up(images, step):\n'
        "    return [step + k / 100 for k in range(len(images))]\n\n"
        '@reward("down", range=(-100, 0))\ndef down(images, step):\n'
        "    return [-step + k / 100 for k in range(len(images))]\n"
    )
    small = ["train.prompts_per_step=2", "train.group_size=2", "sampling.steps=4", "sampling.window_range=[0, 3]"]
    small += ["sampling.think=false", "eval.limit=1", "eval.steps=2", "eval.rewards=[]", "train.samples_every=0"]
    small = [part for s in small for part in ("--set", s)]
    told = ["train", "--plugin", str(plugin), "--steps", "23", *small]
    done = CliRunner().invoke(app, [*told, "--reward", "up,down:0", "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    text = " ".join(done.stderr.split())
    assert text.count("held-out reward down has been falling for 20 steps") == 1
