"""The doctor: faults planted as a contributor would make them, each found by name; and nothing where nothing is."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

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
from unigrpo_cli.run.doctor import CHECKS, FAULT, Finding, environment, findings, gather
from unigrpo_cli.run.doctor.findings import Evidence
from unigrpo_cli.run.doctor.probe_step import rows_of
from unigrpo_cli.run.doctor.recorder import Recorder
from unigrpo_cli.run.doctor.unreadable import ABSTAINS, NOT_ASKED, RAISES
from unigrpo_cli.run.memory.plan import plan_of
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

SETTINGS = [
    "sampling.max_new_tokens=6",
    "sampling.height=16",
    "sampling.width=16",
    "sampling.steps=4",
    "sampling.window_range=[0, 3]",
    "sampling.window_size=2",
    "objective.penalty_weight=0.1",
    "train.prompts_per_step=2",
    "train.group_size=4",
    "train.minibatches=1",
    "train.lora_rank=4",
]
PROMPTS = [Prompt("a", "a red circle"), Prompt("b", "two blue stars and a green heart")]


@reward("mean", range=(0, 1))
def mean(images):
    """Mean of all pixels."""
    return [float(np.asarray(image, dtype=float).mean()) / 255 for image in images]


def _config(*settings: str) -> Config:
    return load_config(overrides=[*SETTINGS, *settings])


def _state(config: Config) -> TrainState:
    policy = prepare_policy(build_model(seed=3, width=32, layers=2), config)
    return TrainState(policy, make_optimizer(policy, config))


def _rewards(*functions: Callable) -> Scorer:
    plugins = Plugins()
    names = []
    for function in functions:
        made = function.__unigrpo_reward__
        plugins.rewards.add_entry(RewardEntry(made.name, "tests", "-", load=lambda function=function: function))
        names.append(made.name)
    return Scorer(parse_rewards(names), plugins, RewardContext("cpu", 0, True, True))


def _examine(
    *settings: str,
    functions: tuple[Callable, ...] = (mean,),
    thorough: bool = False,
    state: TrainState | None = None,
) -> dict[str, Finding]:
    config = _config(*settings)
    with _rewards(*functions) as rewards:
        evidence = gather(state or _state(config), PROMPTS, rewards, config, thorough=thorough)
        return {f.name: f for f in findings(evidence)}


def _faults(found: dict[str, Finding]) -> set[str]:
    return {name for name, f in found.items() if f.verdict == FAULT}


# ----- nothing wrong


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["train.finetune=lora"],
        ["sampling.think=false"],
        ["train.experts=text", "objective.text_kl=0.1"],
        ["train.experts=image", "train.finetune=lora", "objective.penalty=latent-kl"],
        ["dtype=bfloat16"],
        ["objective.grad_through_context=false", "sampling.sde=cps", "sampling.temperature=0.6"],
        ["objective.penalty=none", "train.minibatches=2", "sampling.window=all", "sampling.sde=dance"],
    ],
)
def test_a_sound_run_has_no_fault(settings: list[str]) -> None:
    config = _config(*settings)
    model = build_model(seed=3, width=32, layers=2)
    if config.dtype == "bfloat16":
        model.network.to(torch.bfloat16)
    policy = prepare_policy(model, config)
    found = _examine(*settings, thorough=True, state=TrainState(policy, make_optimizer(policy, config)))
    assert not _faults(found), {n: f.seen for n, f in found.items() if f.verdict == FAULT}
    assert list(found) == [check.name for check in CHECKS]
    skipped = {n for n, f in found.items() if f.verdict == "skipped"} - {"memory", "bf16"}
    assert not skipped or len(settings) > 0
    for finding in found.values():
        assert bool(finding.means) == bool(finding.remedy) == (finding.verdict not in ("ok", "skipped"))


def test_adapters_that_training_starts_from_differ_from_the_reference() -> None:
    """The reference is then the network without them; with them off for good both are one, which is found."""
    config = _config("train.finetune=lora")
    state = _state(config)
    with torch.no_grad():
        for name, parameter in state.policy.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert not _faults(_examine("train.finetune=lora", state=state))


def test_the_short_form_leaves_everything_as_it_was() -> None:
    for finetune in ("full", "lora"):
        config = _config(f"train.finetune={finetune}")
        state = _state(config)
        before = copy.deepcopy(state.policy.network.state_dict())
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        wanted = torch.rand(1).item(), random.random(), np.random.rand()
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        with _rewards(mean, _drawing) as rewards:
            found = findings(gather(state, PROMPTS, rewards, config, thorough=False))
            assert not [f for f in found if f.verdict == FAULT]
            assert all(not opened.recent for opened in rewards.rewards)
            assert rewards.limits.max_abstain == 0.25
        assert wanted == (torch.rand(1).item(), random.random(), np.random.rand())
        after = state.policy.network.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not state.optimizer.state
        assert all(p.grad is None for p in state.policy.network.parameters())
        assert state.step == 0
        assert not state.between


@reward("drawing")
def _drawing(pixels):
    """One that draws from the global generators."""
    return [float(torch.rand(1)) + random.random() + np.random.rand() for _ in pixels]


# ----- words


def _change_texts(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """A rollout whose texts are recorded otherwise than they were written."""
    write = rollout.sample_text

    def faulty(policy, context, sampling, seeds):
        context, texts = write(policy, context, sampling, seeds)
        return context, [change(policy, text) for text in texts]

    monkeypatch.setattr(rollout, "sample_text", faulty)


def _padded(text: TextActions, ids: list[int]) -> TextActions:
    log_prob = torch.cat([text.log_prob, torch.zeros(len(ids))])[: len(ids)]
    return replace(text, ids=torch.tensor(ids, dtype=torch.long), log_prob=log_prob)


def test_encoding_the_thinking_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(policy, text: TextActions) -> TextActions:
        return _padded(text, policy.tokenizer.encode(text.text, add_special_tokens=False).ids)

    _change_texts(monkeypatch, again)
    found = _examine()
    assert "tokens" in _faults(found)
    assert "fed" in found["tokens"].seen
    assert "recorded" in found["tokens"].seen


def test_encoding_the_thinking_again_in_replay_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    collate = train.collate
    tokenizer = build_model(seed=3, width=32, layers=2).tokenizer

    def again(segment):
        if not isinstance(segment, TextActions):
            return segment
        return _padded(segment, tokenizer.encode(segment.text, add_special_tokens=False).ids)

    def faulty(episodes, device="cpu"):
        return collate([replace(e, segments=tuple(map(again, e.segments))) for e in episodes], device)

    monkeypatch.setattr(train, "collate", faulty)
    found = _examine()
    assert "tokens" in _faults(found)
    assert "replayed" in found["tokens"].seen


def test_a_dropped_stop_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(policy, text: TextActions) -> TextActions:
        if not text.finished:
            return text
        return replace(text, ids=text.ids[:-1], log_prob=text.log_prob[:-1], closing=(policy.stop_id,))

    _change_texts(monkeypatch, without)
    found = _examine("sampling.max_new_tokens=40")
    assert "stop-token" in _faults(found)
    assert "tokens" not in _faults(found), "what was fed is still what is recorded"


@pytest.mark.parametrize("where", ["rollout", "replay"])
def test_a_stop_token_that_is_fed_but_no_action_is_found(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """In rollout under the guise of a text that was cut off; in replay by leaving it to `closing`."""

    def forced(policy, text):
        if not isinstance(text, TextActions) or not text.finished:
            return text
        own = {"ids": text.ids[:-1], "log_prob": text.log_prob[:-1], "closing": (int(text.ids[-1]),)}
        return replace(text, finished=False, **own)

    if where == "rollout":
        _change_texts(monkeypatch, forced)
    else:
        collate = train.collate
        monkeypatch.setattr(
            train,
            "collate",
            lambda episodes, device: collate(
                [replace(e, segments=tuple(forced(None, s) for s in e.segments)) for e in episodes], device
            ),
        )
    found = _examine("sampling.max_new_tokens=40")
    assert _faults(found) == {"stop-token"}
    assert ("truncated after" if where == "rollout" else "not scored in replay") in found["stop-token"].seen


def test_an_open_end_of_a_truncated_text_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _change_texts(monkeypatch, lambda policy, text: replace(text, closing=()))
    assert "stop-token" in _faults(_examine("sampling.max_new_tokens=2"))


def test_words_drawn_at_another_temperature_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler at 0.5, the record at 1."""

    def faulty(logits, *, temperature, uniform=None, id=None):
        if uniform is None:
            return token(logits, temperature=temperature, id=id)
        return token(logits, temperature=temperature, id=token(logits, temperature=0.5, uniform=uniform).id)

    monkeypatch.setattr(rollout, "token", faulty)
    found = _examine()
    assert _faults(found) == {"temperature"}
    assert "as at 0.5" in found["temperature"].seen


