"""Supervised fine-tuning: its losses in closed form, what is imitated, how a run ends and resumes, and refused data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import Result

from tests import small, tiny_pair
from tests.chaos import differences
from tests.commands import unigrpo
from tools.toy_answers import write_answers
from tools.toy_model import build_model
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.objective import Actions, Advantages, NoisedImage, Objective, Scores
from unigrpo_cli.algo.supervised import supervised_loss
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Episode, ImageActions, TextActions, flatten
from unigrpo_cli.errors import UsageError
from unigrpo_cli.evaluate import NO_NOISE, train_sampling
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.pair import facts
from unigrpo_cli.models.pair.facts import KLEIN
from unigrpo_cli.models.pair.family import PairFamily
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.replay import collate
from unigrpo_cli.rollout import read_given, rollout
from unigrpo_cli.run.answers import demonstrations, keep_rule, read_answers
from unigrpo_cli.run.episode_files import load_episodes
from unigrpo_cli.sft import episode_of, sft_step
from unigrpo_cli.train import train
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

NO_ADVANTAGES = Advantages(torch.zeros(0, 0), ())


TINY = ("sampling.height=16", "sampling.width=16")


def settings(data: Path | str, *more: str, **named: object) -> Config:
    fast = ("sampling.max_new_tokens=20", "threads=1", "train.micro_batch_size=3", "train.minibatches=2")
    found = load_config(overrides=[*fast, "train.prompts_per_step=4", *more], named={"sft.data": (str(data),)})
    return found.model_copy(update=named)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six answers of the shapes world."""
    return write_answers(tmp_path_factory.mktemp("answers"), 6)


# ----- losses


def objective(text: float = 1.0, image: float = 1.0) -> Objective:
    return Objective(text, image, 0.2, 1e-6, 0.0, "ratio-norm", "none", 0.0)


def random_scores(rows: int = 3, offset: float = 0.5) -> tuple[Actions, Scores, torch.Tensor, torch.Tensor]:
    """Scores of random logits, and velocities that miss their targets by `offset` everywhere."""
    generator = torch.Generator().manual_seed(0)
    logits_BLV = torch.randn(rows, 5, 7, generator=generator, dtype=torch.float64)
    id_BL = torch.randint(7, (rows, 5), generator=generator)
    mask_BL = torch.arange(5) < torch.tensor([5, 2, 0][:rows])[:, None]
    target_BKND = torch.randn(rows, 4, 6, 3, generator=generator, dtype=torch.float64)
    image = NoisedImage(target_BKND, torch.zeros(rows, 4), target_BKND, 1)
    log_prob_BL = logits_BLV.log_softmax(-1).gather(-1, id_BL[..., None])[..., 0].masked_fill(~mask_BL, torch.nan)
    scores = Scores(log_prob_BL, log_prob_BL, (target_BKND + offset,))
    return Actions(mask_BL, torch.zeros_like(id_BL), (), (image,)), scores, logits_BLV, id_BL


