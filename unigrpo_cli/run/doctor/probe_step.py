"""Records a small training step; its second half: replay, gradients, and a trial update.

Training's functions are called through the module `train`, by the names that it uses itself, so a fault in them shows
here too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from unigrpo_cli import train
from unigrpo_cli.algo.objective import Scores, per_action
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import DivergedError
from unigrpo_cli.parallel.workers import sequential
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.doctor.probe_rollout import abstentions_restored, record_rewards, record_rollout
from unigrpo_cli.run.doctor.recorder import Recorder
from unigrpo_cli.run.doctor.recording import (
    RecordedReplay,
    RecordedRewards,
    RecordedRollout,
    Recording,
    TrialUpdate,
)
from unigrpo_cli.train import MicroBatch
from unigrpo_cli.training.optimizer import make_optimizer
from unigrpo_cli.training.state import TrainState

TRIAL_RATE = 1e-3  # learning rate of the trial update: its effect is visible in bf16
UNDONE = 2**28  # bytes of trained weights up to which a copy is kept to undo the trial update
FAILURES = (DivergedError, ValueError, RuntimeError, LookupError, TypeError, AssertionError)
"""Errors of replay and update that are findings. Out of memory is not among them: it needs another remedy."""


class Gradients(torch.optim.Optimizer):
    """An optimizer that keeps gradients and changes no weight."""

    def __init__(self, policy: Any):
        parameters = [p for own in policy.trainable().values() for p in own]
        super().__init__([{"params": parameters, "lr": 0.0, "full_lr": 0.0}], {})
        self.found: list[list[Tensor | None]] = []

    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        self.found.append([None if p.grad is None else p.grad.detach().clone() for p in params])

    def largest(self) -> dict[int, float | None]:
        """Largest magnitude over all updates by the parameter's id; None where there was no gradient."""
        found: dict[int, float | None] = {}
        for k, parameter in enumerate(self.param_groups[0]["params"]):
            own = [g for update in self.found if (g := update[k]) is not None]
            found[id(parameter)] = max((float(g.abs().max()) for g in own), default=None)
        return found


def record(
    state: TrainState, prompts: Sequence[Prompt], rewards: Scorer, config: Config, *, thorough: bool
) -> Recording:
    """Record a small training step. Weights are restored, unless there are too many to keep a copy.

    Args:
        state: its optimizer is not used.
        thorough: also sample and score again, and make the trial update where it cannot be undone.
    """
    small = probe_config(config)
    chosen = train.prompts_for(prompts, small, state.step)
    recorder, trouble = Recorder(state.policy), dict[str, str]()
    with _generators_restored(state.policy.device), abstentions_restored(rewards), sequential():
        rollout, scored = record_rollout(recorder, chosen, rewards, small, state.step, thorough)
        scores = record_rewards(rollout, scored, rewards, small, state.step, thorough)
        replay = _replay(recorder, rollout, scores, small, trouble)
        trial = None
        if replay is not None and "gradients" not in trouble:
            trial = _trial_update(recorder, chosen, replay, rewards, small, state.step, thorough, trouble)
    return Recording(small, state, rewards, thorough, rollout, scores, replay, trial, trouble)


