"""UniGRPO: prompts, rollout, rewards, advantage, replay, objective, step.

One advantage per episode moves both kinds of its actions: the words of the reasoning and the stochastic steps
of the painting. `training_step` is the algorithm; `train` is the run around it. Rewards that are computed elsewhere
begin during the rollout and are waited for after the old and the reference policy's replay, which needs none.

Shape letters: P prompts, G members of a group, B = P * G episodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.advantage import combined_advantage
from unigrpo_cli.algo.objective import Loss, Objective, Scores, unigrpo_loss
from unigrpo_cli.algo.rng import derive, uniform
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, Group, Prompt, flatten
from unigrpo_cli.errors import RefusedUpdateError, RewardError
from unigrpo_cli.evaluate import sample_of, samples_of, train_sampling
from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.parallel.ranks import ALONE, Ranks, local
from unigrpo_cli.parallel.workers import at_once, parallel_map
from unigrpo_cli.replay import Batch, collate, micro_batches, replay, split_up
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rollout import rollout
from unigrpo_cli.training import metrics as step_metrics
from unigrpo_cli.training import update_guard
from unigrpo_cli.training.optimizer import warmup
from unigrpo_cli.training.state import TrainState


@dataclass(frozen=True)
class Step:
    """What one training step leaves to look at; `skipped` says why some or all of its updates were not made.

    Metrics are of all ranks; groups, scores and advantages are this rank's own.
    """

    metrics: dict[str, float]
    groups: list[Group]
    scored: dict[str, RewardResult]
    advantage_B: Tensor
    skipped: str | None = None


@dataclass(frozen=True)
class Fixed:
    """Episodes of one backward pass, `rows` of a rank's own, with the scores that stay while they are trained on.

    `old` is None where the policy has not moved since it drew them: then it is what the pass itself says.
    """

    batch: Batch
    rows: list[int]
    old: Scores | None
    reference: Scores | None


@dataclass(frozen=True)
class MicroBatch:
    """`Fixed` with the advantages of its episodes: all that one backward pass learns from."""

    batch: Batch
    advantage_B: Tensor
    old: Scores | None
    reference: Scores | None

    @property
    def old_apart(self) -> Scores:
        """Of one whose old scores had a pass of their own."""
        assert self.old is not None
        return self.old


@dataclass(frozen=True)
class Update:
    """One optimizer step: all ranks' terms and statistics, and this rank's micro-batches with their old scores."""

    terms: dict[str, float]
    replayed: list[tuple[Batch, Scores]]


RATIO_CHECKED = 16
"""Steps between those in which the first update has old scores of their own, to see that its ratio is exactly 1."""


def train(
    state: TrainState,
    prompts: Sequence[Prompt],
    rewards: Scorer,
    config: Config,
    after_step: Callable[[Step], bool],
) -> None:
    """Training steps from where `state` is to `train.steps`, or until `after_step` answers True."""
    while state.step < config.train.steps:
        done = training_step(state, prompts_for(prompts, config, state.step), rewards, config)
        state.step, state.between = state.step + 1, False
        if after_step(done):
            return


def training_step(state: TrainState, prompts_P: Sequence[Prompt], rewards: Scorer, config: Config) -> Step:
    """One rollout and the updates on it; the algorithm, in order.

    Of the step's prompts each rank draws, judges and replays its own; what moves the weights is of all.
    """
    seconds: dict[str, float] = {}
    policy, objective, step, ranks = state.policy, objective_of(config), state.step, state.ranks
    seed = derive(config.seed, "step", step)

    scoring = rewards.start(step=step, overlap=config.reward.overlap, ranks=ranks)
    with _timed(seconds, "rollout"), policy.gathered() as sampler, ranks.together():
        groups = rollout(
            sampler,
            ranks.share(prompts_P, config.train.minibatches),
            config.train.group_size,
            replace(train_sampling(config), tapered=scoring.begins_early),
            window_of(config, step),
            seed,
            on_episodes=lambda drawn: scoring.add([sample_of(e, step) for e in drawn]),
        )
    with _timed(seconds, "reward"):
        scoring.submit([s.id for s in samples_of(groups, step)], parts=config.train.minibatches)
    apart = config.train.old_scores == "replay" or config.train.epochs > 1 or step % RATIO_CHECKED == 0
    with _timed(seconds, "old"):
        fixed = score_old_and_reference(policy, flatten(groups), config, objective, ranks, apart)
    with _timed(seconds, "reward"):
        scored = scoring.finish()
    advantage_B = advantages(scored, rewards, config, len(prompts_P), seed)

    own = ranks.share(range(len(advantage_B)), config.train.minibatches)
    shares = weighed(fixed, advantage_B[own])
    metrics = step_metrics.rollout_metrics(groups, scored, advantage_B)
    updates: list[Update] = []
    skipped = None
    with _timed(seconds, "update"):
        try:
            with ranks.together():
                update_guard.check_batch(groups, [(m.batch, m.old, m.reference) for share in shares for m in share])
            for share in shares * config.train.epochs:
                updates.append(optimizer_step(state, share, objective, config))
        except RefusedUpdateError as refused:  # updates made before it stay: docs/decisions/0014
            skipped = f"update {len(updates) + 1} of {len(shares) * config.train.epochs}: {refused}"
    later = [(m.batch, m.old) for share in shares for m in share if m.old is not None]
    metrics |= step_metrics.drift(later if apart else [r for u in updates[:1] for r in u.replayed] + later)
    metrics |= step_metrics.over_updates([u.terms for u in updates], ratio_checked=apart) | step_metrics.memory()
    metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
    scored = {name: s.select(own) for name, s in scored.items()}
    return Step(ranks.averaged(metrics), groups, scored, advantage_B[own], skipped)


def prompts_for(prompts: Sequence[Prompt], config: Config, step: int) -> list[Prompt]:
    """The prompts of a training step: passes over the list, each in its own order, cut into steps.

    A function of the step alone, so a resumed run goes on where it was. A prompt that comes twice in a step
    (a short list) gets a second name and with it noise of its own.
    """
    count = config.train.prompts_per_step
    orders: dict[int, Tensor] = {}
    chosen: list[Prompt] = []
    for index in range(step * count, (step + 1) * count):
        epoch, at = divmod(index, len(prompts))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive(config.seed, "order", epoch))
            orders[epoch] = torch.randperm(len(prompts), generator=generator)
        prompt = prompts[int(orders[epoch][at])]
        again = sum(p.text == prompt.text for p in chosen)
        taken, name = {p.id for p in chosen}, f"{prompt.id}@{again}" if again else prompt.id
        while name in taken:  # a list may have a name such as "a@1" of its own
            name += "'"
        chosen.append(replace(prompt, id=name) if name != prompt.id else prompt)
    return chosen


def window_of(config: Config, step: int) -> flow.Window:
    """The stochastic window of a training step, one for all its groups."""
    s = config.sampling
    return flow.sde_window(
        s.window,
        steps=s.steps,
        size=s.window_size,
        within=s.window_range,
        uniform=float(uniform(derive(config.seed, "window", step), 1)),
        turn=step // s.window_period,
    )


def objective_of(config: Config) -> Objective:
    """The objective; training one expert alone leaves out the other's term."""
    o, experts = config.objective, config.train.experts
    return Objective(
        text_weight=0.0 if experts == "image" else o.text_weight,
        image_weight=0.0 if experts == "text" else o.image_weight,
        text_clip=o.text_clip,
        image_clip=o.image_clip,
        text_kl=o.text_kl,
        trust_region=o.trust_region,
        penalty=o.penalty if o.penalty_weight else "none",
        penalty_weight=o.penalty_weight,
    )


