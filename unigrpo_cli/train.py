"""UniGRPO: prompts, rollout, rewards, advantage, replay, objective, step.

One advantage per episode moves both kinds of its actions: the words of the reasoning and the stochastic steps
of the painting. `training_step` is the algorithm; everything before and after it is bookkeeping.

Shape letters: P prompts, G members of a group, B = P * G episodes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.advantage import combined_advantage
from unigrpo_cli.algo.objective import Objective, Scores, step_densities, unigrpo_loss
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, Group, Prompt, TextActions, flatten
from unigrpo_cli.evaluate import samples_of, train_sampling
from unigrpo_cli.models.unified import UnifiedModel
from unigrpo_cli.replay import Batch, collate, replay
from unigrpo_cli.rewards.scoring import RewardSet, Scored
from unigrpo_cli.rollout import rollout
from unigrpo_cli.runtime.state import TrainState
from unigrpo_cli.seeds import derive, uniform


@dataclass(frozen=True)
class Step:
    """What one training step leaves to look at."""

    metrics: dict[str, float]
    groups: list[Group]
    scored: dict[str, Scored]
    advantage_B: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Episodes of one backward pass with what stays fixed during their updates."""

    batch: Batch
    advantage_B: Tensor
    old: Scores
    reference: Scores | None


def training_step(
    state: TrainState, prompts_P: Sequence[Prompt], rewards: RewardSet, config: Config, step: int
) -> Step:
    """One rollout and the updates on it; the algorithm, in order."""
    seconds: dict[str, float] = {}
    objective = objective_of(config)
    seed = derive(config.seed, "step", step)

    with _timed(seconds, "rollout"):
        window = window_of(config, step)
        groups = rollout(state.policy, prompts_P, config.train.group_size, train_sampling(config), window, seed)
    with _timed(seconds, "reward"):
        scored = rewards.score(samples_of(groups, step), step=step)
    advantage_B = advantages(scored, rewards, config, len(prompts_P), seed)
    metrics = _rollout_metrics(groups, scored, advantage_B)

    with _timed(seconds, "old"):
        micro_batches = replay_fixed(state.policy, flatten(groups), advantage_B, config, objective)
        metrics |= drift(micro_batches, objective)
    with _timed(seconds, "update"):
        for epoch in range(config.train.epochs):
            for update, share in enumerate(_shares(micro_batches, config.train.updates)):
                terms = optimizer_step(state, share, objective, config)
                if epoch == update == 0:
                    for name in ("text/max_abs_log_ratio", "image/max_abs_log_ratio"):
                        if name in terms:
                            metrics[name.replace("max_abs", "first_max_abs")] = terms[name]
                for name, value in terms.items():
                    metrics.setdefault(name, 0.0)
                    is_max = "max_abs" in name
                    metrics[name] = max(metrics[name], value) if is_max else metrics[name] + value / (
                        config.train.epochs * config.train.updates
                    )
    metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
    return Step(metrics, groups, scored, advantage_B)


def window_of(config: Config, step: int) -> flow.Window:
    """The stochastic window of a training step, one for all its groups."""
    s = config.sampling
    return flow.sde_window(
        s.window,
        steps=s.steps,
        size=s.window_size,
        within=s.window_within,
        uniform=float(uniform(derive(config.seed, "window", step), 1)),
        turn=step // s.window_every,
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
        kernel=config.sampling.kernel,
        noise_level=config.sampling.noise_level,
    )


def advantages(
    scored: dict[str, Scored], rewards: RewardSet, config: Config, prompts: int, seed: int
) -> Tensor:
    """One advantage per episode, fp32 [B], from all rewards of its group."""
    reward_PG = {n: torch.from_numpy(s.scores).view(prompts, -1) for n, s in scored.items()}
    valid_PG = {n: torch.from_numpy(s.valid).view(prompts, -1) for n, s in scored.items()}
    hook = rewards.plugins.manager.hook
    advantage_PG = hook.unigrpo_combine_rewards(rewards=reward_PG, valid=valid_PG, weights=rewards.weights)
    if advantage_PG is None:
        advantage_PG = combined_advantage(
            reward_PG,
            rewards.weights,
            valid_PG,
            how=combination(rewards, config),
            std=config.advantage.std,
            clamp=config.advantage.clamp,
        )
    advantage_B = advantage_PG.flatten().float()
    if config.advantage.shuffle:
        generator = torch.Generator().manual_seed(derive(seed, "shuffle"))
        advantage_B = advantage_B[torch.randperm(len(advantage_B), generator=generator)]
    return advantage_B


