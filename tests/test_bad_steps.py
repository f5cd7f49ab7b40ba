"""Steps that go bad: nothing moves, the batch is kept for study, one alone goes on, three in a row stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import small
from tests.commands import unigrpo
from unigrpo_cli import RewardContext
from unigrpo_cli import train as train_module
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Group, flatten
from unigrpo_cli.errors import DivergedError, RefusedUpdateError
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.run.episode_files import load_episodes
from unigrpo_cli.run.records import save_bad_step
from unigrpo_cli.train import StepResult, training_step
from unigrpo_cli.training.state import TrainState
from unigrpo_cli.training.update_guard import ENOUGH, check_gradient, check_weights, remember_norms

SETTINGS = [
    *small.SETTINGS,
    "train.group_size=4",
    "train.minibatches=2",
    "train.lora_rank=2",
]
PROMPTS = small.PROMPTS
Weights = list[torch.Tensor]


def _state(*settings: str) -> tuple[TrainState, Config]:
    config = load_config(overrides=[*SETTINGS, *settings])
    return small.state_of(config), config


def _step(state: TrainState, config: Config) -> StepResult:
    plugins = Plugins()
    plugins.rewards.add("bright", small.bright)
    with Scorer(parse_rewards(["bright"]), plugins, RewardContext("cpu", 0, True, True)) as rewards:
        done = training_step(state, PROMPTS, rewards, config, rescore=True)
    state.step += 1
    return done


def _held(state: TrainState) -> Weights:
    """Weights, moments and step counts, as they are now."""
    moments = [value for own in state.optimizer.state.values() for value in own.values()]
    return [t.detach().clone() for t in (*state.policy.network.parameters(), *moments)]


def _equal(a: Weights, b: Weights) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _spoil_loss(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], value: float = math.nan) -> None:
    """The n-th loss of all, counted from 1, is made `value` where `bad(n)`."""
    calls = []
    true_loss = train_module.unigrpo_loss

    def spoilt(*given, **named):
        calls.append(1)
        loss = true_loss(*given, **named)
        return replace(loss, total=loss.total * value) if bad(len(calls)) else loss

    monkeypatch.setattr(train_module, "unigrpo_loss", spoilt)


def _spoil_latents(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """One latent of member 2 of the last group is NaN in the n-th rollout of training, counted from 1."""
    calls = []
    true_rollout = train_module.rollout

    def spoilt(*given, **named) -> list[Group]:
        calls.append(1)
        groups = true_rollout(*given, **named)
        if bad(len(calls)):
            image = groups[-1].episodes[2].segments[-1]
            image.after[0, 1, 0] = math.nan
        return groups

    monkeypatch.setattr(train_module, "rollout", spoilt)


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_nothing_and_its_first_update_stays(
    monkeypatch: pytest.MonkeyPatch, finetune: str, value: float
) -> None:
    """In the second update of the second step: equal to the bit to what the first update left."""
    state, config = _state(f"train.finetune={finetune}")
    _spoil_loss(monkeypatch, lambda n: n == 4, value)
    assert _step(state, config).skipped is None
    before, after = _held(state), []
    hook = state.optimizer.register_step_post_hook(lambda *_: after.append(_held(state)))
    done = _step(state, config)
    hook.remove()
    assert done.skipped.startswith("update 2 of 2: the loss is ")
    assert len(after) == 1, "the first update is made"
    assert _equal(_held(state), after[0])
    assert not _equal(after[0], before)
    assert {int(own["step"]) for own in state.optimizer.state.values()} == {3}
    assert all(p.grad is None for p in state.policy.network.parameters())
    assert done.metrics["text/entropy"] > 0, "the first update's statistics are there"
    assert _step(state, config).skipped is None
    assert {int(own["step"]) for own in state.optimizer.state.values()} == {5}


@pytest.mark.parametrize("expert", ["text", "image"])
def test_a_gradient_that_is_not_finite_names_its_expert(expert: str) -> None:
    state, config = _state("objective.grad_through_context=false")
    before = _held(state)
    weight = state.policy.trainable()[expert][0]
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    done = _step(state, config)
    hook.remove()
    assert done.skipped == (f"update 1 of 2: the gradient of the {expert} expert is not finite, so no update was made")
    assert _equal(_held(state), before)
    assert "loss" not in done.metrics
    assert done.metrics["reward/bright"] > 0, "the rollout's metrics are there"


def test_a_gradient_that_explodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million times the loss is a million times the gradient: far above 1000 medians, and far below 1e9."""
    for limit, refused in ((1000, True), (1e9, False)):
        state, config = _state(f"monitor.explosion={limit}", "train.lr_text=0", "train.lr_image=0")
        with monkeypatch.context() as patch:
            _spoil_loss(patch, lambda n: n == 9, 1e6)
            for _ in range(ENOUGH // 2):
                assert _step(state, config).skipped is None
            before = _held(state)
            done = _step(state, config)
        assert (done.skipped is not None) == refused
        if refused:
            assert "expert exploded: its norm" in done.skipped
            assert _equal(_held(state), before)
        assert all(len(norms) == 8 + 2 * (not refused) for norms in state.record.gradient_norms.values())


def test_what_an_explosion_is_compared_with() -> None:
    """Each expert's own median; none before there are enough; nothing of updates that teach nothing."""
    known: dict = {}
    check_gradient({"text": 1e9}, known, 1000)
    for norm in [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 50.0, 1.0, 1.0]:
        remember_norms({"text": norm, "image": norm / 1e4}, known, taught=True)
    assert len(known["text"]) == ENOUGH - 1, "zeros do not count"
    check_gradient({"text": 1e9}, known, 1000)
    remember_norms({"text": 1e-7}, known, taught=False)
    check_gradient({"text": 1e9}, known, 1000)
    remember_norms({"text": 1.0, "image": 1e-4}, known, taught=True)
    check_gradient({"text": 999.0, "image": 0.0999}, known, 1000)
    with pytest.raises(RefusedUpdateError, match="text expert exploded: its norm 1e\\+03 is above"):
        check_gradient({"text": 1001.0, "image": 0.0}, known, 1000)
    with pytest.raises(RefusedUpdateError, match="image expert"):
        check_gradient({"text": 1.0, "image": 0.11}, known, 1000)
    for _ in range(100):
        remember_norms({"text": 2.0}, known, taught=True)
    assert known["text"] == [2.0] * 32


def test_latents_that_are_not_finite_are_found_before_any_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    state, config = _state()
    before = _held(state)
    _spoil_latents(monkeypatch, lambda n: True)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("a backward pass"))
    done = _step(state, config)
    assert done.skipped == (
        "update 1 of 2: latents or log-probabilities of the rollout are not finite "
        "(first for prompt 'two blue stars', member 2; 1 of 8 episodes)"
    )
    assert _equal(_held(state), before)