def test_words_recorded_at_another_temperature_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(logits, *, temperature, uniform=None, id=None):
        drawn = token(logits, temperature=temperature, uniform=uniform, id=id)
        return token(logits, temperature=2 * temperature, id=drawn.id)

    monkeypatch.setattr(rollout, "token", faulty)
    found = _examine("sampling.temperature=0.7")
    assert {"temperature", "text-drift"} <= _faults(found)
    assert "recorded as at 1.4" in found["temperature"].seen


def test_words_replayed_at_another_temperature_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    collate = train.collate
    monkeypatch.setattr(train, "collate", lambda *given: replace(collate(*given), temperature=1.0))
    found = _examine("sampling.temperature=0.7")
    assert {"temperature", "text-drift"} <= _faults(found)
    assert "replayed at 1" in found["temperature"].seen


@pytest.mark.parametrize("draws", [True, False])
def test_a_temperature_lost_in_the_function_that_all_share_is_found(
    monkeypatch: pytest.MonkeyPatch, draws: bool
) -> None:
    """`algo.text.token` itself forgets it, for draw and score or for the score alone: nothing else differs."""

    def forgetful(logits, *, temperature, uniform=None, id=None):
        drawn = token(logits, temperature=1.0 if draws else temperature, uniform=uniform, id=id)
        return token(logits, temperature=1.0, id=drawn.id)

    for module in (rollout, replay):
        monkeypatch.setattr(module, "token", forgetful)
    found = _examine("sampling.temperature=0.7")
    assert _faults(found) == {"temperature"}
    assert "recorded as at 1" in found["temperature"].seen