def test_losses_are_torchs_cross_entropy_and_the_known_square() -> None:
    """Tokens: the mean of each row, then of all rows, one without text among them. Images: a known error's square."""
    actions, scores, logits_BLV, id_BL = random_scores()
    loss = supervised_loss(actions, scores, scores, None, NO_ADVANTAGES, objective(2.0, 3.0), episodes=3)
    by_row = [F.cross_entropy(logits_BLV[b, :n], id_BL[b, :n]) for b, n in ((0, 5), (1, 2))]
    torch.testing.assert_close(loss.means["sft/text_loss"], (by_row[0] + by_row[1]) / 3)
    torch.testing.assert_close(loss.means["sft/image_loss"], torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(loss.total, 2 * loss.means["sft/text_loss"] + 3 * loss.means["sft/image_loss"])


@pytest.mark.parametrize(("text", "image"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_weight_of_0_leaves_its_loss_out(text: float, image: float) -> None:
    actions, scores, _, _ = random_scores()
    loss = supervised_loss(actions, scores, scores, None, NO_ADVANTAGES, objective(text, image), episodes=3)
    assert list(loss.means) == ["sft/text_loss" if text else "sft/image_loss"]


def test_a_step_sums_up_what_the_network_says_of_each_answer(rows: Path) -> None:
    """The same losses from forward passes written out here: of each answer alone, at its own times and noise."""
    config = settings(rows, "train.minibatches=1", "sft.times=2", "train.lr_text=0", "train.lr_image=0")
    state = small.state_of(config)
    own = demonstrations(state.policy, read_answers(config), config)[:4]
    stepped = sft_step(state, own, None, config)
    text, image = [], []
    for group in stepped.groups:
        (episode,) = group.episodes
        words = next(s for s in episode.segments if isinstance(s, TextActions))
        (picture,) = episode.images
        context = read_given(state.policy, [episode.segments[:-2]])
        out = state.policy.forward(context, torch.tensor([[*words.opening, *words.ids.tolist()]]))
        text.append(F.cross_entropy(state.policy.logits(out.hidden_BLC[0, :-1]), words.ids))
        seen = state.policy.forward(out.context, image=noisy(episode, picture)[0]).velocity_BKND
        image.append(F.mse_loss(seen[0], noisy(episode, picture)[1]))
    assert stepped.metrics["sft/text_loss"] == pytest.approx(float(torch.stack(text).mean().detach()), rel=1e-5)
    assert stepped.metrics["sft/image_loss"] == pytest.approx(float(torch.stack(image).mean().detach()), rel=1e-5)
    assert stepped.metrics["text/grad_norm"] > 0 < stepped.metrics["image/grad_norm"]
    assert stepped.updates == 1


def noisy(episode: Episode, picture: ImageActions) -> tuple[NoisyImage, torch.Tensor]:
    """The noised images of an answer and their velocities, as its batch has them."""
    (found,) = collate([episode], draws=len(picture.times) - 1).actions.noised
    t_KND = found.t_BK[0, :, None, None]
    x_0 = flow.data_estimate(found.x_BKND[0], found.target_BKND[0], t_KND)
    torch.testing.assert_close(x_0, picture.latent.expand_as(x_0), atol=1e-5, rtol=0)
    return NoisyImage(found.x_BKND, found.t_BK, picture.grid), found.target_BKND[0]


def test_it_learns_answers_by_heart(rows: Path) -> None:
    """After 30 steps on two answers the most likely words are theirs, and velocities are better than at the start."""
    more = ("train.minibatches=1", "train.prompts_per_step=2", "train.steps=30", "sft.times=2", *TINY)
    rates = ("train.lr_text=2e-2", "train.lr_image=2e-2", 'train.extra_modules=["head"]')
    config = settings(rows, *more, *rates)
    state, seen = small.state_of(config), list[dict[str, float]]()
    own = demonstrations(state.policy, read_answers(config), config)[:2]
    train(state, own, None, config, lambda done: bool(seen.append(done.metrics)), sft_step)
    assert seen[0]["sft/text_loss"] > 3
    assert seen[-1]["sft/text_loss"] < 0.1
    first, last = (float(np.mean([m["sft/image_loss"] for m in part])) for part in (seen[:5], seen[-5:]))
    assert last < 0.5 * first
    greedy = replace(train_sampling(config), temperature=0.0, batch_size=4, steps=1)
    told = flatten(rollout(state.policy, own, 1, greedy, NO_NOISE, 0))
    assert [e.reasoning for e in told] == [row.metadata["reasoning"] for row in own]


def test_a_dropped_answer_is_what_guidance_compares_with(rows: Path) -> None:
    """At share 1 no prompt and no words are left, and the text loss is gone; the picture and its noise are the same."""
    config = settings(rows, "sft.drop=1")
    state = small.state_of(config)
    own = demonstrations(state.policy, read_answers(config), config)[:4]
    (whole, dropped) = (episode_of(state.policy, own[0], settings(rows, f"sft.drop={p}"), 7) for p in (0, 1))
    assert [type(s) for s in dropped.segments] == [ImageActions]
    assert torch.equal(whole.images[0].latent, dropped.images[0].latent)
    metrics = sft_step(state, own, None, config).metrics
    assert "sft/text_loss" not in metrics
    assert metrics["sft/image_loss"] > 0


# ----- what is imitated


def test_a_row_becomes_the_models_own_tokens_and_latents(rows: Path) -> None:
    """Words that decode to the row's, closed by the stop token; pixels that decode to the file's."""
    config, model = settings(rows), build_model(seed=3, width=32, layers=2)
    answers = read_answers(config)
    for answer, row in zip(answers, demonstrations(model, answers, config), strict=True):
        episode = episode_of(model, row, config, 0)
        words = next(s for s in episode.segments if isinstance(s, TextActions))
        assert model.decode_text(words.ids) == words.text == answer.reasoning
        assert words.ids[-1] == model.stop_id
        assert words.finished
        decoded = model.decode_pixels(episode.images[0].latent[None], episode.images[0].grid)[0]
        assert torch.equal(decoded, episode.pixels)
        assert row.text == answer.prompt


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("best:1", [2]),
        ("best:2", [0, 2]),
        ("best:9", [0, 1, 2, 4]),
        ("above:0.5", [0, 2]),
        ("above:0.9", []),
        ("above:-1", [0, 1, 2, 4]),
    ],
)
def test_rules_of_which_episodes_are_kept(rule: str, kept: list[int]) -> None:
    """Of the scores .7, .5, .9, none, .5: the first of equal ones, never one without a score, and none at the limit."""
    keep = keep_rule(rule)
    assert keep is not None
    assert sorted(keep([0.7, 0.5, 0.9, None, 0.5])) == kept


@pytest.mark.parametrize("rule", ["best", "best:0", "best:x", "best:1.5", "above:", "above:nan", "top:3", "1"])
def test_other_rules_are_refused(rule: str) -> None:
    with pytest.raises(UsageError, match=f"--keep {rule}: give best:N or above:X"):
        keep_rule(rule)


@pytest.fixture(scope="module")
def rolled(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rollout of the small model: two groups of three, scored."""
    out = tmp_path_factory.mktemp("rolled") / "r"
    small = [part for s in ("sampling.steps=6", "threads=1") for part in ("--set", s)]
    common = ("--reward", "jpeg:-2", "--model", small_model, "--limit", 2, "--group-size", 3)
    done(unigrpo("rollout", *common, *small, "--out", out))
    return out


def done(result: Result, code: int = 0) -> Result:
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_saved_episodes_are_imitated_with_their_own_ids_and_latents(rolled: Path, small_model: Path) -> None:
    """The best of each group by the weighted sum: nothing is tokenised or encoded again."""
    config = settings(rolled, "sft.keep=best:1")
    rows = json.loads((rolled / "rewards.json").read_text())
    assert all(row["score"] == -2 * row["rewards"]["jpeg"] for row in rows)
    best = [int(np.argmax([row["score"] for row in rows[k : k + 3]])) for k in (0, 3)]
    saved = [g.episodes[k] for g, k in zip(load_episodes(rolled), best, strict=True)]
    policy = load_model(str(small_model))
    for row, episode in zip(demonstrations(policy, read_answers(config), config), saved, strict=True):
        own = episode_of(policy, row, config, 0)
        words = [s for e in (own, episode) for s in e.segments if isinstance(s, TextActions)]
        assert torch.equal(words[0].ids, words[1].ids)
        assert words[0].closing == words[1].closing
        assert torch.equal(own.images[0].latent, episode.images[0].latent)


def test_episodes_of_another_model_are_refused(rolled: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(rolled, tmp_path / "copy"))
    text = (copy / "episodes.json").read_text()
    data = json.loads(text)
    for segment in data["groups"][0]["episodes"][0]["segments"]:
        if segment["kind"] == "text":
            segment["text"] += " x"
    (copy / "episodes.json").write_text(json.dumps(data))
    config, model = settings(copy), build_model(seed=0, width=32, layers=2)
    with pytest.raises(UsageError, match="copy, group 0, member 0: its reasoning was written by a model with other"):
        demonstrations(model, read_answers(config), config)


# ----- pairs


@pytest.mark.parametrize("kind", tiny_pair.KINDS)
def test_a_pair_imitates_answers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its encoder undoes its latents' scaling, its words come back, and both networks learn."""
    monkeypatch.setitem(facts.PAINTERS, KLEIN.pipeline, tiny_pair.SMALL)
    model = tiny_pair.write(kind, tmp_path / "model")
    policy = PairFamily().load(model, None, device=torch.device("cpu"), dtype=torch.float32, vae_tile_rows=0)
    side = 2 * tiny_pair.SIDE[kind]
    pixels = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x_BND = policy.encode_pixels(pixels)
    network = policy.autoencoder.network
    raw = network.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
    if kind == "z-image":
        raw = (raw - network.config.shift_factor) * network.config.scaling_factor
    torch.testing.assert_close(policy.autoencoder.latents(x_BND, policy.grid(side, side)), raw)
    row = {"prompt": "a red circle", "reasoning": "<think>a circle</think>", "image": "a.png"}
    write_answers(tmp_path, 1)
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"image": "images/0000.png"}))
    sizes = (f"sampling.height={side}", f"sampling.width={side}", "sampling.max_new_tokens=40", "sampling.shift=0")
    config = settings(tmp_path / "a.jsonl", *sizes, "train.prompts_per_step=1", "train.minibatches=1")
    prepared = prepare_policy(policy, config)
    own = demonstrations(prepared, read_answers(config), config)
    words = next(s for s in own[0].segments if isinstance(s, TextActions))
    assert policy.decode_text(words.ids) == row["reasoning"]
    metrics = sft_step(TrainState(prepared, make_optimizer(prepared, config)), own, None, config).metrics
    assert metrics["text/grad_norm"] > 0 < metrics["image/grad_norm"]


