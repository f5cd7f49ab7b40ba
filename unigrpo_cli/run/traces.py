"""Traces of training steps: what the updates saw of some groups' actions, and what became of them.

After the step's updates the same actions are scored again, on the same micro-batches, so that a difference is what the
weights did and not rounding. docs/files.md describes the fields.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.action_terms import Move, image_terms, moves, text_terms
from unigrpo_cli.algo.objective import Objective, Scores, step_densities
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, GivenImage, GivenText, Group, ImageActions, Segment, TextActions, flatten
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.limits import parse_json, read_text, reason_of
from unigrpo_cli.io.pictures import shrunk
from unigrpo_cli.models.policy import Policy, TrainablePolicy
from unigrpo_cli.parallel.ranks import Ranks
from unigrpo_cli.parallel.workers import parallel_map
from unigrpo_cli.replay import replay
from unigrpo_cli.run.episode_files import load_episodes
from unigrpo_cli.run.records import reward_rows
from unigrpo_cli.run.trace_types import (
    EpisodeTrace,
    GivenImageTrace,
    GivenTextTrace,
    GroupTrace,
    ImageMove,
    ImageTrace,
    ObjectiveTrace,
    RewardRow,
    SegmentTrace,
    StepTrace,
    TextTrace,
)
from unigrpo_cli.train import StepResult, replayer
from unigrpo_cli.training.backward import replay_workers
from unigrpo_cli.training.micro_batch import MicroBatch
from unigrpo_cli.training.schedule import objective_of, traced_groups

SMALL = 128
"""Pixels of the longer side of a picture in a trace, at most."""
SCORE_AGAIN = "score the episodes again with `unigrpo rollout --from DIR`"


@dataclass(frozen=True)
class ScoredAgain:
    """Scores of a micro-batch's actions after the step: of the new weights, and its tokens under the starting ones."""

    after: Scores
    reference: Scores


@torch.no_grad()
def score_again(
    policy: TrainablePolicy, traced: Sequence[MicroBatch], config: Config, ranks: Ranks
) -> list[ScoredAgain]:
    """Score traced micro-batches with the weights after the step. All ranks make equally many passes."""
    batches = [m.batch for m in traced]
    batches += batches[-1:] * (ranks.most(len(batches)) - len(batches))
    workers = replay_workers(policy, len(batches))
    paints = objective_of(config).image_weight > 0
    after = list(parallel_map(replayer(policy, config, paints), batches, workers))
    with policy.reference() as start:
        reference = list(parallel_map(partial(replay, start, image=False), batches, workers))
    return [ScoredAgain(*scores) for scores in zip(after, reference, strict=True)][: len(traced)]