def probe_config(config: Config) -> Config:
    """The run's settings with the doctor's few episodes, in several micro-batches."""
    d, t = config.doctor, config.train
    members = min(d.members, t.group_size)
    updates = t.minibatches if d.prompts % t.minibatches == 0 else 1
    own = {
        "prompts_per_step": d.prompts,
        "group_size": members,
        "minibatches": updates,
        "epochs": 1,
        "micro_batch_size": max(1, min(t.micro_batch_size, d.prompts * members // max(2, updates))),
    }
    sampling = config.sampling.model_copy(update={"compile": False})  # a compiled graph's calls cannot be recorded
    return config.model_copy(update={"train": t.model_copy(update=own), "sampling": sampling})


@contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    """Restores the global random generators: training does not use them, but a reward may."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# ----- replay and gradients


def _replay(
    recorder: Recorder, rollout: RecordedRollout, scores: RecordedRewards, config: Config, trouble: dict[str, str]
) -> RecordedReplay | None:
    """The second half of a training step up to its gradients; an error in it is a finding."""
    episodes, objective = [e for g in rollout.groups for e in g.episodes], train.objective_of(config)
    try:
        minibatches = train.score_old_and_reference(recorder.as_policy, episodes, config, objective)
        minibatches = train.with_advantages(minibatches, scores.advantage_BS)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        trouble["replay"] = f"{type(error).__name__}: {error}"
        return None
    traces, keeper = recorder.take(), Gradients(recorder)
    batches = sum(len(share) for share in minibatches)
    traces = traces[:: max(1, len(traces) // batches)]  # the first of each replay; guidance has contexts besides
    found = RecordedReplay(minibatches, traces, [], {})
    try:
        for share in map(_with_probe_advantages, minibatches):
            found.terms.append(train.update(_trial_state(recorder, keeper), share, objective, config).terms)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        trouble["gradients"] = f"{type(error).__name__}: {error}"
    finally:
        _clear_gradients(recorder)
        recorder.take()
    largest = keeper.largest() if keeper.found else {}
    named = recorder.policy.named_parameters()
    found.gradients.update({name: largest.get(id(p)) for name, p in named if p.requires_grad})
    return found


def _trial_state(policy: Any, optimizer: torch.optim.Optimizer) -> TrainState:
    return TrainState(policy, cast(torch.optim.AdamW, optimizer))


def _with_probe_advantages(share: list[MicroBatch], scale: float = 1.0) -> list[MicroBatch]:
    """Advantages of both signs and growing size, so that no two episodes cancel and no reward decides.

    Each segment of an episode has its own.
    """
    found, at = [], 0
    for m in share:
        actions, rows = m.batch.actions, len(m.rows)
        last = max(
            [int(actions.segment_BL.max()) if actions.segment_BL.numel() else 0, *(i.segment for i in actions.scored)]
        )
        k = torch.arange(at, at + rows, device=actions.mask_BL.device)
        advantage_B = scale * (1 - 2.0 * (k % 2)) * (1 + k / 8)
        growth_S = 1 + torch.arange(last + 1, device=k.device) / 4
        found.append(replace(m, advantages=per_action(advantage_B[:, None] * growth_S, actions)))
        at += rows
    return found


def _clear_gradients(recorder: Recorder) -> None:
    for _, parameter in recorder.policy.named_parameters():
        parameter.grad = None


# ----- after an update


def _trial_update(
    recorder: Recorder,
    prompts: list[Prompt],
    replay: RecordedReplay,
    rewards: Scorer,
    config: Config,
    step: int,
    thorough: bool,
    trouble: dict[str, str],
) -> TrialUpdate | None:
    """One update with a large learning rate, what it does to policy and reference, and the next training step."""
    policy, objective = recorder.policy, train.objective_of(config)
    trained = [p for own in policy.trainable().values() for p in own]
    small = sum(p.numel() * p.element_size() for p in trained) <= UNDONE
    if not trained or not (small or thorough):
        trouble["no update"] = "too many trained weights to undo a trial update" if trained else "nothing is trained"
        return None
    start = [p.detach().clone() for p in trained] if small else None
    rates = {"lr_text": TRIAL_RATE, "lr_image": TRIAL_RATE, "warmup": 0, "lr_decay": 0, "weight_decay": 0.0}
    fast = config.model_copy(update={"train": config.train.model_copy(update=rates)})
    share = replay.minibatches[0]
    try:
        train.update(_trial_state(policy, make_optimizer(policy, fast)), _with_probe_advantages(share), objective, fast)
        reference_moved, distance = _distances(policy, share[0], config)
        keeper = Gradients(policy)
        train.update(_trial_state(policy, keeper), _with_probe_advantages(share, 0.0), objective, fast)
        pull = max((x for x in keeper.largest().values() if x is not None), default=0.0)
        outward = None
        if start is not None:
            parts = zip(keeper.found[0], trained, start, strict=True)
            outward = sum(float((g * (p.detach() - q)).sum()) for g, p, q in parts if g is not None)
        state = replace(_trial_state(policy, Gradients(policy)), step=step)
        following = train.training_step(state, prompts, rewards, config, rescore=True)
        return TrialUpdate(reference_moved, distance, pull, outward, following)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        trouble["update"] = f"{type(error).__name__}: {error}"
        return None
    finally:
        _clear_gradients(recorder)
        if start is not None:
            with torch.no_grad():
                for parameter, before in zip(trained, start, strict=True):
                    parameter.copy_(before)


@torch.no_grad()
def _distances(policy: Any, m: MicroBatch, config: Config) -> tuple[float, float]:
    """Distance of the reference's scores from its earlier ones, and from the policy's; 0 without a reference."""
    if m.reference is None:
        return 0.0, 0.0
    objective = train.objective_of(config)
    image, text = objective.image_weight > 0, objective.text_kl > 0
    now = train.replay(policy, m.batch, grad_through_context=config.objective.grad_through_context, image=image)
    with policy.reference() as reference:
        again = train.replay(reference, m.batch, image=image, text=text)
    return difference(again, m.reference, text), difference(again, now, text)


def difference(a: Scores, b: Scores, text: bool) -> float:
    """Largest difference of velocities and, with `text`, of log-probabilities."""
    pairs = [*zip(a.velocities, b.velocities, strict=True), *([(a.log_prob_BL, b.log_prob_BL)] if text else [])]
    return max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=0.0)
