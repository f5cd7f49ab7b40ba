"""Families of models: who recognises a directory, and a family that a stranger brings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from unigrpo_cli.cli import app
from unigrpo_cli.config import load_config
from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.models.family import MODELS, ModelRegistry
from unigrpo_cli.models.hub import embedded_directory, is_hub_id
from unigrpo_cli.models.mot.family import MoTFamily
from unigrpo_cli.run.setup import choose_attention, device_of


def test_the_embedded_model_is_found_by_its_name() -> None:
    found = MODELS.find("embedded")
    assert found.family.name == "mot"
    assert found.directory == embedded_directory()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("adapter_config.json", "is an adapter: give its base with --model, and it with --adapter"),
        (
            "model_index.json",
            r"\(mot: it is a diffusers pipeline; pair: model_index.json names None; known are ZIm",
        ),
        (
            "config.json",
            r"no known family \(mot: it has neither llm_config.json nor ema.*; pair: it has no model_",
        ),
        ("README.md", "is a model of no known family"),
        ("ema.safetensors", "is not a complete model: llm_config.json is missing"),
    ],
)
def test_a_directory_that_cannot_be_loaded_is_named(tmp_path: Path, file: str, says: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(WeightsError, match=says):
        MODELS.sizes(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("ORG/some.model-2", True), ("./model", False), ("../model", False), ("/models/x", False), ("a/b/c", False)],
)
def test_a_path_is_no_hub_id(name: str, is_id: bool) -> None:
    assert is_hub_id(name) == is_id


def test_each_family_says_why_it_takes_no_directory(tmp_path: Path) -> None:
    class Other(MoTFamily):
        name = "other"

        def reject(self, directory: Path) -> str | None:
            return "no painter in it"

    registry = ModelRegistry()
    registry.add(Other())
    with pytest.raises(WeightsError, match=r"\(other: no painter in it; mot: it has neither"):
        registry.find(str(tmp_path))
    with pytest.raises(UsageError, match="two model families are named 'mot'"):
        registry.add(type("Mine", (Other,), {"name": "mot"})())


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("auto", "flash efficient"), ("flash", "flash"), ("efficient", "efficient"), ("cudnn", "cudnn"), ("math", "")],
)
def test_the_attention_kernel_is_a_setting(name: str, allowed: str) -> None:
    """By default cuDNN's is left out: it plans anew for each number of keys, so for every token of a text."""
    cuda = torch.backends.cuda
    try:
        device_of(load_config(overrides=["device=cpu", f"attention={name}"]))
        found = {
            "flash": cuda.flash_sdp_enabled(),
            "efficient": cuda.mem_efficient_sdp_enabled(),
            "cudnn": cuda.cudnn_sdp_enabled(),
        }
    finally:
        choose_attention("auto")
    assert " ".join(kernel for kernel, on in found.items() if on) == allowed
    assert cuda.math_sdp_enabled()


def test_a_plugins_family_is_sampled_and_audited_by_the_commands(tmp_path: Path) -> None:
    """`unigrpo_register_models` is all that a model needs: nothing here is known of its network."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bigram.txt").write_text("3")
    plugin = ["--plugin", str(Path(__file__).parent / "stranger_model.py"), "--json"]

    def do(*arguments: str) -> dict:
        done = CliRunner().invoke(app, [*arguments, *plugin])
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.stdout)

    model = str(tmp_path / "model")
    try:
        painted = do("generate", "red square", "--model", model, "-n", "2", "--out", str(tmp_path / "out"))
        assert len(painted["images"]) == 2
        assert Image.open(painted["images"][0]["path"]).size == (32, 32)
        assert do("inspect", model) == {"words": 5, "family": "bigram", "memory_gib": {}}
        out = str(tmp_path / "rollout")
        rows = ["--set=sampling.batch_size=3", "--group-size=2", "--limit=2", "--reward=length"]
        assert do("rollout", "--model", model, *rows, "--out", out)["episodes"] == 4
    finally:
        MODELS._families.pop("bigram", None)
