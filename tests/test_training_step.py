"""One training step from inside: what is fixed, what moves, what every setting of the loop does to it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import small
from tools.toy_model import build_model
from unigrpo_cli import RewardContext, train
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.credit import IMAGE, TEXT
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import Group, flatten
from unigrpo_cli.errors import DivergedError, RewardError, UsageError
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.hooks import hookimpl
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.rollout import rollout
from unigrpo_cli.train import MicroBatch, advantages, score_old_and_reference, training_step, update, with_advantages
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy, rate_factor
from unigrpo_cli.training.schedule import objective_of
from unigrpo_cli.training.state import TrainState

SETTINGS = [
    *small.SETTINGS,
    "objective.image_clip=1e-3",
    "objective.penalty_weight=0.1",
    "train.group_size=6",
    "train.minibatches=1",
    "train.lr_text=1e-3",
    "train.lr_image=1e-3",
]
PROMPTS = small.PROMPTS


def _config(*settings: str) -> Config:
    return load_config(overrides=[*SETTINGS, *settings])


def _state(config: Config) -> TrainState:
    model = build_model(seed=3, width=32, layers=2)
    model.network.double()  # so that what should be equal is, to more digits than an error has
    policy = prepare_policy(model, config)
    return TrainState(policy, make_optimizer(policy, config))


def _episodes(policy: MoTPolicy, config: Config) -> list[Group]:
    return rollout(policy, PROMPTS, config.train.group_size, train_sampling(config), flow.Window(0, 2), seed=1)


def _shares(state: TrainState, config: Config) -> list[list[MicroBatch]]:
    advantage_B = torch.linspace(-1, 1, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(2))]
    episodes = flatten(_episodes(state.policy, config))
    return with_advantages(
        score_old_and_reference(state.policy, episodes, config, objective_of(config)),
        advantage_B[:, None].expand(-1, 2),
    )


def _step(config: Config, state: TrainState | None = None) -> tuple[TrainState, dict[str, float], dict]:
    """One update; with its gradients, which the update itself throws away."""
    state = state or _state(config)
    (share,) = _shares(state, config)
    grads = {}

    def keep(_optimizer: object, *_: object) -> None:
        named = state.policy.network.named_parameters()
        grads.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    hook = state.optimizer.register_step_pre_hook(keep)
    terms = update(state, share, objective_of(config), config).terms
    hook.remove()
    return state, terms, grads


def test_micro_batches_change_no_gradient() -> None:
    """The denominator is the step's, whatever the pieces: 12 episodes as 12, as 7 + 5 and as twelve ones."""
    wanted = None
    for size in (12, 7, 1):
        _, terms, grads = _step(_config(f"train.micro_batch_size={size}", "train.grad_clip=1e9"))
        if wanted is None:
            wanted, total = grads, terms["loss"]
            assert max(g.abs().max() for g in grads.values()) > 1e-4
        assert terms["loss"] == pytest.approx(total, rel=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-9)


def test_old_scores_and_reference_stay_while_the_policy_moves() -> None:
    """At first ratio and penalty are exactly nothing; on the same episodes again both are not."""
    config = _config("train.micro_batch_size=5")
    state = _state(config)
    (share,) = _shares(state, config)
    first = update(state, share, objective_of(config), config).terms
    assert first["text/max_abs_log_ratio"] == first["image/max_abs_log_ratio"] == 0
    assert first["image/velocity-mse"] < 1e-20  # a copy of the weights elsewhere in memory may round another way
    again = update(state, share, objective_of(config), config).terms
    assert again["text/max_abs_log_ratio"] > 1e-4
    assert again["image/max_abs_log_ratio"] > 1e-6
    assert again["image/velocity-mse"] > 1e-9


def test_grad_through_context_reaches_the_loss() -> None:
    """Without a text term the text expert learns from images alone: with the option it does, without it not."""
    for taught in (True, False):
        _, _, grads = _step(_config("objective.text_weight=0", f"objective.grad_through_context={str(taught).lower()}"))
        text = [g.abs().max().item() for n, g in grads.items() if "_moe_gen" not in n]
        assert (max(text, default=0.0) > 0) == taught
        assert max(g.abs().max() for n, g in grads.items() if "_moe_gen" in n) > 0