def advantages(scored: dict[str, RewardResult], rewards: Scorer, config: Config, prompts: int, seed: int) -> Tensor:
    """One advantage per episode, fp32 [B], from all rewards of its group."""
    reward_PG = {n: torch.from_numpy(s.scores).view(prompts, -1) for n, s in scored.items()}
    valid_PG = {n: torch.from_numpy(s.valid).view(prompts, -1) for n, s in scored.items()}
    advantage_PG = rewards.plugins.call(
        "unigrpo_combine_rewards", rewards=reward_PG, valid=valid_PG, weights=rewards.weights
    )
    if advantage_PG is not None:
        like = next(iter(reward_PG.values()))
        if not isinstance(advantage_PG, Tensor) or advantage_PG.shape != like.shape:
            raise RewardError(f"unigrpo_combine_rewards must return a tensor of shape {list(like.shape)}")
        if not advantage_PG.isfinite().all():
            raise RewardError("unigrpo_combine_rewards returned advantages that are not finite")
    else:
        advantage_PG = combined_advantage(
            reward_PG,
            rewards.weights,
            valid_PG,
            how=combination(rewards, config),
            normalize=config.advantage.normalize,
            clamp=config.advantage.clamp or None,
        )
    advantage_B = advantage_PG.flatten().float()
    if config.advantage.shuffle:
        generator = torch.Generator().manual_seed(derive(seed, "shuffle"))
        advantage_B = advantage_B[torch.randperm(len(advantage_B), generator=generator)]
    return advantage_B


def combination(rewards: Scorer, config: Config) -> str:
    """How several rewards are combined: as configured, or gdpo when the trained ones differ in range."""
    if config.advantage.combine != "auto":
        return config.advantage.combine
    ranges = {rewards.ranges[name] for name, weight in rewards.weights.items() if weight}
    return "gdpo" if len(ranges) > 1 else "sum"


