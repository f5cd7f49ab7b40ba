"""Supervised fine-tuning on given answers: the cold start before reinforcement learning.

An answer is an episode whose text and images are given. `sft_step` is a training step in the place of
`train.training_step`: no rollout and no reward, the same replay, update, optimizer and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.rng import derive, normal, uniform
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, Group, ImageActions, Prompt, Segment, TextActions, flatten
from unigrpo_cli.errors import RefusedUpdateError
from unigrpo_cli.io.pictures import cropped, read_picture
from unigrpo_cli.models.policy import Policy, TrainablePolicy
from unigrpo_cli.parallel.ranks import Ranks
from unigrpo_cli.replay import collate, micro_batches, split_up
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.train import StepResult, UpdateResult, update
from unigrpo_cli.training import metrics as step_metrics
from unigrpo_cli.training import update_guard
from unigrpo_cli.training.metrics import timed
from unigrpo_cli.training.micro_batch import MicroBatch, refuse_uneven_passes, with_advantages
from unigrpo_cli.training.schedule import objective_of
from unigrpo_cli.training.state import TrainState


@dataclass(frozen=True)
class Demonstration(Prompt):
    """A prompt with its answer.

    Args:
        segments: what is given and what is imitated. Token ids are made once; latents of saved episodes are theirs.
        picture: the file of the image that ends the episode, read each time it is used; None when it is in `segments`.
    """

    segments: tuple[Segment, ...] = ()
    picture: str | None = None


def written(policy: Policy, prompt: Prompt, reasoning: str | None) -> tuple[Segment, ...]:
    """The segments of an answer before its image: what is given, and the reasoning as the model would write it."""
    given = policy.preamble(prompt, reasoning is not None)
    if reasoning is None:
        return given
    ids = torch.cat([policy.encode_text(reasoning), torch.tensor([policy.stop_id])])
    text = TextActions(
        ids=ids,
        log_prob=torch.zeros(len(ids)),
        finished=True,
        temperature=1.0,
        opening=(policy.open_id,),
        closing=(),
        text=policy.decode_text(ids),
    )
    return (*given, text)


def painted(grid: tuple[int, int], latent: Tensor, pixels: Tensor, times: Tensor) -> ImageActions:
    """An image with no stochastic step, at whose times velocities are learnt."""
    none = latent[None][:0]
    return ImageActions(grid, times, flow.Window(0, 0), "flow", 0.0, none, none, torch.zeros(0), latent, pixels)


@torch.no_grad()
def episode_of(policy: Policy, row: Demonstration, config: Config, seed: int) -> Episode:
    """The episode of a demonstration, its image encoded, with the times at which each image is noised in this step.

    With probability `sft.drop` it lacks its prompt and texts: then the model learns what guidance compares with.
    """
    s, segments = config.sampling, list(row.segments)
    if row.picture is not None:
        grid = policy.grid(s.height, s.width)
        pixels = torch.from_numpy(cropped(read_picture(row.picture), s.height, s.width))
        latent = policy.encode_pixels(pixels[None])[0].float().cpu()
        segments.append(painted(grid, latent, pixels, torch.tensor([1.0, 0.0])))
    if float(uniform(derive(seed, "drop"), 1)) < config.sft.drop:
        segments = [x for x in segments if not isinstance(x, TextActions) and getattr(x, "role", "") != "prompt"]
    for k, segment in enumerate(segments):
        if isinstance(segment, ImageActions):
            shift = s.shift or policy.shift(segment.grid, s.steps)
            t_K = flow.logit_normal_times(normal(derive(seed, "times", k), config.sft.times), shift)
            times = torch.cat([t_K.sort(descending=True).values, torch.zeros(1)])
            segments[k] = painted(segment.grid, segment.latent, segment.pixels, times)
    return Episode(row, 0, seed, tuple(segments))


def sft_step(
    state: TrainState, rows_P: Sequence[Demonstration], rewards: Scorer, config: Config, *, rescore: bool = False
) -> StepResult:
    """The updates of one step on its demonstrations, one episode each. Each rank reads and replays its share.

    Args:
        rewards, rescore: of `training_step`; evaluations alone are scored here, and there is no ratio.
    """
    policy, objective, ranks, t = state.policy, objective_of(config), state.ranks, config.train
    seconds: dict[str, float] = {}
    updates: list[UpdateResult] = []
    skipped, groups = None, list[Group]()
    try:
        for epoch in range(t.epochs):
            seed = derive(config.seed, "step", state.step, epoch)
            with timed(seconds, "read"), ranks.together():
                rows = ranks.share(rows_P, t.minibatches)
                episodes = [episode_of(policy, row, config, derive(seed, row.id)) for row in rows]
                groups = [Group(e.prompt, (e,)) for e in episodes]
                update_guard.check_batch(groups, ())
            with timed(seconds, "update"):
                for share in to_imitate(policy, episodes, config, ranks):
                    updates.append(update(state, share, objective, config))
    except RefusedUpdateError as refused:
        skipped = f"update {len(updates) + 1} of {t.epochs * t.minibatches}: {refused}"
    texts = [s for e in flatten(groups) for s in e.segments if isinstance(s, TextActions)]
    metrics = {"text/length": sum(len(s.ids) for s in texts) / len(texts)} if texts else {}
    metrics |= step_metrics.over_updates([u.terms for u in updates], ratio_checked=False)
    metrics |= step_metrics.memory(policy.device) | {f"seconds/{name}": value for name, value in seconds.items()}
    return StepResult(ranks.averaged(metrics), groups, {}, torch.ones(len(groups), 1), skipped, len(updates))


def to_imitate(
    policy: TrainablePolicy, episodes: Sequence[Episode], config: Config, ranks: Ranks
) -> list[list[MicroBatch]]:
    """Micro-batches of each update. The advantage of every action is 1: all are to become more likely."""
    t, times = config.train, config.sft.times
    each = len(episodes) // t.minibatches
    found = []
    for k in range(t.minibatches):
        rows = range(k * each, (k + 1) * each)
        parts = micro_batches(episodes, rows, t.micro_batch_size, t.max_tokens_per_micro_batch, times)
        parts = split_up(parts, ranks.most(len(parts)))
        batches = [collate([episodes[row] for row in part], policy.device, times) for part in parts]
        if policy.is_sharded:
            refuse_uneven_passes(batches, ranks)
        found.append([MicroBatch(batch, part, None, None) for batch, part in zip(batches, parts, strict=True)])
    return with_advantages(found, torch.ones(len(episodes), max(len(e.segments) for e in episodes)))