@pytest.mark.parametrize("whose", ["old", "reference"])
def test_fixed_scores_that_are_not_finite_are_found(monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    def spoilt(*given, **named):
        shares = score_old_and_reference(*given, **named)
        getattr(shares[1][0], whose).velocities[0][0, 0, 0, 0] = math.inf
        return shares

    score_old_and_reference = train_module.score_old_and_reference
    monkeypatch.setattr(train_module, "score_old_and_reference", spoilt)
    state, config = _state()
    before = _held(state)
    done = _step(state, config)
    assert f"the {'old policy' if whose == 'old' else 'reference'}'s scores" in done.skipped
    assert _equal(_held(state), before), "not even by the first, sound share"


def test_weights_that_overflow_stop_at_once_and_are_never_saved() -> None:
    """The gradient was sound and the update is made, so what is left is of no step."""
    state, config = _state()
    weight = state.policy.trainable()["text"][0]
    state.optimizer.register_step_post_hook(lambda *_: weight.data.view(-1)[0].fill_(math.inf))
    with pytest.raises(DivergedError, match=r"weights overflowed.*lower train\.lr_text") as caught:
        _step(state, config)
    assert not isinstance(caught.value, RefusedUpdateError)
    assert state.between
    check_weights([torch.nn.Parameter(torch.ones(2))], 0)


def test_only_the_last_bad_steps_are_kept(tmp_path: Path) -> None:
    state, config = _state()
    done = _step(state, config)
    for step in (2, 3, 5, 10):
        found = (done.groups, done.scored, done.advantage_BS, {"loss": math.nan})
        path = save_bad_step(tmp_path, step, "why", *found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000005", "step_000010"]
    why = json.loads((path / "bad_step.json").read_text())
    assert why == {
        "step": 10,
        "reason": "why",
        "advantages": done.advantage_BS.tolist(),
        "metrics": {"loss": None},
    }


SMALL = [
    "train",
    "--reward",
    "jpeg",
    *("--set", "train.prompts_per_step=1"),
    *("--set", "train.group_size=3"),
    *("--set", "train.minibatches=1"),
    *("--set", "eval.limit=1"),
    *("--set", "eval.rewards=[]"),
    *("--set", "eval.steps=2"),
    *("--set", "sampling.steps=4"),
    *("--set", "sampling.window_range=[0, 3]"),
    *("--set", "sampling.max_new_tokens=4"),
    *("--set", "train.trace_every=0"),
    *("--set", "threads=1"),
    *("--set", "train.samples_every=0"),
    *("--set", "train.checkpoint_every=1"),
    *("--set", "train.keep_checkpoints=9"),
    *("--set", "doctor.at_start=off"),  # which would find what is planted here before anything is trained
]


def test_one_bad_step_goes_on_and_three_in_a_row_stop(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the loss of step 2, NaN in latents of steps 4, 5 and 6: the run ends with the weights of step 3."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        _spoil_loss(patch, lambda n: n == 2)
        _spoil_latents(patch, lambda n: n in (4, 5, 6))
        result = unigrpo(*SMALL, "--model", small_model, "--out", run, "--steps", "9")
    assert result.exit_code == 1, result.output
    said = " ".join(result.stderr.split())
    assert "warning: step 2: this step was skipped: update 1 of 1: the loss is nan" in said
    assert "error: 3 steps in a row were skipped" in said
    assert "resume from a checkpoint before step 4 with lower train.lr_text and train.lr_image" in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "skipped" in row] == [2, 4, 5, 6]
    assert "member 2; 1 of 3 episodes" in rows[4]["skipped"]

    def saved(step: int, name: str) -> dict[str, torch.Tensor]:
        return load_file(run / "checkpoints" / f"step_{step:06d}" / name)

    for name in ("ema.safetensors", "optimizer.safetensors"):
        kept = [saved(step, name) for step in range(1, 7)]
        assert all(torch.equal(kept[0][k], kept[1][k]) for k in kept[0]), "step 2 moved nothing"
        assert any(not torch.equal(kept[1][k], kept[2][k]) for k in kept[1]), "step 3 is an ordinary one"
        assert all(torch.equal(kept[2][k], kept[5][k]) for k in kept[2]), "nor did 4, 5 and 6"
    assert sorted(p.name for p in (run / "bad_steps").iterdir()) == [f"step_00000{k}" for k in (4, 5, 6)]

    bad = run / "bad_steps" / "step_000005"
    opened = unigrpo("rollout", "--from", bad, "--reward", "jpeg", "--out", tmp_path / "study", "--json")
    assert opened.exit_code == 0, opened.output
    assert json.loads(opened.stdout)["episodes"] == 3
    assert flatten(load_episodes(bad))[2].images[0].after[0, 1, 0].isnan(), "kept as it was"
    scores = [
        [row["rewards"] for row in json.loads((d / "rewards.json").read_text())] for d in (bad, tmp_path / "study")
    ]
    assert scores[0] == scores[1]
    why = json.loads((bad / "bad_step.json").read_text())
    assert (why["step"], why["reason"], len(why["advantages"])) == (5, rows[4]["skipped"], 3)

    record = json.loads((run / "checkpoints" / "step_000006" / "state.json").read_text())["record"]
    assert record["monitor"]["bad_steps"] == 0, "who goes on all the same has three steps again"
    resumed = unigrpo("train", "--resume", run / "checkpoints" / "step_000003", "--steps", "5", "--json")
    assert resumed.exit_code == 0, resumed.output
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert again[:3] == rows[:3]
    assert not any("skipped" in row for row in again[3:])
