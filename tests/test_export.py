"""Exports, merged weights, model cards, and the upload to a stand-in of the hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from tests.chaos import SETTINGS, write_inputs
from tests.commands import unigrpo
from tests.hub_server import Hub, hub
from unigrpo_cli.config import load_config
from unigrpo_cli.models.mot.bagel import read_release
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.run.setup import load_policy

BAGEL = Path(__file__).parent / "golden" / "bagel_tiny"
TINY = (
    *("train.steps=3", "train.samples_every=3", "eval.every=0", "eval.best=", "sampling.steps=3", "eval.samples=2"),
    *("train.checkpoint_every=3", "train.trace_every=0", "sampling.max_new_tokens=3"),
    *("sampling.window_range=[0,2]", "sampling.window_size=1", "doctor.at_start=off", "dtype=bfloat16"),
    *("train.finetune=lora", "train.lora_rank=2", "train.lr_image=1e-2", "train.lr_text=1e-2"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of adapters on the tiny BAGEL, in bf16."""
    place = tmp_path_factory.mktemp("exported")
    plugin, base = write_inputs(place), place / "BAGEL"
    shutil.copytree(BAGEL, base, ignore=shutil.ignore_patterns("golden*", "rounds*", "README.md"))
    files = (f"model={base}", f"prompts={place / 'prompts.txt'}", f"eval.suite={place / 'prompts.txt'}")
    words = [word for setting in (*SETTINGS, *TINY, *files) for word in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIGRPO_DISABLE_PLUGIN_AUTOLOAD", "1")
        done = unigrpo("train", "--plugin", plugin, "--reward", "moody", "--out", place / "run", *words)
    assert done.exit_code == 0, done.output
    return place / "run"


NAMED = ("--base", "ByteDance-Seed/BAGEL-7B-MoT")


@pytest.fixture(scope="module")
def adapter(run: Path) -> Path:
    """Its export, with the base's name on the hub."""
    done = unigrpo("export", run / "checkpoints" / "last", "--out", run.parent / "adapter", *NAMED)
    assert done.exit_code == 0 and "warning" not in done.stderr, done.output
    return run.parent / "adapter"


@pytest.fixture(scope="module")
def merged_weights(run: Path) -> Path:
    done = unigrpo("export", run, "--merge", "--out", run.parent / "merged", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kind"] == "merged"
    return run.parent / "merged"


def _states(policy) -> torch.Tensor:
    ids = policy.given("prompt", "a red cube").ids[None]
    with torch.no_grad():
        return policy.forward(policy.empty_context(1), ids).hidden_BLC


def test_merged_weights_compute_what_the_adapter_does_in_the_official_names(run: Path, merged_weights: Path) -> None:
    merged, base = read_release(merged_weights), read_release(run.parent / "BAGEL")
    assert not merged.problems and merged.config == base.config
    shapes = [{name: t.shape for name, t in release.tensors.items()} for release in (merged, base)]
    assert shapes[0] == shapes[1], "names and shapes of the release"
    assert {p.name for p in base.directory.iterdir()} <= {p.name for p in merged.directory.iterdir()}
    wide = {name for name, t in merged.tensors.items() if t.dtype == "F32"}
    assert wide and all(".layers." in name for name in wide), "what changed is kept from bf16's rounding"
    config = load_config(overrides=["device=cpu"])
    with_adapter = _states(load_policy(str(run), None, config))
    torch.testing.assert_close(_states(load_model(merged_weights)), with_adapter, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(_states(load_model(base.directory)), with_adapter, atol=1e-3), "training moved it"


def test_an_adapter_loads_in_peft_and_names_its_base(run: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    warned = unigrpo("export", run, "--out", tmp_path / "warned")
    assert "others do not have; give its hub id with --base" in warned.stderr
    names = {path.name for path in adapter.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "samples.png", "curves.png"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "ByteDance-Seed/BAGEL-7B-MoT"
    base = load_model(run.parent / "BAGEL")
    wrapped = PeftModel.from_pretrained(base.network, str(adapter))
    saved = load_file(adapter / "adapter_model.safetensors")
    assert saved
    own = dict(wrapped.named_parameters())
    for name, value in saved.items():
        torch.testing.assert_close(own[name.replace(".weight", ".default.weight")].float(), value.float())
    again = unigrpo("export", run, "--out", adapter)
    assert again.exit_code == 2 and "not empty" in again.stderr


def test_the_card_has_scores_intervals_curve_rewards_and_settings(run: Path, adapter: Path, tmp_path: Path) -> None:
    for path in (run / "checkpoints" / "last", adapter):
        card = ModelCard.load(path / "README.md")
        after = json.loads((run / "eval_after.json").read_text())["scores"]["moody"]
        low, high = after["ci95"]
        assert f"| {after['mean']:.3f} ({low:.3f} to {high:.3f}) |" in card.text
        summary = json.loads((run / "summary.json").read_text())["difference"]["moody"]
        assert f"{summary['mean']:+.3f} ({summary['ci95'][0]:+.3f} to {summary['ci95'][1]:+.3f})" in card.text
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = card.text.split("## Curve")[1].split("##")[0].strip().splitlines()[4:]
        assert [float(line.split(" | ")[1]) for line in curve] == pytest.approx(
            [row["reward/moody"] for row in rows], abs=1e-3
        )
        assert "| moody | `moody/moody" in card.text and "lora_rank = 2" in card.text
        assert card.data.eval_results[0].metric_value == pytest.approx(after["mean"], abs=1e-4)
        assert str(run.parent) not in card.content, "no path of the machine"
        assert "PeftModel.from_pretrained" in card.text
    assert (card.data.base_model, card.data.license) == ("ByteDance-Seed/BAGEL-7B-MoT", "apache-2.0")
    assert "(samples.png)" in card.text and "(curves.png)" in card.text
    with Image.open(adapter / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 1, "something is drawn"
    copy = tmp_path / "edited"
    shutil.copytree(run, copy, symlinks=True)
    (copy / "checkpoints" / "step_000003" / "README.md").write_text("mine")
    assert unigrpo("inspect", copy).exit_code == 0, "a card may be edited"


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch):
    with hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False, raising=False)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False, raising=False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def test_a_run_is_exported_and_pushed(run: Path, adapter: Path, merged_weights: Path, standin: Hub) -> None:
    done = unigrpo("push", run, "--repo", "me/drawn", "--private", *NAMED, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["url"] == f"{standin.url}/me/drawn"
    assert standin.private == {"me/drawn": True}
    assert standin.files["me/drawn"] == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert unigrpo("push", merged_weights, "--repo", "me/whole").exit_code == 0
    assert standin.private["me/whole"] is False
    assert standin.files["me/whole"] == {path.name: path.read_bytes() for path in merged_weights.iterdir()}


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        (".env", [], r"\.env is no file of an export"),
        ("credentials.json", [], r"credentials\.json is no file of an export"),
        ("deep/er/model.safetensors", [], r"model\.safetensors is no file of an export"),
        (".git/config.json", [], r"config\.json is no file of an export"),
        ("reasoner/tokenizer.json", ["--base", "a/b"], "--base a/b: .* names its base"),
    ],
)
def test_only_files_of_an_export_are_pushed(
    adapter: Path, tmp_path: Path, standin: Hub, more: str, options: list[str], said: str
) -> None:
    shutil.copytree(adapter, tmp_path / "card")
    (tmp_path / "card" / more).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "card" / more).write_text("hf_secret")
    done = unigrpo("push", tmp_path / "card", "--repo", "me/drawn", *options)
    assert done.exit_code == 2, done.output
    assert re.search(said, "".join(done.stderr.splitlines()))
    assert not standin.files


def test_an_early_checkpoint_shows_nothing_of_later_steps(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.5, "reward/moody": 0.9}\n')
    (copy / "samples" / "step_000004").mkdir()
    drawn: list = []
    monkeypatch.setattr("unigrpo_cli.report.curves.save_curves", lambda runs, path: drawn.extend(runs))
    done = unigrpo("export", copy, "--out", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.output
    assert "samples.png" not in json.loads(done.stdout)["files"]
    assert drawn[0].curves.steps == (1, 2, 3) and [s.label for s in drawn[0].scores] == ["before"]
    assert len(drawn[0].curves.values["reward/moody"]) == 3


@pytest.mark.parametrize(
    ("where", "repo", "token", "code", "said"),
    [
        ("adapter", "me/drawn", "hf_wrong", 1, "cannot push to me/drawn .* log in with `hf auth login`"),
        ("adapter", "a/b/c", "", 2, "write it as ORG/NAME"),
        ("BAGEL", "me/drawn", "", 2, "make one with `unigrpo export RUN --out DIR`"),
    ],
)
def test_what_cannot_be_pushed(
    adapter: Path,
    standin: Hub,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    repo: str,
    token: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token or standin.token)
    done = unigrpo("push", adapter.parent / where, "--repo", repo)
    assert done.exit_code == code, done.output
    assert re.search(said, " ".join(done.stderr.split()))
    assert not standin.files
