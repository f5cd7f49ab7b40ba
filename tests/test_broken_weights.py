"""Broken weights give an error (exit code 5), never scores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tools.toy_model import build_model
from unigrpo_cli.cli import app
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.models.lora import add_adapters
from unigrpo_cli.models.mot.config import LORA_TARGETS
from unigrpo_cli.run.checkpoint import save_checkpoint
from unigrpo_cli.run.setup import load_policy
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.rng_state import read_generators
from unigrpo_cli.training.state import Origin, Reference, TrainState, prompt_list

TINY = Path(__file__).parent / "golden" / "bagel_tiny"
FAST = [
    "--set=sampling.batch_size=1",
    "--set=sampling.max_new_tokens=2",
    "--set=eval.steps=1",
]
COMMANDS = {
    "generate": ["generate", "a red circle", *FAST],
    "answer": ["generate", "a red circle", "--answer", *FAST],
    "rollout": ["rollout", "--reward=length", "--limit=1", "--group-size=2", *FAST],
    "eval": ["eval", "--reward=length", "--set=eval.limit=1", *FAST],
    "train": ["train", "--reward=length", "--steps=1", *FAST],
}


def _refused(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 5, (done.output, done.exception)
    assert says in " ".join(done.output.split())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run's checkpoint before its first step."""
    config = load_config(overrides=["device=cpu", "train.finetune=full"])
    policy = prepare_policy(build_model(seed=0, width=32, layers=2), config)
    state = TrainState(policy, make_optimizer(policy, config), generators=read_generators())
    state.origin = Origin(config, Reference("embedded", ""), prompt_list([Prompt("a", "a")]), ())
    directory = tmp_path / "run" / "checkpoints" / "step_000001"
    save_checkpoint(state, directory)
    return directory


@pytest.mark.parametrize("command", [*COMMANDS, "inspect"])
def test_a_checkpoint_with_a_flipped_bit_is_refused(
    command: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = checkpoint / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    run = str(tmp_path / "run")
    arguments = ["inspect", run] if command == "inspect" else [*COMMANDS[command], f"--model={run}"]
    _refused(arguments, "ema.safetensors is not what was written (its sha256 differs)", monkeypatch, tmp_path)


def _change(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_weights_that_are_not_finite_are_refused(small_model: Path, tmp_path: Path) -> None:
    """The network's, an adapter's and the autoencoder's: one number among all is enough."""

    def broken(state: dict[str, torch.Tensor]) -> None:
        state[max(state)].view(-1)[-1] = float("inf")

    settings = load_config(overrides=["device=cpu"])
    network = shutil.copytree(small_model, tmp_path / "network")
    _change(network / "ema.safetensors", broken)
    with pytest.raises(Exception, match=r"vae2llm\.weight holds NaN or infinity") as caught:
        load_policy(str(network), None, settings)
    assert caught.value.exit_code == 5
    painter = shutil.copytree(TINY, tmp_path / "painter")
    _change(painter / "ae.safetensors", broken)
    with pytest.raises(Exception, match=r"ae\.safetensors: .* holds NaN or infinity"):
        load_policy(str(painter), None, load_config(preset="paper", overrides=["device=cpu", "sampling.height=32"]))
    adapter = _adapter(tmp_path)
    _change(adapter / "adapter_model.safetensors", broken)
    with pytest.raises(Exception, match=r"adapter: .* holds NaN or infinity"):
        load_policy(str(small_model), str(adapter), settings)


def _adapter(tmp_path: Path) -> Path:
    """A fresh adapter of the small model: it changes nothing yet."""
    policy = build_model(seed=0, width=32, layers=2)
    add_adapters(policy.network, LORA_TARGETS, rank=2, alpha=4.0, seed=0)
    policy.save(tmp_path / "adapter", "small")
    return tmp_path / "adapter"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_logits_and_latents_that_overflow_are_refused(
    command: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are finite here: only sampling shows that they are broken."""
    model = shutil.copytree(small_model, tmp_path / "model")
    name = "language_model.lm_head.weight" if command in ("answer", "eval") else "llm2vae.weight"
    _change(model / "ema.safetensors", lambda state: state[name].fill_(3e38))
    kind = "logits" if "lm_head" in name else "latents"
    _refused([*COMMANDS[command], f"--model={model}"], f"the model's {kind} are NaN or infinite", monkeypatch, tmp_path)


@pytest.mark.parametrize("way", ["lora_B", "alpha"])
def test_an_adapter_that_changes_nothing_is_named(way: str, small_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path)
    settings, said = load_config(overrides=["device=cpu"]), []
    if way == "alpha":
        _change(adapter / "adapter_model.safetensors", lambda state: [x.fill_(1.0) for x in state.values()] and None)
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 0}))
    load_policy(str(small_model), str(adapter), settings, said.append)
    assert len(said) == 1
    assert "changes nothing" in said[0]
    _change(adapter / "adapter_model.safetensors", lambda state: [x.fill_(1.0) for x in state.values()] and None)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 4}))
    load_policy(str(small_model), str(adapter), settings, said.append)
    assert len(said) == 1


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 29212345678\n"


@pytest.mark.parametrize("name", ["ema.safetensors", "tokenizer.json", "llm_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["a git-lfs pointer", "a FIFO", "a device"])
def test_a_file_of_a_model_that_is_no_file_is_refused_at_once(
    kind: str, name: str, small_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(small_model, tmp_path / "model")
    (model / name).unlink()
    if kind == "a git-lfs pointer":
        (model / name).write_text(POINTER)
    elif kind == "a FIFO":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    for arguments in (["inspect", str(model)], ["generate", "a red circle", "--model", str(model)]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 5
        assert f"{name} is {kind}" in " ".join(done.output.split())
    assert kind != "a git-lfs pointer" or "git lfs pull" in " ".join(done.output.split())


def test_an_adapter_of_git_lfs_is_named(small_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path)
    (adapter / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(Exception, match=r"adapter_model\.safetensors is a git-lfs pointer"):
        load_policy(str(small_model), str(adapter), load_config(overrides=["device=cpu"]))


@pytest.mark.parametrize("device", ["mps", "xpu", "tpu:0"])
def test_devices_that_are_not_supported(device: str) -> None:
    done = CliRunner().invoke(app, ["generate", "a red circle", "--set", f"device={device}"])
    assert done.exit_code == 2
    assert f"device={device}: supported are cpu and cuda" in " ".join(done.output.split())