@torch.no_grad()
def step_trace(
    result: StepResult,
    again: Sequence[ScoredAgain],
    number: int,
    policy: Policy,
    config: Config,
    weights: dict[str, float],
) -> StepTrace:
    """The trace of a training step from this rank's groups.

    Args:
        again: of `result.traced`, in its order.
        number: training steps done.
        weights: of the trained rewards.
    """
    objective, t = objective_of(config), config.train
    denominator = t.prompts_per_step * t.group_size // t.minibatches
    episodes, members = flatten(result.groups), len(result.groups[0].episodes)
    chosen = traced_groups(config, number - 1, len(result.groups))
    segments: dict[int, tuple[SegmentTrace, ...]] = {}
    for m, scores in zip(result.traced, again, strict=True):
        text, steps = _text_values(m, scores, objective, denominator), _step_values(m, objective, denominator)
        update = _moves(m, m.new, objective)
        after = _moves(m, scores.after, objective)
        for b, row in enumerate(m.rows):
            if row // members in chosen:
                seen = _Seen(m, b, text, steps, update, after)
                segments[row] = seen.segments(episodes[row], policy)
    rows = reward_rows(result.groups, result.scored)
    groups = []
    for g in chosen:
        own = [
            _episode(episodes[k], RewardRow.of(rows[k]), _last(result.advantage_BS[k], episodes[k]), segments[k])
            for k in range(g * members, (g + 1) * members)
        ]
        groups.append(_group(result.groups[g], g * t.minibatches // len(result.groups), own))
    configured = ObjectiveTrace(**{f.name: getattr(objective, f.name) for f in fields(ObjectiveTrace)})
    return StepTrace(number, configured, denominator, dict(weights), result.updates, result.skipped, tuple(groups))


def rollout_trace(directory: Path) -> StepTrace:
    """Saved episodes with the scores in `rewards.json`: what was drawn, before anything is learnt from it."""
    groups, path = load_episodes(directory), directory / "rewards.json"
    try:
        rows = iter(_reward_rows(path, len(flatten(groups))))
        found = [
            _group(g, None, [_episode(e, next(rows), None, tuple(map(recorded, e.segments))) for e in g.episodes])
            for g in groups
        ]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} does not fit the episodes beside it ({reason_of(error)}); {SCORE_AGAIN}") from error
    return StepTrace(0, None, None, {}, 0, None, tuple(found))


def _reward_rows(path: Path, episodes: int) -> list[RewardRow]:
    """Scores of all episodes; none where a rollout's rewards failed."""
    if not path.is_file():
        return [RewardRow({}, {}, {})] * episodes
    rows = TypeAdapter(list[RewardRow]).validate_python(parse_json(read_text(path)))
    if len(rows) != episodes:
        raise ValueError(f"{len(rows)} rows for {episodes} episodes")
    return rows


def _group(group: Group, update: int | None, episodes: Sequence[EpisodeTrace]) -> GroupTrace:
    prompt = group.prompt
    return GroupTrace(prompt.id, prompt.text, _as_data(prompt.metadata), update, tuple(episodes))


def _episode(
    episode: Episode, row: RewardRow, advantage: float | None, segments: tuple[SegmentTrace, ...]
) -> EpisodeTrace:
    counts: Counter[str] = Counter()
    scored: list[SegmentTrace] = []
    for segment in segments:
        counts[segment.kind] += 1
        if isinstance(segment, TextTrace | ImageTrace):
            segment = replace(segment, rewards=row.of_segment(f"{segment.kind}_{counts[segment.kind]}"))
        scored.append(segment)
    info = _as_data(row.info)
    return EpisodeTrace(episode.member, episode.seed, row.rewards, row.components, info, advantage, tuple(scored))


def _last(advantage_S: Tensor, episode: Episode) -> float:
    acted = sum(isinstance(s, TextActions | ImageActions) for s in episode.segments)
    return float(advantage_S[acted - 1])


def _as_data(table: dict[str, Any]) -> Any:
    """JSON values only: a trace must not stop a run because of what a prompt or a reward carries along."""
    return json.loads(json.dumps(table, default=str, skipkeys=True))


# ----- one episode


def recorded(segment: Segment) -> SegmentTrace:
    """What the rollout alone knows of a segment."""
    if isinstance(segment, GivenText):
        return GivenTextTrace(segment.role, segment.text)
    if isinstance(segment, GivenImage):
        return GivenImageTrace(segment.role, shrunk(segment.pixels.numpy(), SMALL))
    if isinstance(segment, TextActions):
        return TextTrace(
            segment.text,
            segment.finished,
            segment.temperature,
            {},
            None,
            segment.ids.numpy(),
            _on_host(segment.log_prob),
        )
    return ImageTrace(
        segment.grid,
        segment.sde,
        segment.noise_level,
        segment.window.start,
        {},
        _on_host(segment.times),
        shrunk(segment.pixels.numpy(), SMALL),
        _on_host(segment.log_prob),
    )


Values = dict[str, NDArray[Any]]
"""Arrays [B, L] or [B, K] by the names of a trace's fields."""


@dataclass(frozen=True)
class _Seen:
    """Row `b` of a traced micro-batch: its tokens, its steps, and the moves of each of its images."""

    m: MicroBatch
    b: int
    text: Values
    steps: Values
    update: list[Values]
    after: list[Values]

    def segments(self, episode: Episode, policy: Policy) -> tuple[SegmentTrace, ...]:
        """Tokens are cut by texts and steps by images, in their order."""
        mask_L = self.m.batch.actions.mask_BL[self.b].cpu().numpy()
        text = {name: value[self.b][mask_L] for name, value in self.text.items()}
        found: list[SegmentTrace] = []
        token = step = image = 0
        for segment in episode.segments:
            plain = recorded(segment)
            if isinstance(plain, TextTrace):
                end = token + len(plain.ids_L)
                own = {name: value[token:end] for name, value in text.items()}
                pieces = token_pieces(policy.decode_text, plain.ids_L)
                plain, token = replace(plain, tokens=pieces, **own), end
            elif isinstance(plain, ImageTrace):
                end = step + len(plain.log_prob_rollout_K)
                own = {name: value[self.b, step:end] for name, value in self.steps.items()}
                if maps := self.m.advantages.maps:
                    own["advantage_KN"] = own["advantage_K"][:, None] * _on_host(maps[image][self.b])
                update, after = (self._move(moved, image) for moved in (self.update, self.after))
                x0 = self._data_estimates(image, plain.grid, policy)
                plain, step = replace(plain, x0_KHWC=x0, update=update, after=after, **own), end
                image += 1
            found.append(plain)
        return tuple(found)

    def _move(self, moved: list[Values], image: int) -> ImageMove | None:
        return ImageMove(**{name: value[self.b] for name, value in moved[image].items()}) if moved else None

    def _data_estimates(self, image: int, grid: tuple[int, int], policy: Policy) -> NDArray[np.uint8] | None:
        """x_0 as the old policy saw it before each recorded step, decoded."""
        old, recorded_steps = self.m.old, self.m.batch.actions.images
        if old is None or not old.velocities or not recorded_steps or not recorded_steps[image].x_BKND.shape[1]:
            return None
        steps = recorded_steps[image]
        t_K11 = steps.t_BK[self.b, :, None, None]
        x0_KND = flow.data_estimate(steps.x_BKND[self.b], old.velocities[image][self.b], t_K11)
        return np.stack([shrunk(pixels.numpy(), SMALL) for pixels in policy.decode_pixels(x0_KND, grid)])


def token_pieces(decode: Callable[[Tensor], str], ids_L: NDArray[np.int64]) -> tuple[str, ...]:
    """What each token adds to the text; a character of several tokens is the last one's."""
    ids = torch.from_numpy(ids_L)
    pieces: list[str] = []
    before, begin = "", 0
    for k in range(len(ids)):
        text = decode(ids[begin : k + 1])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and k + 1 < len(ids):
            pieces.append("")
            continue
        pieces.append(text.removeprefix(before))
        if alone := decode(ids[k : k + 1]):  # not of a special token, which is not shown
            before, begin = alone, k
    return tuple(pieces)


# ----- one micro-batch


def _text_values(m: MicroBatch, again: ScoredAgain, objective: Objective, denominator: int) -> Values:
    scores = {"old": m.old, "new": m.new, "after": again.after, "reference": again.reference}
    found = {f"log_prob_{name}_L": s.log_prob_BL for name, s in scores.items() if s is not None}
    found["advantage_L"] = advantage_BL = m.advantages.text_BL
    if m.new is not None and objective.text_weight:
        terms = text_terms(
            m.batch.actions, m.new, m.old_scores, m.reference, advantage_BL, objective, episodes=denominator
        )
        found |= {
            "entropy_L": m.new.entropy_BL,
            "log_ratio_L": terms.log_ratio,
            "clipped_L": terms.clipped,
            "loss_L": terms.loss,
        }
    return {name: _on_host(value) for name, value in found.items()}


def _step_values(m: MicroBatch, objective: Objective, denominator: int) -> Values:
    """Steps [B, K] of a micro-batch, the images of an episode one after the other."""
    actions = m.batch.actions
    if not actions.images:
        return {}
    found = {"advantage_K": torch.cat(m.advantages.images, dim=1)}
    if m.old is not None and m.old.velocities:
        pairs = zip(actions.images, m.old.velocities, strict=True)
        deviations = [step_densities(s, v).std.expand(*s.t_BK.shape, 1, 1)[..., 0, 0] for s, v in pairs]
        found["std_K"] = torch.cat(deviations, dim=1)
    if m.new is not None and objective.image_weight:
        terms = image_terms(actions, m.new, m.old_scores, m.reference, m.advantages, objective, episodes=denominator)
        found |= {"clipped_K": terms.clipped, "loss_K": terms.loss}
        found |= {} if terms.penalty is None else {"penalty_K": terms.penalty}
    return {name: _on_host(value) for name, value in found.items()}


def _moves(m: MicroBatch, new: Scores | None, objective: Objective) -> list[Values]:
    """How far `new` is from the old policy on each image of a micro-batch; [] where no step was scored."""
    if new is None or m.old is None or not m.old.velocities or not m.batch.actions.images:
        return []

    def one(move: Move) -> Values:
        return {name.replace("_B", "_"): _on_host(value) for name, value in vars(move).items()}

    return [one(move) for move in moves(m.batch.actions, new, m.old, objective)]


def _on_host(value: Tensor) -> NDArray[Any]:
    """As an array: fp32, or integers as they are."""
    return (value.float() if value.is_floating_point() else value).cpu().numpy()