def test_gradients_are_clipped_over_all_weights_together() -> None:
    _, terms, grads = _step(_config("train.grad_clip=1e-3"))
    assert math.hypot(terms["text/grad_norm"], terms["image/grad_norm"]) > 2e-3
    assert torch.stack([g.norm() for g in grads.values()]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_warm_up_scales_the_first_updates() -> None:
    """AdamW's first update moves a weight by the learning rate: a quarter of it with four steps of warm-up."""
    moved = []
    for warmup in (0, 4):
        config = _config(f"train.warmup={warmup}")
        state = _state(config)
        before = {n: p.detach().clone() for n, p in state.policy.network.named_parameters()}
        _step(config, state)
        after = dict(state.policy.network.named_parameters())
        moved.append(max((after[n] - before[n]).abs().max().item() for n in before))
    assert moved[0] == pytest.approx(1e-3, rel=1e-2)
    assert moved[1] == pytest.approx(moved[0] / 4, rel=1e-2)


@pytest.mark.parametrize(("warmup", "factors"), [(0, [1, 2 / 3, 1 / 2, 2 / 5]), (2, [1 / 2, 1, 1, 2 / 3, 1 / 2])])
def test_learning_rates_decay_as_one_over_the_steps(warmup: int, factors: list[float]) -> None:
    config = _config("train.lr_decay=2", f"train.warmup={warmup}")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, found = torch.optim.AdamW([weight]), []
    for _ in factors:
        found.append(rate_factor(optimizer, config))
        weight.grad = torch.ones(1)
        optimizer.step()
    assert found == pytest.approx(factors)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    config = _config()
    state = _state(config)
    (share,) = _shares(state, config)
    before = [p.detach().clone() for p in state.policy.network.parameters()]
    broken = [replace(m, advantages=replace(m.advantages, text_BL=m.advantages.text_BL * math.nan)) for m in share]
    with pytest.raises(DivergedError, match="not finite, so no update was made"):
        update(state, broken, objective_of(config), config)
    assert not state.between
    for own, start in zip(state.policy.network.parameters(), before, strict=True):
        assert torch.equal(own, start)


def test_the_reference_leaves_frozen_adapters_frozen() -> None:
    config = _config("train.finetune=lora", "train.lora_rank=2", "train.experts=image")
    policy = _state(config).policy
    trained = {n: len(p) for n, p in policy.trainable().items()}
    assert trained["text"] == 0 < trained["image"]
    with policy.reference():
        pass
    assert {n: len(p) for n, p in policy.trainable().items()} == trained


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["sampling.think=false", "train.experts=text"], "nothing is trained"),
        (["objective.text_weight=0", "objective.image_weight=0"], "nothing is trained"),
        (["sampling.temperature=0"], "greedy"),
        (['train.extra_modules=["vision"]'], "no vision tower"),
        (["train.finetune=lora", 'train.extra_modules=["head"]'], "train.extra_modules is for"),
    ],
)
def test_what_could_not_learn_is_refused(settings: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        _state(_config(*settings))


# ----- from scores to advantages


def _advantages(plugins: Plugins, *settings: str) -> torch.Tensor:
    scores = {
        "geneval": [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.5],
        "plan": [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    }
    scored = {n: RewardResult(np.array(v), np.ones(8, bool), {}, []) for n, v in scores.items()}
    with Scorer(parse_rewards(["geneval,plan:2"]), plugins, RewardContext("cpu", 0, True, True)) as rewards:
        kind_BS = torch.tensor([[TEXT, IMAGE]] * 8)
        found_BS = advantages(scored, kind_BS, rewards, load_config(overrides=list(settings)), 2, seed=0)
        assert torch.equal(found_BS[:, 0], found_BS[:, 1])
        return found_BS[:, 0]


CLOSE = [0.5, 0.5 + 1e-9, math.nan, 0.9, 0.9, 0.9]


@pytest.mark.parametrize(
    ("scores", "weight", "settings", "said"),
    [
        (CLOSE, 1, [], 1),
        ([0.5, 0.6, 0.5, 0.9, 0.9, 0.9], 1e-6, [], 1),
        ([0.5, 0.6, 0.5, 0.9, 0.9, 0.9], 1e-6, ["advantage.combine=gdpo"], 0),  # divided by its own deviation
        (CLOSE, 1e6, ["advantage.combine=gdpo"], 1),
        (CLOSE, 1, ["advantage.combine=rank"], 0),
        ([0.5, 0.501, 0.5, 0.9, 0.9 + 1e-9, 0.9], 1, [], 0),
        ([0.5, 0.5, 0.5, 0.9, 0.9, math.nan], 1, [], 0),
        ([math.nan] * 6, 1, [], 0),
    ],
)
def test_differences_too_small_for_an_advantage_are_named_once(
    scores: list[float], weight: float, settings: list[str], said: int
) -> None:
    array, plugins = np.array(scores), Plugins()
    plugins.rewards.add("bright", small.bright)
    scored = {"bright": RewardResult(array, np.isfinite(array), {}, [])}
    with (
        Scorer(parse_rewards([f"bright:{weight}"]), plugins, RewardContext("cpu", 0, True, True)) as rewards,
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            advantages(scored, torch.tensor([[TEXT]] * 6), rewards, load_config(overrides=settings), 2, seed=0)
    assert sum("too little for an advantage" in str(w.message) for w in seen) == said


def _loaded() -> Plugins:
    plugins = Plugins()
    plugins.load()
    return plugins


def test_every_choice_of_the_advantage_arrives() -> None:
    """Two rewards of one range are added: totals 0 1 3 3 | 2 2 2 2.5."""
    plain = _advantages(_loaded())
    assert plain[:4].tolist() == pytest.approx([-1.3472, -0.5774, 0.9623, 0.9623], abs=1e-3)
    none = _advantages(_loaded(), "advantage.normalize=none")
    assert none[:4].tolist() == pytest.approx([-1.75, -0.75, 1.25, 1.25])
    batch = _advantages(_loaded(), "advantage.normalize=batch")
    assert batch[:4].tolist() == pytest.approx((none[:4] / none.std(correction=0)).tolist(), rel=1e-4)
    assert _advantages(_loaded(), "advantage.clamp=0.9").abs().max() == pytest.approx(0.9)
    assert _advantages(_loaded(), "advantage.clamp=0", "advantage.normalize=none").abs().max() == pytest.approx(1.75)
    for combine in ("gdpo", "rank"):
        combined = _advantages(_loaded(), f"advantage.combine={combine}")
        assert (combined - plain).abs().max() > 0.05
        assert combined.square().mean() == pytest.approx(1.0, abs=1e-4), "their sum has batch deviation 1 again"
    shuffled = _advantages(_loaded(), "advantage.shuffle=true")
    assert sorted(shuffled.tolist()) == pytest.approx(sorted(plain.tolist()))
    assert (shuffled - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda rewards: [1, 2], r"a tensor of shape \[2, 4\]"),
        (lambda rewards: torch.zeros(8), r"a tensor of shape \[2, 4\]"),
        (lambda rewards: torch.full((2, 4), math.nan), "not finite"),
        (lambda rewards: 1 / 0, "failed in unigrpo_combine_rewards: ZeroDivisionError"),
    ],
)
def test_a_plugins_own_combination_is_checked(answer, says: str) -> None:
    class Combination:
        @hookimpl
        def unigrpo_combine_rewards(self, rewards):
            return answer(rewards)

    plugins = _loaded()
    plugins._register(Combination(), "own", "tests", "-")
    with pytest.raises(RewardError, match=says):
        _advantages(plugins)


def test_a_plugin_that_writes_into_the_rewards_changes_no_advantage() -> None:
    class Writer:
        @hookimpl
        def unigrpo_combine_rewards(self, rewards, valid):
            for tensor in (*rewards.values(), *valid.values()):
                tensor.zero_()

    plugins = _loaded()
    plugins._register(Writer(), "own", "tests", "-")
    assert torch.equal(_advantages(plugins), _advantages(_loaded()))


def test_epochs_and_updates_are_counted() -> None:
    config = _config("train.epochs=2", "train.minibatches=2", "train.prompts_per_step=2", "eval.rewards=[]")
    state = _state(config)
    with Scorer(parse_rewards(["clean"]), _loaded(), RewardContext("cpu", 0, True, True)) as rewards:
        done = training_step(state, PROMPTS, rewards, config, rescore=True)
    assert {int(s["step"]) for s in state.optimizer.state.values()} == {4}
    assert done.metrics["text/max_abs_log_ratio"] > 0 == done.metrics["text/first_max_abs_log_ratio"]
    assert state.between


@pytest.mark.parametrize("minibatches", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_first_updates_old_scores_are_its_own(monkeypatch: pytest.MonkeyPatch, minibatches: int) -> None:
    """A separate pass changes no metric and no weight; only a run's first step makes one and reports the ratio."""
    own = train.score_old_and_reference
    left = {}
    for always in (False, True):
        if always:
            monkeypatch.setattr(train, "score_old_and_reference", lambda *a: own(*a[:5], True))
        config = _config(f"train.minibatches={minibatches}", "train.micro_batch_size=4")
        state = _state(config)
        steps = []
        with Scorer(parse_rewards(["clean"]), _loaded(), RewardContext("cpu", 0, True, True)) as rewards:
            for state.step in (0, 1, 16):
                found = training_step(state, PROMPTS, rewards, config, rescore=state.step == 0).metrics
                steps.append({k: v for k, v in found.items() if not k.startswith(("seconds/", "memory/"))})
        left[always] = steps, [p.detach().clone() for p in state.policy.network.parameters()]
    assert left[True][0] == left[False][0]
    assert all(torch.equal(a, b) for a, b in zip(left[True][1], left[False][1], strict=True))
    ratios = [f"{kind}/first_max_abs_log_ratio" for kind in ("text", "image")]
    assert [[step.get(name) for name in ratios] for step in left[False][0]] == [[0, 0], [None, None], [None, None]]
    assert "text/drift_mean" in left[False][0][1]
