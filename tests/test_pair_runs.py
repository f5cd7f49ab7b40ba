"""Pairs through the ordinary commands, a pair that learns, and pairs whose files are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_pair
import torch
from commands import unigrpo

from unigrpo_cli import RewardContext, reward
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.family import MODELS
from unigrpo_cli.models.pair import facts
from unigrpo_cli.models.pair.facts import KLEIN
from unigrpo_cli.models.pair.family import PairFamily
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.train import train
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

SMALL = (
    "sampling.max_new_tokens=5",
    "sampling.height=8",
    "sampling.width=8",
    "sampling.steps=4",
    "sampling.window_range=[0, 3]",
    "sampling.window_size=2",
    "train.prompts_per_step=2",
    "train.minibatches=1",
    "train.lr_decay=0",
)
PROMPTS = [Prompt("a", "a red circle"), Prompt("b", "two stars")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pair.write("z-image", tmp_path_factory.mktemp("pair") / "model")


@reward("letters", range=(0, 1))
def letters(reasoning):
    """Share of letters and spaces in what was written."""
    return [np.mean([c.isascii() and (c.isalpha() or c == " ") for c in (t or "?")[7:] or "?"]) for t in reasoning]


@reward("light", range=(0, 255))
def light(pixels):
    """Mean brightness of the picture."""
    return [float(p.mean()) for p in pixels]


def _learn(model: Path, *settings: str) -> tuple[np.ndarray, dict[str, bool]]:
    """Mean scores by step and reward, and which experts have moved."""
    own = ("train.steps=40", "train.group_size=16", "train.lr_text=2e-2", "train.lr_image=4e-3", "sampling.steps=3")
    sizes = (
        "sampling.batch_size=8",
        "train.micro_batch_size=8",
        "sampling.noise_level=0.7",
        "train.prompts_per_step=1",
    )
    more = ("objective.penalty=none", "objective.image_clip=1e-4", "advantage.combine=gdpo")
    config = load_config(preset="paper", overrides=[*SMALL, *own, *sizes, *more, *settings])
    policy = PairFamily().load(model, None, device=torch.device("cpu"), dtype=torch.float32, vae_tile_rows=0)
    policy = prepare_policy(policy, config)
    before = {name: [p.detach().clone() for p in own] for name, own in policy.trainable().items()}
    state = TrainState(policy, make_optimizer(policy, config))
    plugins = Plugins()
    plugins.rewards.add("letters", letters)
    plugins.rewards.add("light", light)
    seen: list[list[float]] = []
    with Scorer(parse_rewards(["letters,light"]), plugins, RewardContext("cpu", 0, False, True)) as rewards:

        def keep(step) -> bool:
            seen.append([float(step.scored[name].scores.mean()) for name in ("letters", "light")])
            return False

        train(state, PROMPTS, rewards, config, keep)
    moved = {n: any(not torch.equal(a, b) for a, b in zip(before[n], own, strict=True))
             for n, own in policy.trainable().items()}  # fmt: skip
    return np.array(seen), moved


@pytest.mark.long
def test_a_pair_learns_words_and_pictures_from_one_advantage(model: Path) -> None:
    """Both rewards rise over 40 steps, and neither with shuffled advantages; both experts move."""
    learned, moved = _learn(model)
    control, _ = _learn(model, "advantage.shuffle=true")
    gain, still = (rows[-8:].mean(0) - rows[:8].mean(0) for rows in (learned, control))
    assert moved == {"text": True, "image": True}
    assert gain[0] > 0.05 > abs(still[0])  # seen: 0.11 and 0.00
    assert gain[1] > 3 > abs(still[1])  # seen: 5.4 and 1.6


@pytest.mark.parametrize("kind", ["z-image", pytest.param("flux2-klein", marks=pytest.mark.long)])
def test_a_pair_goes_through_the_commands(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect, train, resume, generate from the run, eval: a pair is a model as any other."""
    monkeypatch.setitem(facts.PAINTERS, KLEIN.pipeline, tiny_pair.SMALL)
    model = tiny_pair.write(kind, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo stars\n")
    sizes = ("sampling.batch_size=4", "train.micro_batch_size=4", "train.group_size=2", "dtype=float32", "eval.steps=2")
    more = ("train.finetune=lora", "train.lora_rank=2", "doctor.at_start=off", "train.samples_every=0", "eval.limit=1")
    small = [part for key in (*SMALL, *sizes, *more) for part in ("--set", key)]

    def do(*arguments: str) -> dict:
        done = unigrpo(*arguments, "--json")
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.stdout)

    seen = do("inspect", str(model))
    assert (seen["family"], seen["kind"], seen["problems"]) == ("pair", kind, [])
    out, prompts = str(tmp_path / "run"), str(tmp_path / "prompts.txt")
    given = ["--model", str(model), "--prompts", prompts, "--reward", "jpeg,length", "--steps", "1", "--out", out]
    assert do("train", *given, *small)["steps"] == 1
    assert do("train", "--resume", out, "--steps", "2")["steps"] == 2
    painted = do("generate", "a star", "--model", out, "--out", str(tmp_path / "pictures"))
    assert painted["images"][0]["reasoning"].startswith("<think>")
    suite = ["--set", f"eval.suite={prompts}", "--reward", "jpeg", "--set", "eval.steps=2"]
    assert do("eval", "--model", out, *suite, "--set", "sampling.batch_size=2")["n"] > 0


# ----- broken directories


def _remove(*names: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for name in names:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


def _json(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda directory: tiny_pair.edit_json(directory / name, **changes)


def _cut(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(whole[: len(whole) // 2])

    return change


PAINTER = "transformer/diffusion_pytorch_model.safetensors"
BROKEN = {
    "index": (_text("model_index.json", "{"), r"model_index.json is damaged"),
    "folder": (_remove("vae"), "is not a complete model: vae/ is missing"),
    "config": (_remove("transformer/config.json"), "is not a complete model: config.json is missing"),
    "list": (_text("text_encoder/config.json", "[]"), "is damaged .a JSON object is needed"),
    "weights": (_remove(PAINTER), r"transformer has no .safetensors file"),
    "truncated": (_cut(PAINTER), "truncated"),
    "pointer": (_text(PAINTER, "version https://git-lfs.github.com/spec/v1\n"), "is a git-lfs pointer"),
    "width": (_json("transformer/config.json", cap_feat_dim=24), "states are 16 x 1 wide, the painter takes 24"),
    "channels": (_json("vae/config.json", latent_channels=8), "has 8 latent channels, the painter takes 4"),
    "painter": (_json("transformer/config.json", _class_name="SanaTransformer2DModel"), "transformer is a Sana"),
    "scheduler": (_json("scheduler/scheduler_config.json", use_karras_sigmas=True), "use_karras_sigmas=True is not"),
    "words": (_text("tokenizer/tokenizer.json", "{}"), "unreadable tokenizer"),
    "shape": (_json("text_encoder/config.json", intermediate_size=40), r"mismatched tensors, e.g. .*model.layers.0"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_directory_is_one_line(what: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    change, says = BROKEN[what]
    change(tmp_path / "model")

    def load() -> None:
        found = MODELS.find(str(tmp_path / "model"))
        found.family.load(found.directory, None, device=torch.device("cpu"), dtype=torch.float32, vae_tile_rows=0)

    with pytest.raises(WeightsError, match=says) as raised:
        load()
    assert len(str(raised.value).splitlines()) == 1