def score_old_and_reference(
    policy: TrainablePolicy,
    episodes: Sequence[Episode],
    config: Config,
    objective: Objective,
    ranks: Ranks = ALONE,
    apart: bool = True,
) -> list[list[Fixed]]:
    """Micro-batches of each update with the scores that stay fixed: the old policy's and the reference's.

    Updates share out whole groups. Old scores come from the same packed replay, on the same micro-batch, as
    the new ones will. So the first ratio is exactly 1 by equality of computation, not by tolerance, and the
    rollout's own log-probabilities serve only to measure drift. All ranks have equally many micro-batches, for a
    pass through sharded weights takes all of them.

    Args:
        apart: False leaves out the old scores of the first update, which are what its own passes say.
    """
    paints = objective.image_weight > 0
    needs_reference = objective.text_kl > 0 or (paints and objective.penalty != "none")
    each = len(episodes) // config.train.minibatches
    parts = []
    for start in range(0, len(episodes), each):
        own = micro_batches(
            episodes,
            range(start, start + each),
            config.train.micro_batch_size,
            config.train.max_tokens_per_micro_batch,
        )
        parts.append(split_up(own, ranks.most(len(own))))
    batches = [[collate([episodes[k] for k in part], policy.device) for part in share] for share in parts]

    @torch.no_grad()  # which threads do not inherit
    def score_old(batch: Batch) -> Scores:
        return replay(policy, batch, grad_through_context=config.objective.grad_through_context, image=paints)

    @torch.no_grad()
    def score_reference(batch: Batch) -> Scores:
        return replay(beginning, batch, image=paints, text=objective.text_kl > 0)

    def scored(score: Callable[[Batch], Scores], share: list[Batch]) -> list[Scores | None]:
        """An update's batches beside each other, as they will be learnt from: with as many threads for each."""
        return list(parallel_map(score, share, _beside(policy, len(share))))

    nothing: list[list[Scores | None]] = [[None] * len(share) for share in batches]
    old = [scored(score_old, share) if apart or k else nothing[k] for k, share in enumerate(batches)]
    reference = nothing
    if needs_reference:
        with policy.reference() as beginning:
            reference = [scored(score_reference, share) for share in batches]
    updates = zip(batches, parts, old, reference, strict=True)
    return [[Fixed(*own) for own in zip(*update, strict=True)] for update in updates]


def weighed(fixed: Sequence[Sequence[Fixed]], advantage_B: Tensor) -> list[list[MicroBatch]]:
    """The micro-batches of each update, each row with the advantage of its episode."""
    advantage_B = advantage_B.to(fixed[0][0].batch.actions.mask_BL.device)
    return [[MicroBatch(f.batch, advantage_B[f.rows], f.old, f.reference) for f in share] for share in fixed]


def optimizer_step(state: TrainState, share: Sequence[MicroBatch], objective: Objective, config: Config) -> Update:
    """Replay, objective and backward for each micro-batch, then one step.

    Raises:
        RefusedUpdateError: when loss or gradient is not finite, or the gradient explodes. Then nothing has moved.
    """
    ranks = state.ranks
    episodes = ranks.world * sum(len(m.advantage_B) for m in share)
    paints = objective.image_weight > 0
    trained = state.policy.trainable()
    every: list[torch.nn.Parameter] = [p for parameters in trained.values() for p in parameters]
    facts = state.facts.setdefault("watch", {})
    terms: dict[str, float] = {}
    replayed: list[tuple[Batch, Scores]] = []
    beside = _beside(state.policy, len(share))

    def learn(m: MicroBatch) -> tuple[Scores, Loss, Sequence[Tensor | None]]:
        new = replay(state.policy, m.batch, grad_through_context=config.objective.grad_through_context, image=paints)
        old = m.old or new.detached()
        loss = unigrpo_loss(m.batch.actions, new, old, m.reference, m.advantage_B, objective, episodes=episodes)
        if beside == 1:
            loss.total.backward()
            return old, loss, ()
        # Gradients of their own, to be added in order; laid out as `backward` does, for norms sum in that order.
        found = torch.autograd.grad(loss.total, every, allow_unused=True)
        return old, loss, [None if g is None else g.contiguous() for g in found]

    try:
        for m, (old, loss, gradients) in zip(share, parallel_map(learn, share, beside), strict=True):
            with ranks.together():
                update_guard.check_loss(loss.total)
            for parameter, gradient in zip(every, gradients, strict=False):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            step_metrics.add_terms(terms, loss)
            replayed.append((m.batch, old))
        ranks.sum_gradients(every)
        norms = {e: n.norm().item() for e, own in trained.items() if len(n := ranks.gradient_norms(own))}
        update_guard.check_gradient(norms, facts, config.monitor.explosion)
        update_guard.remember_norms(norms, facts, taught=ranks.any(any(bool(m.advantage_B.any()) for m in share)))
        norm = ranks.clip_gradients(every, config.train.grad_clip)
        for group in state.optimizer.param_groups:
            group["lr"] = group["full_lr"] * warmup(state.optimizer, config)
        state.between = True
        state.optimizer.step()
    finally:
        state.optimizer.zero_grad()
    with ranks.together():
        update_guard.check_weights([local(p) for p in every], state.step)
    terms = ranks.summed(terms)
    terms |= {f"{expert}/grad_norm": value for expert, value in norms.items()}
    return Update(terms | {"grad_clipped": float(norm > config.train.grad_clip)}, replayed)


def _beside(policy: TrainablePolicy, batches: int) -> int:
    """How many micro-batches are replayed at the same time; one where ranks make their passes together."""
    return 1 if policy.is_sharded else at_once(batches, policy.device)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds up: rewards take their time in two places."""
    began = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