# ----- runs

FEW = ("train.steps=2", "train.checkpoint_every=1", "train.samples_every=1", "eval.limit=1", "eval.steps=2",
       "eval.rewards=[]", "threads=1", "train.prompts_per_step=4", *TINY)  # fmt: skip


def run(out: Path, data: Path, model: Path, *more: str) -> list[object]:
    words = [part for s in (*FEW, *more) for part in ("--set", s)]
    return ["sft", data, "--model", model, "--reward", "jpeg", "--resume", "auto", "--out", out, *words]


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_resumed_run_equals_an_undisturbed_one(rows: Path, small_model: Path, tmp_path: Path, finetune: str) -> None:
    """Byte for byte: weights, moments, metrics, evaluations, samples; from the checkpoint of step 1."""
    how = (f"train.finetune={finetune}", "sft.drop=0.3", f"eval.suite={rows.with_name('suite.txt')}")
    rows.with_name("suite.txt").write_text("a red circle\n")
    done(unigrpo(*run(tmp_path / "whole", rows, small_model, *how)))
    killed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True))
    shutil.rmtree(killed / "checkpoints" / "step_000002")
    resumed = done(unigrpo(*run(killed, rows, small_model, *how)))
    assert "resuming from step 1" in resumed.output
    assert not differences(tmp_path / "whole", killed)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"sft/text_loss", "sft/image_loss", "loss", "text/grad_norm"} <= lines[0].keys()
    card = (tmp_path / "whole" / "checkpoints" / "last" / "README.md").read_text()
    assert "supervised fine-tuning" in card
    assert "UniGRPO](" not in card