def test_texts_that_are_cut_off_are_a_warning() -> None:
    found = _examine("sampling.max_new_tokens=2")
    assert found["truncation"].verdict == "warn"
    assert found["truncation"].value > 0.5


# ----- images


def _change_paint(monkeypatch: pytest.MonkeyPatch, **change: Callable) -> None:
    """Painting with some of its arguments made otherwise: by name, from the row and the value."""
    paint = rollout.sample_image

    def faulty(policy, context, sampling, window, seeds, grid=None, unconditional=None):
        if "window" not in change:
            given = change["seeds"](seeds)
            return paint(policy, context, sampling, window, given, grid, unconditional)
        images = []
        for row, seed in enumerate(seeds):
            own = context.select(torch.tensor([row]))
            images += paint(policy, own, sampling, change["window"](row, window), [seed], grid, unconditional)
        return images

    monkeypatch.setattr(rollout, "sample_image", faulty)


def test_a_window_for_each_sample_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _change_paint(monkeypatch, window=lambda row, window: flow.Window(row % 2, window.size))
    found = _examine()
    assert "window" in _faults(found)
    assert "2 windows" in found["window"].seen
    assert found["replay"].verdict == FAULT, "they cannot be stacked either"


def test_windows_that_only_the_noise_knows_of_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """All records say the same window, but noise is elsewhere."""
    _change_paint(monkeypatch, window=lambda row, window: flow.Window(row % 2, window.size))
    drawn = rollout._think_then_paint

    def said(*given):
        changed = []
        for episode in drawn(*given):
            image = replace(episode.segments[-1], window=flow.Window(0, 2))
            changed.append(replace(episode, segments=(*episode.segments[:-1], image)))
        return changed

    monkeypatch.setattr(rollout, "_think_then_paint", said)
    assert "window" in _faults(_examine())


