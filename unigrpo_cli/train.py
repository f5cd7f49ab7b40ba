"""UniGRPO: prompts, rollout, rewards, advantage, replay, objective, step.

One advantage trains both kinds of actions: the tokens of the reasoning and the stochastic denoising steps of the
image; with several rounds each segment may have its own. `training_step` is the algorithm. Rewards that wait for
another machine start during the rollout; their scores are needed only after the old and the reference policy's replay.

Shape letters: P prompts, G members of a group, B = P * G episodes, L text actions, K image actions,
S acted segments of an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from unigrpo_cli.algo.objective import Objective, Scores, unigrpo_loss
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.algo.supervised import supervised_loss
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, Group, Prompt, flatten
from unigrpo_cli.errors import RefusedUpdateError
from unigrpo_cli.evaluate import sample_of, samples_of, train_sampling
from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.parallel.workers import parallel_map, threads_per_worker
from unigrpo_cli.replay import Batch, collate, micro_batches, replay, split_up
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rollout import rollout
from unigrpo_cli.training import metrics as step_metrics
from unigrpo_cli.training import update_guard
from unigrpo_cli.training.advantages import advantages, credit_of, kinds_of_all
from unigrpo_cli.training.backward import backward, replay_workers
from unigrpo_cli.training.maps import advantage_maps
from unigrpo_cli.training.metrics import timed
from unigrpo_cli.training.micro_batch import MicroBatch, marked, refuse_uneven_passes, with_advantages
from unigrpo_cli.training.optimizer import optimizer_step
from unigrpo_cli.training.schedule import draws_of, later_windows, objective_of, prompts_for, traced_groups, window_of
from unigrpo_cli.training.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """One training step: metrics of all ranks; groups, scores and advantages of this rank.

    `updates` counts those that were made; `skipped` says why the next was refused, None when all were made.
    `traced` are the micro-batches that a trace shows.
    """

    metrics: dict[str, float]
    groups: list[Group]
    scored: dict[str, RewardResult]
    advantage_BS: Tensor
    skipped: str | None = None
    updates: int = 0
    traced: tuple[MicroBatch, ...] = ()


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step: terms and statistics of all ranks, and this rank's micro-batches with their old scores."""

    terms: dict[str, float]
    micro_batches: list[MicroBatch]


def train(
    state: TrainState,
    prompts: Sequence[Prompt],
    rewards: Scorer,
    config: Config,
    after_step: Callable[[StepResult], bool],
    step: Callable[..., StepResult] | None = None,
) -> None:
    """Training steps from `state.step` to `train.steps`, or until `after_step` returns True.

    Args:
        step: what is done with the prompts of a step; None for `training_step`.
    """
    while state.step < config.train.steps:
        chosen = prompts_for(prompts, config, state.step)
        result = (step or training_step)(state, chosen, rewards, config, rescore=state.step == 0)
        state.step, state.between = state.step + 1, False
        if after_step(result):
            return
        del result  # before the next rollout


def training_step(
    state: TrainState, prompts_P: Sequence[Prompt], rewards: Scorer, config: Config, *, rescore: bool = False
) -> StepResult:
    """One rollout and the updates on it. Each rank draws, scores and replays its share of the prompts.

    `rescore`: score the first update's episodes in a separate pass too, and report its ratio, which must be 1.
    """
    policy, objective, step, ranks, t = state.policy, objective_of(config), state.step, state.ranks, config.train
    seed, seconds = derive(config.seed, "step", step), dict[str, float]()

    every_picture = credit_of(config) == "reward-to-go"
    scoring = rewards.start(step=step, overlap=config.reward.overlap, ranks=ranks, every_picture=every_picture)
    with timed(seconds, "rollout"), policy.gathered() as sampler, ranks.together():
        groups = rollout(
            sampler,
            ranks.share(prompts_P, t.minibatches),
            t.group_size,
            replace(train_sampling(config), tapered=scoring.begins_early),
            window_of(config, step),
            seed,
            on_episodes=lambda drawn: scoring.add([sample_of(e, step) for e in drawn]),
            later_windows=later_windows(config, step),
        )
    with timed(seconds, "reward"):
        scoring.submit([s.id for s in samples_of(groups, step)], parts=t.minibatches)
    with timed(seconds, "old"):
        minibatches = score_old_and_reference(policy, flatten(groups), config, objective, ranks, rescore)
    with timed(seconds, "reward"):
        scored = scoring.finish()
    kind_BS = kinds_of_all(groups, ranks, t.minibatches)
    advantage_BS = advantages(scored, kind_BS, rewards, config, len(prompts_P), seed)
    own = ranks.share(range(len(advantage_BS)), t.minibatches)
    metrics = step_metrics.rollout_metrics(groups, scored, advantage_BS, kind_BS)
    with timed(seconds, "reward"), ranks.together():
        maps = advantage_maps(flatten(groups), samples_of(groups, step), rewards, config, step=step, split="train")
    minibatches = with_advantages(minibatches, advantage_BS[own], maps)
    minibatches = marked(minibatches, traced_groups(config, step, len(groups)), t.group_size)

    updates: list[UpdateResult] = []
    skipped = None
    with timed(seconds, "update"):
        try:
            with ranks.together():
                update_guard.check_batch(
                    groups, [(m.batch, m.old, m.reference) for share in minibatches for m in share]
                )
            for _ in range(t.epochs):
                for k, share in enumerate(minibatches):
                    updates.append(update(state, share, objective, config))
                    minibatches[k] = updates[-1].micro_batches
        except RefusedUpdateError as refused:  # earlier updates of the step stay: docs/decisions/0014
            skipped = f"update {len(updates) + 1} of {t.epochs * t.minibatches}: {refused}"
    metrics |= step_metrics.drift([(m.batch, m.old) for share in minibatches for m in share if m.old is not None])
    metrics |= step_metrics.over_updates([u.terms for u in updates], ratio_checked=rescore)
    metrics |= step_metrics.memory(policy.device) | {f"seconds/{name}": value for name, value in seconds.items()}
    scored = {name: result.select(own) for name, result in scored.items()}
    traced = tuple(m for share in minibatches for m in share if m.traced)
    return StepResult(ranks.averaged(metrics), groups, scored, advantage_BS[own], skipped, len(updates), traced)