def test_a_run_without_rewards_samples_nothing_to_score(rows: Path, small_model: Path, tmp_path: Path) -> None:
    words = [part for s in (*FEW, "reward.names=[]", "train.steps=1") for part in ("--set", s)]
    told = done(unigrpo("sft", rows, "--model", small_model, "--out", tmp_path / "run", *words, "--json"))
    summary = json.loads(told.stdout)
    assert summary["eval_after"] == {}
    assert not summary["interrupted"]


# ----- refused

GOOD = {"prompt": "a red circle", "reasoning": "<think> red circle a1 </think>", "image": "images/0000.png"}


def line(**changes: object) -> Callable[[Path], str]:
    return lambda place: json.dumps({k: v for k, v in (GOOD | changes).items() if v != "absent"})


def text_file(place: Path) -> str:
    (place / "text.png").write_text("not a picture")
    return line(image="text.png")(place)


BAD_ROWS: dict[str, tuple[Callable[[Path], str], str]] = {
    "not JSON": (lambda place: "{'prompt': 1}", ":2: not JSON"),
    "a list": (lambda place: "[1]", ':2: needs an object with a text "prompt"'),
    "no prompt": (line(prompt="absent"), ':2: needs an object with a text "prompt"'),
    "blank prompt": (line(prompt=" \u200b"), ":2: an empty prompt"),
    "a long prompt": (line(prompt="x" * 20_001), ":2: a prompt of 20,001 characters"),
    "a number for reasoning": (line(reasoning=3), ':2: "reasoning" is 3'),
    "blank reasoning": (line(reasoning=" "), ":2: \"reasoning\" is ' '"),
    "a NUL": (line(reasoning="a\0b"), ":2: it holds a NUL character"),
    "no image": (line(image="absent"), ':2: "image" is None'),
    "a missing image": (line(image="gone.png"), ":2: \"image\" is 'gone.png'"),
    "a text as image": (text_file, "text.png is not readable as a picture"),
    "a directory as image": (line(image="images"), ":2: \"image\" is 'images'"),
    "NaN": (lambda place: '{"prompt": "x", "reasoning": NaN}', ":2: NaN is not JSON"),
    "nested": (lambda place: "[" * 200, ":2: "),
    "unknown words": (line(reasoning="<think> red dodecahedron a1 </think>"), ":2: the model has no word for dodeca"),
    "too long": (line(reasoning="red " * 30), ":2: its reasoning has 31 tokens with the stop token"),
    "a stop token": (line(reasoning="red <|im_end|> red"), ":2: its reasoning holds the token that ends a text"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_line_with_file_and_line(name: str, tmp_path: Path, small_model: Path) -> None:
    write_answers(tmp_path, 1)
    make, says = BAD_ROWS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n" + make(tmp_path) + "\n")
    told = unigrpo("sft", tmp_path / "rows.jsonl", "--model", small_model, "--out", tmp_path / "run")
    (error,) = [own for own in told.stderr.splitlines() if own.startswith("error: ")]
    assert told.exit_code == 2
    assert "Traceback" not in told.output
    assert "rows.jsonl" in error
    assert says in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "more", "says"),
    [
        ((), (), "sft imitates answers: give .jsonl files, or directories"),
        (("gone.jsonl",), (), "no file or directory"),
        (("rows.csv",), (), "rows.csv: give a .jsonl file of"),
        (("empty.jsonl",), (), "empty.jsonl holds no row"),
        (("images",), (), "images holds no episodes"),
        (("answers.jsonl",), ("--keep", "best:1"), "no DATA is a directory"),
        (("answers.jsonl",), ("--keep", "best"), "--keep best: give best:N or above:X"),
        (("answers.jsonl",), ("--set", "sft.text_weight=0", "--set", "sft.image_weight=0"), "nothing is trained"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(
    data: tuple[str, ...], more: tuple[str, ...], says: str, tmp_path: Path, small_model: Path
) -> None:
    write_answers(tmp_path, 1)
    (tmp_path / "rows.csv").write_text("prompt,image\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    out = ("--model", small_model, "--out", tmp_path / "run")
    told = unigrpo("sft", *(tmp_path / name for name in data), *more, *out)
    (error,) = [own for own in told.stderr.splitlines() if own.startswith("error: ")]
    assert told.exit_code == 2
    assert says in error


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "has no rewards.json"), ("[1]", "it is no list of 6"), ("[" + "{}," * 5 + "{}]", "score is 'missing'")],
)
def test_rewards_that_cannot_be_used_are_one_line(content: str | None, says: str, rolled: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(rolled, tmp_path / "copy"))
    (copy / "rewards.json").unlink()
    if content is not None:
        (copy / "rewards.json").write_text(content)
    with pytest.raises(UsageError, match=says):
        read_answers(settings(copy, "sft.keep=best:1"))