def test_noise_that_a_group_shares_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _change_paint(monkeypatch, seeds=lambda seeds: [seeds[0]] * len(seeds))
    found = _examine()
    assert "group-noise" in _faults(found)
    assert found["group-noise"].value == pytest.approx(1, abs=1e-3)


def test_a_seed_that_decides_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "normal", lambda seed, *shape: torch.randn(*shape))
    assert "repeats" in _faults(_examine(thorough=True))


def test_a_schedule_that_is_one_off_in_rollout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is told the time after it; the record has the grid."""
    velocity = rollout.velocity
    grid_points = flow.time_grid(4, 3.0)

    def faulty(policy, context, x, t, grid):
        return velocity(policy, context, x, grid_points[int((grid_points - t).abs().argmin()) + 1], grid)

    monkeypatch.setattr(rollout, "velocity", faulty)
    found = _examine()
    assert "schedule" in _faults(found)
    assert "the network saw" in found["schedule"].seen


def test_a_grid_of_points_for_calls_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many points as there should be calls: one call is missing."""
    grid = flow.time_grid
    monkeypatch.setattr(flow, "time_grid", lambda steps, shift: grid(steps - 1, shift))
    found = _examine("sampling.window_range=[0, 2]")
    assert "schedule" in _faults(found)
    assert found["schedule"].value == 3


def test_a_schedule_that_is_one_off_in_replay_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(painted: list[ImageActions]) -> objective.ImageSteps:
        steps = _image_steps(painted)
        return replace(steps, t_BK=steps.t_next_BK)

    _image_steps = replay._image_steps
    monkeypatch.setattr(replay, "_image_steps", faulty)
    found = _examine()
    assert "schedule" in _faults(found)
    assert "replayed at" in found["schedule"].seen
    assert "image-drift" in _faults(found)