@torch.no_grad()
def score_old_and_reference(
    policy: TrainablePolicy,
    episodes: Sequence[Episode],
    config: Config,
    objective: Objective,
    ranks: Ranks = ALONE,
    rescore: bool = True,
) -> list[list[MicroBatch]]:
    """Micro-batches of each update with the scores that stay fixed: the old policy's and the reference's.

    Minibatches share out whole groups. Old scores come from the same packed replay, on the same micro-batch, as the
    new ones will, so the first ratio is exactly 1; log-probabilities recorded by the rollout only measure drift. All
    ranks make equally many micro-batches: a pass through sharded weights takes all ranks.

    Args:
        rescore: also score the first update's episodes here. Otherwise its own scores, detached, are the old ones.
    """
    t, paints = config.train, objective.image_weight > 0
    needs_reference = objective.text_kl > 0 or (paints and objective.penalty != "none")
    each, draws = len(episodes) // t.minibatches, draws_of(config)
    found = []
    for k in range(t.minibatches):
        rows = range(k * each, (k + 1) * each)
        parts = micro_batches(episodes, rows, t.micro_batch_size, t.max_tokens_per_micro_batch, draws)
        parts = split_up(parts, ranks.most(len(parts)))
        batches = [collate([episodes[row] for row in part], policy.device, draws) for part in parts]
        if policy.is_sharded:
            refuse_uneven_passes(batches, ranks)
        workers = replay_workers(policy, len(batches))
        old: list[Scores | None] = [None] * len(parts)
        reference: list[Scores | None] = [None] * len(parts)
        if rescore or k:
            old = list(parallel_map(replayer(policy, config, paints), batches, workers))
        if needs_reference:
            with policy.reference() as start:
                score = partial(replay, start, image=paints, text=objective.text_kl > 0)
                reference = list(parallel_map(score, batches, workers))
        found.append([MicroBatch(*m) for m in zip(batches, parts, old, reference, strict=True)])
    return found


def update(
    state: TrainState, micro_batches: Sequence[MicroBatch], objective: Objective, config: Config
) -> UpdateResult:
    """Replay, objective and backward for each micro-batch, then one optimizer step.

    Raises:
        RefusedUpdateError: when loss or gradient is not finite, or the gradient explodes. No weight has changed then.
    """
    policy, ranks = state.policy, state.ranks
    loss_of = supervised_loss if config.sft.data else unigrpo_loss
    parameters = [p for expert in policy.trainable().values() for p in expert]
    episodes = ranks.world * sum(len(m.rows) for m in micro_batches)
    workers = replay_workers(policy, len(micro_batches))
    replay_batch = replayer(policy, config, objective.image_weight > 0)
    terms: dict[str, float] = {}
    done: list[MicroBatch] = []
    try:
        for k in range(0, len(micro_batches), workers):  # on a CPU, some side by side
            new = list(parallel_map(replay_batch, [m.batch for m in micro_batches[k : k + workers]], workers))
            part = [m.scored(s.detached()) for m, s in zip(micro_batches[k:], new, strict=False)]
            with threads_per_worker(workers):
                losses = [
                    loss_of(m.batch.actions, s, m.old_scores, m.reference, m.advantages, objective, episodes=episodes)
                    for m, s in zip(part, new, strict=True)
                ]
            values = step_metrics.values_of(losses)
            with ranks.together():
                update_guard.check_losses(values)
            backward([loss.total for loss in losses], parameters, workers)
            for loss in values:
                step_metrics.add_terms(terms, loss)
            done += part
        stepped = optimizer_step(state, config, [m.advantages for m in done])
    finally:
        state.optimizer.zero_grad()
    return UpdateResult(ranks.summed(terms) | stepped, done)


def replayer(policy: TrainablePolicy, config: Config, image: bool) -> Callable[[Batch], Scores]:
    """Replay with the run's settings: one definition, so that old and new scores are computed alike."""
    o = config.objective
    return partial(
        replay,
        policy,
        grad_through_context=o.grad_through_context,
        grad_through_images=o.grad_through_images,
        image=image,
    )
