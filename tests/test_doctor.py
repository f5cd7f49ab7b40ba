"""The doctor: planted faults, each found by its check; and no fault in a sound run."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import small
from tools.toy_model import build_model
from unigrpo_cli import RewardContext, replay, reward, rollout, train
from unigrpo_cli.algo import flow, objective
from unigrpo_cli.algo.text import token
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.episode import ImageActions, Prompt, TextActions, flatten
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.models import lora
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rewards.hooks import hookimpl
from unigrpo_cli.rewards.registry import Plugins, RewardEntry
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.run.doctor import CHECKS, FAULT, Finding, examine
from unigrpo_cli.run.doctor.recorder import Recorder
from unigrpo_cli.run.first_ratio import IMAGE_ROUNDING, TEXT_ROUNDING, AttentionKernels, ratio_limits
from unigrpo_cli.training import advantages as training_advantages
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

SETTINGS = [
    *small.SETTINGS,
    "objective.penalty_weight=0.1",
    "train.group_size=4",
    "train.minibatches=1",
    "train.lora_rank=4",
]
PROMPTS = [Prompt("a", "a red circle"), Prompt("b", "two blue stars and a green heart")]
MonkeyPatch = pytest.MonkeyPatch


@reward("mean", range=(0, 1))
def mean(images):
    """Mean of all pixels."""
    return [float(np.asarray(image, dtype=float).mean()) / 255 for image in images]


def _config(*settings: str) -> Config:
    return load_config(overrides=[*SETTINGS, *settings])


def _state(*settings: str) -> TrainState:
    config = _config(*settings)
    model = build_model(seed=3, width=32, layers=1)
    if config.dtype == "bfloat16":
        model.network.to(torch.bfloat16)
    policy = prepare_policy(model, config)
    return TrainState(policy, make_optimizer(policy, config))


def _rewards(*functions: Callable) -> Scorer:
    plugins, names = Plugins(), []
    for function in functions:
        made = function.__unigrpo_reward__
        plugins.rewards.add_entry(RewardEntry(made.name, "tests", "-", load=lambda function=function: function))
        names.append(made.name)
    return Scorer(parse_rewards(names), plugins, RewardContext("cpu", 0, True, True))


def _examine(
    *settings: str, functions: tuple = (mean,), thorough: bool = False, state: TrainState | None = None
) -> dict[str, Finding]:
    with _rewards(*functions) as rewards:
        found = examine(state or _state(*settings), PROMPTS, rewards, _config(*settings), thorough=thorough)
    return {f.name: f for f in found}


def _faults(found: dict[str, Finding]) -> set[str]:
    return {name for name, f in found.items() if f.verdict == FAULT}


# ----- sound runs


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["train.experts=image", "train.finetune=lora", "objective.penalty=latent-kl"],
        ["dtype=bfloat16"],
        ["objective.penalty=none", "train.minibatches=2", "sampling.window=all", "sampling.sde=dance"],
        ["objective.image=fpo", "sampling.think=false"],
        ["objective.image=nft", "train.minibatches=2"],
        ["sampling.guidance_text=3", "sampling.guidance_image=2", "sampling.rounds=2", "objective.penalty=latent-kl"],
        *(
            pytest.param(row, marks=pytest.mark.long)
            for row in (
                ["train.finetune=lora"],
                ["sampling.think=false"],
                ["train.experts=text", "objective.text_kl=0.1"],
                ["objective.grad_through_context=false", "sampling.sde=cps", "sampling.temperature=0.6"],
                ["sampling.guidance_text=3", "eval.guidance_interval=[-1,1]", "sampling.window=all"],
            )
        ),
    ],
)
def test_a_sound_run_has_no_fault(settings: list[str]) -> None:
    found = _examine(*settings, thorough=True)
    assert not _faults(found), {n: f.seen for n, f in found.items() if f.verdict == FAULT}
    assert list(found) == [check.name for check in CHECKS]
    assert settings or {n for n, f in found.items() if f.verdict == "skipped"} == {
        "looks"
    }  # one round looks at nothing
    for finding in found.values():
        assert bool(finding.means) == bool(finding.remedy) == (finding.verdict not in ("ok", "skipped"))


def test_adapters_that_training_starts_from_differ_from_the_reference() -> None:
    """The reference is then the network without adapters."""
    state = _state("train.finetune=lora")
    with torch.no_grad():
        for name, parameter in state.policy.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert not _faults(_examine("train.finetune=lora", state=state))


@reward("drawing")
def _drawing(pixels):
    """It draws from the global generators."""
    return [float(torch.rand(1)) + random.random() + np.random.rand() for _ in pixels]


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_the_short_form_leaves_everything_as_it_was(finetune: str) -> None:
    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    config, state = _config(f"train.finetune={finetune}"), _state(f"train.finetune={finetune}")
    before = copy.deepcopy(state.policy.network.state_dict())
    seed()
    wanted = torch.rand(1).item(), random.random(), np.random.rand()
    seed()
    with _rewards(mean, _drawing) as rewards:
        assert not [f for f in examine(state, PROMPTS, rewards, config, thorough=False) if f.verdict == FAULT]
        assert all(not loaded.recent and loaded.limits.max_abstain == 0.25 for loaded in rewards.rewards)
    assert wanted == (torch.rand(1).item(), random.random(), np.random.rand())
    after = state.policy.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not state.optimizer.state
    assert all(p.grad is None for p in state.policy.network.parameters())
    assert (state.step, state.between) == (0, False)


# ----- planted faults: text


def _texts(monkeypatch: MonkeyPatch, change: Callable[[MoTPolicy, TextActions], TextActions]) -> None:
    """A rollout that records its texts with a change."""
    sample = rollout.sample_text

    def faulty(policy, context, sampling, seeds):
        context, texts = sample(policy, context, sampling, seeds)
        return context, [change(policy, text) for text in texts]

    monkeypatch.setattr(rollout, "sample_text", faulty)


def _collated(monkeypatch: MonkeyPatch, change: Callable) -> None:
    """A replay that changes each segment before it stacks the episodes."""
    collate = train.collate

    def faulty(episodes, device, draws=0):
        return collate([replace(e, segments=tuple(map(change, e.segments))) for e in episodes], device, draws)

    monkeypatch.setattr(train, "collate", faulty)


def _encoded_again(tokenizer, text: Any) -> Any:
    if not isinstance(text, TextActions):
        return text
    ids = tokenizer.encode(text.text, add_special_tokens=False).ids
    log_prob = torch.cat([text.log_prob, torch.zeros(len(ids))])[: len(ids)]
    return replace(text, ids=torch.tensor(ids, dtype=torch.long), log_prob=log_prob)


def encoded_again_in_rollout(monkeypatch: MonkeyPatch) -> None:
    _texts(monkeypatch, lambda policy, text: _encoded_again(policy.tokenizer, text))


def encoded_again_in_replay(monkeypatch: MonkeyPatch) -> None:
    tokenizer = build_model(seed=3, width=32, layers=2).tokenizer
    _collated(monkeypatch, lambda segment: _encoded_again(tokenizer, segment))


def dropped_stop_token(monkeypatch: MonkeyPatch) -> None:
    def without(policy, text):
        if not text.finished:
            return text
        return replace(text, ids=text.ids[:-1], log_prob=text.log_prob[:-1], closing=(policy.stop_id,))

    _texts(monkeypatch, without)


def _forced(text: Any) -> Any:
    """The sampled stop token becomes a forced one."""
    if not isinstance(text, TextActions) or not text.finished:
        return text
    own = {"ids": text.ids[:-1], "log_prob": text.log_prob[:-1], "closing": (int(text.ids[-1]),)}
    return replace(text, finished=False, **own)


def forced_stop_token_in_rollout(monkeypatch: MonkeyPatch) -> None:
    _texts(monkeypatch, lambda policy, text: _forced(text))


def forced_stop_token_in_replay(monkeypatch: MonkeyPatch) -> None:
    _collated(monkeypatch, _forced)


def truncated_text_left_open(monkeypatch: MonkeyPatch) -> None:
    _texts(monkeypatch, lambda policy, text: replace(text, closing=()))


def _token(monkeypatch: MonkeyPatch, sampled: Callable, scored: Callable, *modules: Any) -> None:
    """`algo.text.token` with other temperatures for the draw and for the score."""

    def faulty(logits, *, temperature, uniform=None, id=None):
        id = token(logits, temperature=sampled(temperature), uniform=uniform, id=id).id
        return token(logits, temperature=scored(temperature), id=id)

    for module in modules:
        monkeypatch.setattr(module, "token", faulty)


def sampled_at_another_temperature(monkeypatch: MonkeyPatch) -> None:
    _token(monkeypatch, lambda t: 0.5, lambda t: t, rollout)


def recorded_at_another_temperature(monkeypatch: MonkeyPatch) -> None:
    _token(monkeypatch, lambda t: t, lambda t: 2 * t, rollout)


def forgotten_temperature(monkeypatch: MonkeyPatch) -> None:
    _token(monkeypatch, lambda t: 1.0, lambda t: 1.0, rollout, replay)


def forgotten_temperature_in_scores(monkeypatch: MonkeyPatch) -> None:
    _token(monkeypatch, lambda t: t, lambda t: 1.0, rollout, replay)


def replayed_at_another_temperature(monkeypatch: MonkeyPatch) -> None:
    collate = train.collate
    monkeypatch.setattr(train, "collate", lambda *given: replace(collate(*given), temperature=1.0))


# ----- planted faults: images


def _images(monkeypatch: MonkeyPatch, *, window: Callable | None = None, seeds: Callable | None = None) -> None:
    """`sample_image` row by row with another window, or with other seeds."""
    sample = rollout.sample_image

    def faulty(policy, context, sampling, given, own, grid=None, unconditional=None):
        if seeds is not None:
            return sample(policy, context, sampling, given, seeds(own), grid, unconditional)
        images = []
        for row, seed in enumerate(own):
            one = context.select(torch.tensor([row]))
            images += sample(policy, one, sampling, window(row, given), [seed], grid, unconditional)
        return images

    monkeypatch.setattr(rollout, "sample_image", faulty)


def window_for_each_sample(monkeypatch: MonkeyPatch) -> None:
    _images(monkeypatch, window=lambda row, window: flow.Window(row % 2, window.size))


def windows_that_are_not_recorded(monkeypatch: MonkeyPatch) -> None:
    """Every record has the same window, but the noise is elsewhere."""
    window_for_each_sample(monkeypatch)
    sample = rollout._draw

    def faulty(*given):
        episodes = sample(*given)
        images = [replace(e.segments[-1], window=flow.Window(0, 2)) for e in episodes]
        return [replace(e, segments=(*e.segments[:-1], i)) for e, i in zip(episodes, images, strict=True)]

    monkeypatch.setattr(rollout, "_draw", faulty)


def noise_shared_by_a_group(monkeypatch: MonkeyPatch) -> None:
    _images(monkeypatch, seeds=lambda seeds: [seeds[0]] * len(seeds))


def seed_without_effect(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "normal", lambda seed, *shape: torch.randn(*shape))


def schedule_off_by_one_in_rollout(monkeypatch: MonkeyPatch) -> None:
    """Each call receives the time after it; the record has the grid."""
    velocity, grid_points = rollout.velocity, flow.time_grid(4, 3.0)

    def faulty(policy, context, x, t, grid):
        return velocity(policy, context, x, grid_points[int((grid_points - t).abs().argmin()) + 1], grid)

    monkeypatch.setattr(rollout, "velocity", faulty)


def schedule_with_a_call_missing(monkeypatch: MonkeyPatch) -> None:
    grid = flow.time_grid
    monkeypatch.setattr(flow, "time_grid", lambda steps, shift: grid(steps - 1, shift))


def schedule_off_by_one_in_replay(monkeypatch: MonkeyPatch) -> None:
    image_steps = replay._image_steps

    def faulty(painted: list[ImageActions], segment: int) -> objective.ImageSteps:
        steps = image_steps(painted, segment)
        return replace(steps, t_BK=steps.t_next_BK)

    monkeypatch.setattr(replay, "_image_steps", faulty)


def _rounded_in_rollout(dtype: torch.dtype) -> Callable[[MonkeyPatch], None]:
    def plant(monkeypatch: MonkeyPatch) -> None:
        step = flow.step

        def faulty(*given, **more):
            action = step(*given, **more)
            return replace(action, x_next=action.x_next.to(dtype).float())

        monkeypatch.setattr(flow, "step", faulty)

    return plant


def _rounded_in_replay(name: str) -> Callable[[MonkeyPatch], None]:
    def plant(monkeypatch: MonkeyPatch) -> None:
        collate = train.collate

        def faulty(episodes, device, draws=0):
            batch = collate(episodes, device, draws)
            images = tuple(replace(s, **{name: getattr(s, name).bfloat16().float()}) for s in batch.actions.images)
            return replace(batch, actions=replace(batch.actions, images=images))

        monkeypatch.setattr(train, "collate", faulty)

    return plant


# ----- planted faults: old policy, reference, gradients


def _old_and_reference(monkeypatch: MonkeyPatch, change: Callable) -> None:
    score = train.score_old_and_reference

    def faulty(*given, **named):
        return [[change(m) for m in share] for share in score(*given, **named)]

    monkeypatch.setattr(train, "score_old_and_reference", faulty)


def stale_old_policy(monkeypatch: MonkeyPatch) -> None:
    """Old scores of a copy made at the start: right in the first step only."""
    score = train.score_old_and_reference
    copies: list[MoTPolicy] = []

    class Stale:
        def __init__(self, policy):
            self.policy = policy
            copies.append(copies[0] if copies else replace(policy.policy, network=copy.deepcopy(policy.network)))

        def __getattr__(self, name):
            return getattr(copies[0], name)

        def reference(self):
            return self.policy.reference()

    monkeypatch.setattr(
        train, "score_old_and_reference", lambda policy, *given, **named: score(Stale(policy), *given, **named)
    )


def old_scores_from_rollout(monkeypatch: MonkeyPatch) -> None:
    def recorded(m):
        return replace(m, old=replace(m.old, log_prob_BL=m.batch.behaviour_text_BL + 1e-7))

    _old_and_reference(monkeypatch, recorded)


def reference_that_is_the_old_policy(monkeypatch: MonkeyPatch) -> None:
    """Detached and scored like any reference, but it moves with every step."""
    _old_and_reference(monkeypatch, lambda m: replace(m, reference=m.old))


def adapters_left_on_in_the_reference(monkeypatch: MonkeyPatch) -> None:
    @contextmanager
    def on(network):
        yield

    monkeypatch.setattr(lora, "adapters_off", on)


def reference_that_is_the_policy(monkeypatch: MonkeyPatch) -> None:
    @contextmanager
    def itself(self):
        yield self

    monkeypatch.setattr(MoTPolicy, "reference", itself)


def penalty_without_gradient(monkeypatch: MonkeyPatch) -> None:
    penalties = objective.step_penalties

    def detached(actions, new, reference, own):
        velocities = tuple(v.detach() for v in new.velocities)
        return penalties(actions, replace(new, velocities=velocities), reference, own)

    monkeypatch.setattr(objective, "step_penalties", detached)


def penalty_of_the_wrong_sign(monkeypatch: MonkeyPatch) -> None:
    penalties = objective.step_penalties
    monkeypatch.setattr(objective, "step_penalties", lambda *given: -penalties(*given))


def detached_velocities(monkeypatch: MonkeyPatch) -> None:
    own = train.replay

    def faulty(*given, **more):
        scores = own(*given, **more)
        return replace(scores, velocities=tuple(v.detach() for v in scores.velocities))

    monkeypatch.setattr(train, "replay", faulty)


# ----- planted faults: advantages


def _advantages(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[MonkeyPatch], None]:
    def plant(monkeypatch: MonkeyPatch) -> None:
        own = train.advantages
        monkeypatch.setattr(train, "advantages", lambda *given: change(own(*given)))

    return plant


def rewards_credited_one_segment_earlier(monkeypatch: MonkeyPatch) -> None:
    own = training_advantages.reward_to_go

    def earlier(reward_BS, given_BS, *given, **more):
        return own(reward_BS.roll(-1, 1), given_BS.roll(-1, 1), *given, **more)

    monkeypatch.setattr(training_advantages, "reward_to_go", earlier)


def advantages_counted_within_micro_batches(monkeypatch: MonkeyPatch) -> None:
    own = train.with_advantages

    def faulty(minibatches, advantage_BS):
        return own([[replace(m, rows=list(range(len(m.rows)))) for m in share] for share in minibatches], advantage_BS)

    monkeypatch.setattr(train, "with_advantages", faulty)


LONG, SHORT = ["sampling.max_new_tokens=40"], ["sampling.max_new_tokens=2"]
WARM, LORA = ["sampling.temperature=0.7"], ["train.finetune=lora"]
TWO = ["sampling.program=reflect", "sampling.rounds=2", "sampling.show_images=latents"]
AT_END, TO_GO = ([*TWO, f"advantage.credit={credit}"] for credit in ("terminal", "reward-to-go"))


@pytest.mark.parametrize(
    ("plant", "check", "seen", "settings"),
    [
        (forced_stop_token_in_rollout, "stop-token", "truncated after", LONG),
        (forced_stop_token_in_replay, "stop-token", "not scored in replay", LONG),
        (sampled_at_another_temperature, "temperature", "of tokens would be sampled differently", []),
        (forgotten_temperature_in_scores, "temperature", "are off", WARM),
        (adapters_left_on_in_the_reference, "reference", "moved the reference", LORA),
        (reference_that_is_the_old_policy, "reference", "exactly 0", []),
        (penalty_without_gradient, "reference", "no gradient", []),
        (penalty_of_the_wrong_sign, "reference", "drives", []),
        (_advantages(lambda a: -a), "advantages", "has the smaller advantage", []),
        (rewards_credited_one_segment_earlier, "advantages", "a reward is credited to another segment", TO_GO),
        (_advantages(lambda a: a * torch.arange(4)), "advantages", "segments of a/0 have different advantages", AT_END),
        *(
            pytest.param(*row, marks=pytest.mark.long)
            for row in (
                (forgotten_temperature, "temperature", "are off", WARM),
                (reference_that_is_the_policy, "reference", "", []),
                (_advantages(lambda a: a.roll(1, 0)), "advantages", "", []),
                (_advantages(lambda a: a.roll(1, 1)), "advantages", "a reward is credited to another segment", TO_GO),
            )
        ),
    ],
)
def test_a_planted_fault_is_found_by_one_check(
    plant: Callable, check: str, seen: str, settings: list[str], monkeypatch: MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = _examine(*settings)
    assert _faults(found) == {check}
    assert seen in found[check].seen


@pytest.mark.parametrize(
    ("plant", "checks", "seen", "settings"),
    [
        (encoded_again_in_rollout, "tokens", "recorded is", []),
        (encoded_again_in_replay, "tokens", "replayed is", []),
        (dropped_stop_token, "stop-token", "", LONG),
        (truncated_text_left_open, "stop-token", "not closed", SHORT),
        (recorded_at_another_temperature, "temperature text-drift", "log-probabilities are off", WARM),
        (replayed_at_another_temperature, "temperature text-drift", "replay uses 1", WARM),
        (window_for_each_sample, "window replay", "2 windows", []),  # nor can they be stacked
        (windows_that_are_not_recorded, "window", "has noise at steps", []),
        (noise_shared_by_a_group, "group-noise", "(correlation 1.00)", []),
        (advantages_counted_within_micro_batches, "replay", "not each episode once", []),
        (seed_without_effect, "repeats", "the same seed gives other episodes", []),
        (schedule_off_by_one_in_rollout, "schedule", "the network received t", []),
        (schedule_with_a_call_missing, "schedule", "3 network calls", ["sampling.window_range=[0, 2]"]),
        (schedule_off_by_one_in_replay, "schedule image-drift", "replayed at", []),
        (_rounded_in_rollout(torch.float16), "latents", "fit 16 bits", []),
        pytest.param(_rounded_in_rollout(torch.bfloat16), "latents", "fit 16 bits", [], marks=pytest.mark.long),
        (_rounded_in_replay("x_next_BKND"), "latents", "(after)", []),
        pytest.param(_rounded_in_replay("x_BKND"), "latents", "(before)", [], marks=pytest.mark.long),
        (stale_old_policy, "text-ratio image-ratio", "log-ratio 0 before an update", []),
        (old_scores_from_rollout, "text-ratio", "", []),
        (detached_velocities, "gradients", "image expert", []),
    ],
)
def test_a_planted_fault_is_found(
    plant: Callable, checks: str, seen: str, settings: list[str], monkeypatch: MonkeyPatch
) -> None:
    """Other checks may find it too."""
    plant(monkeypatch)
    found = _examine(*settings, thorough=plant is seed_without_effect)
    assert set(checks.split()) <= _faults(found)
    assert seen in found[checks.split()[0]].seen


def test_a_frozen_expert_is_found_and_a_frozen_part_of_a_layer_is_not() -> None:
    state = _state()
    for parameter in state.policy.network.language_model.model.layers[0].mlp_moe_gen.parameters():
        parameter.requires_grad_(False)
    assert not _faults(_examine(state=state))
    for parameter in list(state.policy.trainable()["image"]):
        parameter.requires_grad_(False)
    assert "has no trainable weights" in _examine(state=state)["gradients"].seen


# ----- the first ratio off the CPU


def _rounding(monkeypatch: MonkeyPatch, size: float) -> None:
    """Passes with gradients round differently, as another attention kernel would; and the device is no CPU."""
    own = MoTPolicy.logits

    def rounded(self, hidden):
        return own(self, hidden) * (1 + size * torch.is_grad_enabled())

    monkeypatch.setattr(MoTPolicy, "logits", rounded)


@pytest.mark.parametrize(
    ("on_cpu", "size", "verdict"),
    [(True, 1e-6, FAULT), (False, 1e-6, "warn"), (False, 0.01, FAULT)],
)
def test_rounding_of_the_first_ratio_is_a_fault_on_the_cpu_only(
    monkeypatch: MonkeyPatch, on_cpu: bool, size: float, verdict: str
) -> None:
    from unigrpo_cli.run.doctor import replay_checks

    limits = {"text": 2e-3, "image": 1e-6}
    if not on_cpu:
        monkeypatch.setattr(replay_checks, "ratio_limits", lambda *_: limits)
    _rounding(monkeypatch, size)
    found = _examine()["text-ratio"]
    assert found.verdict == verdict, found.seen
    assert found.limit == (0.0 if on_cpu else limits["text"])
    if verdict == "warn":
        assert "attention kernels: flash_attention_for_cpu without gradients" in found.seen
        assert "nothing to do" in found.remedy


@pytest.mark.parametrize(("clip", "words"), [(1e-5, "train.minibatches=1"), (0.2, "nothing to do")])
def test_the_remedy_of_rounding_depends_on_the_clip_range(monkeypatch: MonkeyPatch, clip: float, words: str) -> None:
    from unigrpo_cli.run.doctor import replay_checks

    monkeypatch.setattr(replay_checks, "ratio_limits", lambda *_: {"text": 2e-3, "image": 1e-6})
    _rounding(monkeypatch, 1e-6)
    found = _examine(f"objective.text_clip={clip}")["text-ratio"]
    assert found.verdict == "warn"
    assert words in found.remedy


def test_limits_of_the_first_ratio_follow_dtype_and_clip_range() -> None:
    class OnCard:
        device = torch.device("cuda")

        def __init__(self, dtype: torch.dtype):
            self.dtype = dtype

    objective = _config("objective.text_clip=0.2", "objective.image_clip=1e-5").objective
    assert ratio_limits(_state().policy, objective) == {"text": 0.0, "image": 0.0}
    coarse: Any = OnCard(torch.bfloat16)
    assert ratio_limits(coarse, objective) == {"text": TEXT_ROUNDING / 128, "image": IMAGE_ROUNDING / 128}
    fine: Any = OnCard(torch.float32)
    assert ratio_limits(fine, objective) == pytest.approx({"text": 0.002, "image": IMAGE_ROUNDING * 2**-23})


def test_attention_kernels_are_named() -> None:
    q = torch.randn(1, 2, 4, 8)
    with AttentionKernels() as kernels:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert "flash" in str(kernels)
    with AttentionKernels() as kernels, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert str(kernels) == "math"


# ----- warnings


class _Turned:
    @hookimpl
    def unigrpo_combine_rewards(self, rewards):
        return -rewards["mean"]


def test_a_plugin_that_reverses_the_order_is_a_warning() -> None:
    """A plugin that combines rewards may do so on purpose."""
    with _rewards(mean) as rewards:
        rewards.plugins._register(_Turned(), "turned", "tests", "-")
        found = examine(_state(), PROMPTS, rewards, _config(), thorough=False)
    assert {f.name: f.verdict for f in found}["advantages"] == "warn"
    assert not [f for f in found if f.verdict == FAULT]


@pytest.mark.parametrize(
    ("setting", "check"),
    [("advantage.shuffle=true", "advantages"), ("sampling.max_new_tokens=2", "truncation")],
)
def test_settings_that_hinder_learning_are_warnings(setting: str, check: str) -> None:
    found = _examine(setting)
    assert found[check].verdict == "warn"
    assert not _faults(found)


def test_a_failed_trial_update_is_reported(monkeypatch: MonkeyPatch) -> None:
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(train, "training_step", broken)
    found = _examine()
    assert found["text-ratio"].verdict == found["reference"].verdict == "warn"
    assert "no such kernel" in found["reference"].seen


# ----- rewards


@reward("constant", range=(0, 1))
def constant(images):
    return [0.5 for _ in images]


@reward("rare", range=(0, 1))
def rare(prompts):
    return [0.0 for _ in prompts]


CHANCE = random.Random(0)


@reward("chance")
def chance(images):
    return [CHANCE.random() for _ in images]


@reward("nothing")
def nothing(images):
    return [None for _ in images]


@pytest.mark.parametrize(
    ("functions", "thorough", "check", "verdict", "seen"),
    [
        ((constant,), False, "reward-spread", FAULT, "constant gave 0.5 to all"),
        ((mean, constant), False, "reward-spread", "warn", "constant gave 0.5 to all"),  # a guard beside another
        ((rare,), False, "reward-spread", "warn", "gave 0 to everything"),  # a rare success stops no run
        ((rare,), True, "reward-spread", FAULT, "gave 0 to all"),
        ((chance,), False, "reward-repeats", "warn", "chance has noise of"),
        ((mean, nothing), True, "reward-abstains", FAULT, "nothing abstained on 100%"),
        ((mean, nothing), False, "reward-abstains", "warn", "nothing abstained on 100%"),
    ],
)
def test_rewards(functions: tuple, thorough: bool, check: str, verdict: str, seen: str) -> None:
    found = _examine(functions=functions, thorough=thorough)
    assert found[check].verdict == verdict
    assert seen in found[check].seen
    assert _faults(found) == ({check} if verdict == FAULT else set())


# ----- the recorder


def test_the_recorder_changes_nothing_and_records_every_input(tiny: MoTPolicy) -> None:
    """Rollout and replay through it are equal to the bit, and replay's logits are those of the rollout."""
    sampling, window = train_sampling(_config()), flow.Window(0, 2)
    plain = flatten(rollout.rollout(tiny, PROMPTS, 3, sampling, window, 0))
    recorder = Recorder(tiny)
    recorded = flatten(rollout.rollout(recorder.as_policy, PROMPTS, 3, sampling, window, 0))
    traces = recorder.take()
    for a, b in zip(plain, recorded, strict=True):
        assert torch.equal(a.images[-1].latent, b.images[-1].latent)
        assert torch.equal(a.segments[-2].ids, b.segments[-2].ids)
    assert [len(calls) for trace in traces for calls in trace.images()] == [4] * 6
    batch = replay.collate(recorded)
    with torch.no_grad():
        direct, through = replay.replay(tiny, batch), replay.replay(recorder.as_policy, batch)
    assert torch.equal(direct.log_prob_BL, through.log_prob_BL)
    assert torch.equal(direct.velocities[0], through.velocities[0])
    (trace,) = recorder.take()
    sampled = {prefix: logits for own in traces for prefix, logits in own.logits.items()}
    assert trace.logits
    for prefix, logits in trace.logits.items():
        torch.testing.assert_close(logits, sampled[prefix], rtol=1e-6, atol=1e-6)
    assert len(trace.prefixes) == 6


def test_every_check_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
    assert all(f"| `{check.name}` |" in text and check.means and check.remedy for check in CHECKS)


@pytest.mark.parametrize("settings", [AT_END, [*TO_GO, "advantage.discount=0.5", "sampling.stop_phrase=red"]])
def test_credit_of_several_rounds_passes(settings: list[str]) -> None:
    assert "advantages" not in _faults(_examine(*settings))