def _rounding(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    step = flow.step

    def faulty(*given, **more):
        action = step(*given, **more)
        return replace(action, x_next=action.x_next.to(dtype).float())

    monkeypatch.setattr(flow, "step", faulty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_that_went_through_sixteen_bits_are_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    _rounding(monkeypatch, dtype)
    found = _examine()
    assert "latents" in _faults(found)
    assert found["latents"].value > 0.9


# ----- policy and reference


@pytest.mark.parametrize("name", ["x_BKND", "x_next_BKND"])
def test_latents_rounded_after_they_were_stacked_are_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The network is fed the recorded ones, and the step is scored between others."""
    collate = train.collate

    def faulty(episodes, device="cpu"):
        batch = collate(episodes, device)
        images = tuple(replace(s, **{name: getattr(s, name).bfloat16().float()}) for s in batch.actions.images)
        return replace(batch, actions=replace(batch.actions, images=images))

    monkeypatch.setattr(train, "collate", faulty)
    found = _examine()
    assert "latents" in _faults(found)
    assert "scores other latents" in found["latents"].seen


def test_a_stale_old_policy_is_found_after_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old scores from a copy made at the beginning: right in the first step, and in no other."""
    fixed = train.score_old_and_reference
    copies: list[MoTPolicy] = []

    class Stale:
        def __init__(self, policy):
            self.policy = policy
            copies.append(copies[0] if copies else replace(policy.policy, network=copy.deepcopy(policy.network)))

        def __getattr__(self, name):
            return getattr(copies[0], name)

        def reference(self):
            return self.policy.reference()

    monkeypatch.setattr(train, "score_old_and_reference", lambda policy, *given: fixed(Stale(policy), *given))
    found = _examine()
    assert {"text-ratio", "image-ratio"} <= _faults(found)
    assert "at first 0, a step later" in found["text-ratio"].seen


def test_old_scores_from_rollout_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded log-probabilities in place of the old policy's: nearly right, and not exactly 1."""
    fixed = train.score_old_and_reference

    def faulty(*given):
        shares = fixed(*given)
        return [
            [replace(m, old=replace(m.old, log_prob_BL=m.batch.behaviour_text_BL + 1e-7)) for m in share]
            for share in shares
        ]

    monkeypatch.setattr(train, "score_old_and_reference", faulty)
    assert "text-ratio" in _faults(_examine())


def test_adapters_left_on_in_the_reference_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def on(network):
        yield

    monkeypatch.setattr(lora, "adapters_off", on)
    found = _examine("train.finetune=lora")
    assert _faults(found) == {"reference"}
    assert "moved the reference" in found["reference"].seen


def test_a_reference_that_is_the_policy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def itself(self):
        yield self

    monkeypatch.setattr(MoTPolicy, "reference", itself)
    assert _faults(_examine()) == {"reference"}


def test_a_reference_that_is_the_old_policy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is detached and scored like any other, and goes along with every step."""
    fixed = train.score_old_and_reference

    def faulty(*given):
        return [[replace(m, reference=m.old) for m in share] for share in fixed(*given)]

    monkeypatch.setattr(train, "score_old_and_reference", faulty)
    found = _examine()
    assert _faults(found) == {"reference"}
    assert "exactly 0" in found["reference"].seen


def test_a_penalty_without_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    penalties = objective.step_penalties

    def detached(actions, new, reference, own):
        velocities = tuple(v.detach() for v in new.velocities)
        return penalties(actions, replace(new, velocities=velocities), reference, own)

    monkeypatch.setattr(objective, "step_penalties", detached)
    found = _examine()
    assert _faults(found) == {"reference"}
    assert "no gradient" in found["reference"].seen


def test_a_penalty_of_the_wrong_sign_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    penalties = objective.step_penalties
    monkeypatch.setattr(objective, "step_penalties", lambda *given: -penalties(*given))
    found = _examine()
    assert _faults(found) == {"reference"}
    assert "drives" in found["reference"].seen


def test_a_gradient_that_is_lost_in_one_expert_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Velocities behind a detach: the painter stays as it is."""
    own = train.replay

    def faulty(*given, **more):
        scores = own(*given, **more)
        return replace(scores, velocities=tuple(v.detach() for v in scores.velocities))

    monkeypatch.setattr(train, "replay", faulty)
    found = _examine()
    assert "gradients" in _faults(found)
    assert "image expert" in found["gradients"].seen


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_words_behind_a_detach_are_found_though_images_teach_their_expert(
    monkeypatch: pytest.MonkeyPatch, finetune: str
) -> None:
    own = MoTPolicy.logits
    monkeypatch.setattr(MoTPolicy, "logits", lambda self, hidden: own(self, hidden.detach()))
    found = _examine(f"train.finetune={finetune}")
    assert _faults(found) == {"gradients"}
    assert "of the text term reaches the text expert" in found["gradients"].seen


def test_a_gradient_through_the_context_that_is_not_as_configured_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = train.replay
    for configured in (True, False):

        def other(*args: object, grad_through_context: bool = True, real: bool = not configured, **kwargs: object):
            return own(*args, grad_through_context=real, **kwargs)

        monkeypatch.setattr(train, "replay", other)
        found = _examine(f"objective.grad_through_context={str(configured).lower()}")
        assert _faults(found) == {"gradients"}
        assert "image term reaches the text expert" in found["gradients"].seen


def test_an_optimizer_at_another_rate_is_found() -> None:
    state = _state(_config())
    state.optimizer.param_groups[1]["full_lr"] = 0.0
    assert "rate for the image expert is 0" in _examine(state=state)["gradients"].seen


def test_a_frozen_layer_and_a_forgotten_group_are_found() -> None:
    config = _config()
    state = _state(config)
    layer = state.policy.network.language_model.model.layers[1]
    for parameter in layer.mlp_moe_gen.parameters():
        parameter.requires_grad_(False)
    assert not _faults(_examine(state=state)), "some of a layer may be frozen"
    own = list(state.policy.trainable()["image"])
    for parameter in own:
        parameter.requires_grad_(False)
    assert "has nothing" in _examine(state=state)["gradients"].seen
    state = _state(config)
    state.optimizer.param_groups = [g for g in state.optimizer.param_groups if g["expert"] == "text"]
    assert "optimizer lacks" in _examine(state=state)["gradients"].seen


# ----- advantages and rewards


def test_swapped_advantages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = train.advantages
    monkeypatch.setattr(train, "advantages", lambda *given: own(*given).roll(1))
    assert _faults(_examine()) == {"advantages"}


def test_a_flipped_sign_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = train.advantages
    monkeypatch.setattr(train, "advantages", lambda *given: -own(*given))
    found = _examine()
    assert _faults(found) == {"advantages"}
    assert found["advantages"].value > 5


def test_micro_batches_with_the_advantages_of_others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows counted within a micro-batch instead of over all."""
    own = train.with_advantages

    def faulty(fixed, advantage_B):
        return own([[replace(f, rows=list(range(len(f.rows)))) for f in share] for share in fixed], advantage_B)

    monkeypatch.setattr(train, "with_advantages", faulty)
    assert _faults(_examine()) == {"advantages"}


@pytest.mark.parametrize("wrong", [lambda a: a.flip(0), lambda a: -a, lambda a: a[[2, 1, 0, 3]]])
def test_advantages_swapped_in_the_loss_are_found(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """The last swaps two of one sign, so only sizes tell."""
    own = train.unigrpo_loss

    def faulty(actions, new, old, reference, advantage_B, *given, **more):
        return own(actions, new, old, reference, wrong(advantage_B), *given, **more)

    monkeypatch.setattr(train, "unigrpo_loss", faulty)
    found = _examine()
    assert _faults(found) == {"advantages"}
    assert "times its own advantage in the loss" in found["advantages"].seen


def test_one_term_with_the_advantages_of_others_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = objective.image_term
    monkeypatch.setattr(objective, "image_term", lambda ratio, a, **more: own(ratio, a.roll(1), **more))
    found = _examine()
    assert _faults(found) == {"advantages"}
    assert "a step of a/" in found["advantages"].seen


def test_a_word_that_the_loss_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = objective.text_term

    def faulty(log_prob_BL, old_BL, mask_BL, advantage_B, **more):
        last = mask_BL.cumsum(dim=1) == mask_BL.sum(dim=1, keepdim=True)
        return own(log_prob_BL, old_BL, mask_BL & ~last, advantage_B, **more)

    monkeypatch.setattr(objective, "text_term", faulty)
    assert "a word of a/" in _examine()["advantages"].seen


def test_a_plugin_that_turns_the_order_round_is_a_warning() -> None:
    """Whoever combines rewards may mean it."""

    class Turned:
        @hookimpl
        def unigrpo_combine_rewards(self, rewards):
            return -rewards["mean"]

    config = _config()
    with _rewards(mean) as rewards:
        rewards.plugins._register(Turned(), "turned", "tests", "-")
        found = findings(gather(_state(config), PROMPTS, rewards, config, thorough=False))
    assert [(f.name, f.verdict) for f in found if f.name == "advantages"] == [("advantages", "warn")]
    assert not [f for f in found if f.verdict == FAULT]


def test_an_update_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(train, "training_step", broken)
    found = _examine()
    assert found["text-ratio"].verdict == found["reference"].verdict == "warn"
    assert "no such kernel" in found["reference"].seen


def test_shuffled_advantages_are_a_warning() -> None:
    found = _examine("advantage.shuffle=true")
    assert found["advantages"].verdict == "warn"
    assert not _faults(found)


def test_a_constant_reward_is_found() -> None:
    @reward("constant", range=(0, 1))
    def constant(images):
        return [0.5 for _ in images]

    found = _examine(functions=(constant,))
    assert _faults(found) == {"reward-spread"}
    assert "gave 0.5 for all" in found["reward-spread"].seen


def test_a_guard_beside_another_reward_is_a_warning() -> None:
    """Always 1 unless something is wrong: nothing to learn from here, but the other reward is."""

    @reward("guard", range=(0, 1))
    def guard(images):
        return [1.0 for _ in images]

    found = _examine(functions=(mean, guard))
    assert found["reward-spread"].verdict == "warn"
    assert not _faults(found)


def test_a_rare_success_stops_no_run_and_is_a_fault_when_asked() -> None:
    @reward("rare", range=(0, 1))
    def rare(prompts):
        return [0.0 for _ in prompts]

    assert _examine(functions=(rare,))["reward-spread"].verdict == "warn"
    assert _examine(functions=(rare,), thorough=True)["reward-spread"].verdict == FAULT


def test_a_reward_of_chance_is_a_warning() -> None:
    chance = random.Random(0)

    @reward("chance")
    def by_chance(images):
        return [chance.random() for _ in images]

    found = _examine(functions=(by_chance,))
    assert found["reward-repeats"].verdict == "warn"
    assert found["reward-repeats"].value > 0.5


def test_a_reward_that_judges_nothing_is_found() -> None:
    @reward("nothing")
    def nothing(images):
        return [None for _ in images]

    assert "reward-abstains" in _faults(_examine(functions=(mean, nothing), thorough=True))
    assert _examine(functions=(mean, nothing))["reward-abstains"].verdict == "warn"


@pytest.mark.parametrize("column", ["images", "pixels", "tensors", "reasoning", "metadata"])
def test_a_failure_that_becomes_a_score_is_found(column: str) -> None:
    """Caught and turned to 0, whatever the reward looks at."""

    def guarded(values, score):
        try:
            return [float(score(value)) for value in values]
        except Exception:
            return [0.0] * len(PROMPTS[:1])

    functions = {
        "images": lambda images: guarded(images, lambda image: np.asarray(image.convert("L")).mean()),
        "pixels": lambda pixels: guarded(pixels, lambda own: own.mean()),
        "tensors": lambda tensors: guarded(tensors, lambda own: own.mean()),
        "reasoning": lambda reasoning: guarded(reasoning, lambda text: len(text.split()) + 1),
        "metadata": lambda metadata: guarded(metadata, lambda own: len(own.get("include", [])) + 1),
    }
    functions[column].__name__ = "swallows"
    swallows = reward("swallows")(functions[column])
    found = _examine(functions=(mean, swallows))
    assert found["reward-errors"].verdict == ("warn" if column == "reasoning" else FAULT)
    assert "cannot be read" in found["reward-errors"].seen


@pytest.mark.parametrize("caught", [OSError, ValueError, RuntimeError])
def test_a_failure_of_any_usual_kind_that_becomes_a_score_is_found(caught: type[Exception]) -> None:
    """Decoders and networks raise one or another; who catches only one of them turns that one into 0."""

    @reward("catches")
    def catches(images):
        try:
            return [float(np.asarray(image, dtype=float).mean()) for image in images]
        except caught:
            return [0.0] * len(images)

    assert _examine(functions=(catches,))["reward-errors"].verdict == FAULT


def test_rewards_that_own_up_or_were_not_asked_are_left_alone() -> None:
    """A reward on words is not blamed for a picture, one that handles missing words is not for those it has."""

    @reward("words")
    def words(reasoning):
        return [float(len(text or "")) for text in reasoning]

    @reward("honest")
    def honest(pixels):
        return [None if p.size == 0 else float(p.mean()) for p in pixels]

    config = _config()
    with _rewards(mean, words, honest) as rewards:
        evidence = gather(_state(config), PROMPTS, rewards, config, thorough=False)
        assert not _faults({f.name: f for f in findings(evidence)})
    assert evidence.judged.unreadable["mean"] == [RAISES, NOT_ASKED, NOT_ASKED]
    assert evidence.judged.unreadable["words"] == [NOT_ASKED, RAISES, NOT_ASKED]
    assert evidence.judged.unreadable["honest"][0] in (ABSTAINS, RAISES)


# ----- around the algorithm


def _evidence(*settings: str, dtype: torch.dtype = torch.float32) -> Evidence:
    config = _config(*settings)
    model = build_model(seed=3, width=32, layers=2)
    model.network.to(dtype)
    policy = prepare_policy(model, config)
    state = TrainState(policy, make_optimizer(policy, config))
    with _rewards(mean) as rewards:
        return gather(state, PROMPTS, rewards, config, thorough=False)


def test_memory_is_what_the_dry_run_says() -> None:
    evidence = _evidence()
    assert environment.memory(evidence).verdict == "skipped"
    need = plan_of(evidence.config, "embedded", None).memory.need
    for share, verdict in ((0.5, "ok"), (0.95, "warn"), (1.1, FAULT)):
        settings = evidence.config.model_copy(update={"memory_gb": need / share})
        outcome = environment.memory(replace(evidence, plan=plan_of(settings, "embedded", None)))
        assert (outcome.verdict, outcome.value) == (verdict, need)


def test_another_version_than_was_asked_for_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = _evidence()
    assert environment.versions(evidence).verdict == "ok"
    own = environment.environment()
    monkeypatch.setattr(environment, "environment", lambda: own | {"torch": "1.0"})
    outcome = environment.versions(evidence)
    assert outcome.verdict == "warn"
    assert "torch 1.0, asked for" in outcome.seen


def test_bf16_is_compared_with_fp32() -> None:
    """Of one micro-batch: nothing where both are fp32, something and not much where it is bf16."""
    assert environment._from_wide(_evidence("train.finetune=lora")) == 0
    assert 1e-4 < environment._from_wide(_evidence("train.finetune=lora", dtype=torch.bfloat16)) < 0.5
    assert environment.bf16(_evidence()).verdict == "skipped"


# ----- the witness


def test_the_witness_sees_what_is_fed_and_changes_nothing(tiny: MoTPolicy) -> None:
    """Rollout and replay through it are equal to the bit, and every word of replay is one of rollout's."""
    config = _config()
    sampling, window = train_sampling(config), flow.Window(0, 2)
    plain = flatten(rollout.rollout(tiny, PROMPTS, 3, sampling, window, 0))
    witness = Recorder(tiny)
    seen = flatten(rollout.rollout(witness.as_policy, PROMPTS, 3, sampling, window, 0))
    accounts, _ = witness.take()
    for a, b in zip(plain, seen, strict=True):
        assert torch.equal(a.images[-1].latent, b.images[-1].latent)
        assert torch.equal(a.segments[-2].ids, b.segments[-2].ids)
    assert [len(p) for p in accounts[0].paintings()] == [4] * 6
    batch = replay.collate(seen)
    with torch.no_grad():
        direct, watched = replay.replay(tiny, batch), replay.replay(witness.as_policy, batch)
    assert torch.equal(direct.log_prob_BL, watched.log_prob_BL)
    assert torch.equal(direct.velocities[0], watched.velocities[0])
    (account,) = witness.take()[0]
    assert account.astray == 0
    for told, logits in account.words.items():
        torch.testing.assert_close(logits, accounts[0].words[told], rtol=1e-6, atol=1e-6)
    assert len(account.ends) == 6


def test_rows_of_a_micro_batch_are_known_by_their_actions(tiny: MoTPolicy) -> None:
    config = _config("train.micro_batch_size=3")
    episodes = flatten(rollout.rollout(tiny, PROMPTS, 4, train_sampling(config), flow.Window(0, 2), 0))
    order = [5, 2, 7, 0, 1, 3, 4, 6]
    objective_of = replace(train.objective_of(config), penalty="none")
    fixed = train.score_old_and_reference(tiny, [episodes[k] for k in order], config, objective_of)
    shares = train.with_advantages(fixed, torch.arange(8.0))
    rows = [k for share in shares for m in share for k in rows_of(m, episodes)]
    assert rows == order


def test_every_check_is_explained() -> None:
    text = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
    section = text.split("## What the doctor says")[1].split("\n## ")[0]
    for check in CHECKS:
        assert f"### {check.name}\n" in section, check.name
        assert check.means
        assert check.remedy