def combination(rewards: RewardSet, config: Config) -> str:
    """How several rewards are combined: as configured, or gdpo when the trained ones differ in range."""
    if config.advantage.combine != "auto":
        return config.advantage.combine
    ranges = {rewards.ranges[name] for name, weight in rewards.weights.items() if weight}
    return "gdpo" if len(ranges) > 1 else "sum"


def replay_fixed(
    policy: UnifiedModel,
    episodes: Sequence[Episode],
    advantage_B: Tensor,
    config: Config,
    objective: Objective,
) -> list[MicroBatch]:
    """Micro-batches with the scores that stay fixed: the old policy's and, where needed, the reference's.

    Old scores come from the same packed replay, on the same micro-batch, as the new ones will. So the first
    ratio is exactly 1 by equality of computation, not by tolerance, and the rollout's own log-probabilities
    serve only to measure drift.
    """
    needs_reference = bool(objective.text_kl) or (objective.image_weight > 0 and objective.penalty != "none")
    paints = objective.image_weight > 0
    size = config.train.micro_batch
    per_update = len(episodes) // config.train.updates
    starts = [u * per_update + k for u in range(config.train.updates) for k in range(0, per_update, size)]
    made = []
    for at in starts:
        end = min(at + size, (at // per_update + 1) * per_update)
        batch = collate(episodes[at:end], policy.device)
        with torch.no_grad():
            old = replay(policy, batch, coupling=config.objective.coupling, image=paints)
            reference = None
            if needs_reference:
                with policy.reference() as start:
                    reference = replay(start, batch, coupling=config.objective.coupling, image=paints)
        made.append(MicroBatch(batch, advantage_B[at:end].to(policy.device), old, reference))
    return made


def _shares(micro_batches: list[MicroBatch], updates: int) -> list[list[MicroBatch]]:
    """The micro-batches of each update: disjoint shares of whole groups."""
    each = len(micro_batches) // updates
    return [micro_batches[u * each : (u + 1) * each] for u in range(updates)]


def optimizer_step(
    state: TrainState, share: Sequence[MicroBatch], objective: Objective, config: Config
) -> dict[str, float]:
    """Replay, objective and backward for each micro-batch, then one step. Returns terms and statistics."""
    episodes = sum(len(m.advantage_B) for m in share)
    terms: dict[str, float] = {}
    for micro in share:
        new = replay(
            state.policy, micro.batch, coupling=config.objective.coupling, image=objective.image_weight > 0
        )
        loss = unigrpo_loss(
            micro.batch.actions, new, micro.old, micro.reference, micro.advantage_B, objective, episodes=episodes
        )
        loss.total.backward()
        for name, value in loss.means.items():
            terms[name] = terms.get(name, 0.0) + value.item()
        for name, value in loss.maxima.items():
            terms[name] = max(terms.get(name, 0.0), value.item())
        terms["loss"] = terms.get("loss", 0.0) + loss.total.item()
    trained = state.policy.trainable()
    for expert, parameters in trained.items():
        norms = [p.grad.norm() for p in parameters if p.grad is not None]
        if norms:
            terms[f"{expert}/grad_norm"] = torch.stack(norms).norm().item()
    everything = [p for parameters in trained.values() for p in parameters]
    torch.nn.utils.clip_grad_norm_(everything, config.train.grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = group["full_lr"] * warmup(state, config)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return terms


def warmup(state: TrainState, config: Config) -> float:
    """Share of the full learning rate at the coming optimizer step."""
    done = max((int(s["step"]) for s in state.optimizer.state.values()), default=0)
    return min(1.0, (done + 1) / config.train.warmup) if config.train.warmup else 1.0


def make_optimizer(policy: UnifiedModel, config: Config) -> torch.optim.AdamW:
    """AdamW with one group per expert, each with its own learning rate."""
    t = config.train
    rates = {"text": t.lr_text, "image": t.lr_image}
    groups = [
        {"params": parameters, "lr": rates[expert], "full_lr": rates[expert], "expert": expert}
        for expert, parameters in policy.trainable().items()
        if parameters
    ]
    return torch.optim.AdamW(groups, betas=t.betas, weight_decay=t.weight_decay)


def prompts_for(prompts: Sequence[Prompt], config: Config, step: int) -> list[Prompt]:
    """The prompts of a training step: passes over the list, each in its own order, cut into steps.

    A function of the step alone, so a resumed run goes on where it was. A prompt that comes twice in a step
    (a short list) gets a second name and with it noise of its own.
    """
    count = config.train.prompts_per_step
    chosen = []
    for index in range(step * count, (step + 1) * count):
        epoch, at = divmod(index, len(prompts))
        generator = torch.Generator().manual_seed(derive(config.seed, "order", epoch))
        order = torch.randperm(len(prompts), generator=generator)
        prompt = prompts[int(order[at])]
        again = sum(p.text == prompt.text for p in chosen)
        chosen.append(replace(prompt, id=f"{prompt.id}@{again}") if again else prompt)
    return chosen


def drift(micro_batches: Sequence[MicroBatch], objective: Objective) -> dict[str, float]:
    """How far replay is from rollout, in log-probability: the same weights, another way to compute them."""
    text: list[Tensor] = []
    image: list[Tensor] = []
    for m in micro_batches:
        mask = m.batch.actions.mask_BL
        text.append((m.old.log_prob_BL - m.batch.behaviour_text_BL)[mask].abs())
        if m.old.velocities:
            scores = [
                flow.log_prob(objective.kernel, steps.x_next_BKND, step_densities(steps, v, objective))
                for steps, v in zip(m.batch.actions.images, m.old.velocities, strict=True)
            ]
            image.append((torch.cat(scores, dim=1) - m.batch.behaviour_image_BK).abs().flatten())
    found = {}
    for name, parts in (("text", text), ("image", image)):
        values = torch.cat(parts) if parts else torch.zeros(0)
        if len(values):
            found |= {f"{name}/drift_max": values.max().item(), f"{name}/drift_mean": values.mean().item()}
    return found


def _rollout_metrics(
    groups: Sequence[Group], scored: dict[str, Scored], advantage_B: Tensor
) -> dict[str, float]:
    """What was drawn and how it was judged, before any update."""
    metrics: dict[str, float] = {}
    for name, own in scored.items():
        metrics[f"reward/{name}"] = math.nan if own.mean is None else own.mean
        metrics[f"reward/{name}/abstained"] = float((~own.valid).mean())
        for part, values in own.components.items():
            metrics[f"reward/{name}/{part}"] = float(values[own.valid].mean()) if own.valid.any() else math.nan
    advantage_PG = advantage_B.view(len(groups), -1)
    metrics["advantage/zero_groups"] = float((advantage_PG == 0).all(dim=1).float().mean())
    metrics["advantage/std"] = float(advantage_B.std(correction=0))
    texts = [s for e in flatten(groups) for s in e.segments if isinstance(s, TextActions)]
    if texts:
        metrics["text/length"] = sum(len(t.ids) for t in texts) / len(texts)
        metrics["text/truncated"] = sum(not t.finished for t in texts) / len(texts)
    return metrics


@contextmanager
def _timed(seconds: dict[str, float], name: str):
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def prepare_policy(policy: UnifiedModel, config: Config) -> UnifiedModel:
    """Choose what is trained and keep the reference: adapters, or a frozen copy of the starting weights."""
    t, network = config.train, policy.network
    network.activation_checkpointing = t.activation_checkpointing
    if t.tune == "lora":
        from unigrpo_cli.models.lora import add_adapters, has_adapters

        if not has_adapters(network):
            add_adapters(network, t.lora_rank, t.lora_alpha)
        else:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_("lora_" in name)
    else:
        policy = policy.with_frozen_copy()
        extra: dict[str, tuple[str, ...]] = {
            "embeddings": ("language_model.model.embed_tokens.",),
            "head": ("language_model.lm_head.",),
            "projections": ("vae2llm.", "llm2vae.", "time_embedder."),
        }
        wanted = ("language_model.model.layers.", *(prefix for name in t.also for prefix in extra[name]))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(wanted))
    if t.experts != "both":
        other = "image" if t.experts == "text" else "text"
        for parameter in policy.trainable()[other]:
            parameter.requires_grad_(False)
    return policy


def summary_metrics(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """The largest value of a metric over a run, None where it was never there."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return max(values) if values else None
