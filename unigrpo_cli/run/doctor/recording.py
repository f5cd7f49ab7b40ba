"""Inputs of the checks: recorded episodes, rewards, replay and a trial update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import Guidance, guided
from unigrpo_cli.algo.objective import ImageSteps
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, GivenImage, GivenText, Group, ImageActions, TextActions, flatten
from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.doctor.recorder import Item, Prefix, Trace, VelocityCall, digest_of
from unigrpo_cli.train import MicroBatch, StepResult
from unigrpo_cli.training.state import TrainState


@dataclass(frozen=True)
class RecordedRollout:
    """Groups sampled by the training's own rollout, and the network's inputs; `again` with the same seed."""

    groups: list[Group]
    traces: list[Trace]
    again: list[Group] | None = None


@dataclass(frozen=True)
class RecordedRewards:
    """Rewards of the sampled episodes, by alias.

    Args:
        scored: as training scores them.
        advantage_BS, kind_BS: advantages as training makes them, and kinds of the acted segments.
        alone: each episode scored by itself, for rewards that score samples independently; NaN for an abstention.
        again: all episodes scored a second time.
        contrasts: scores of very different samples, for a reward that gave every episode the same score.
    """

    scored: dict[str, RewardResult]
    advantage_BS: Tensor
    kind_BS: Tensor
    alone: dict[str, list[float]]
    again: dict[str, list[float]]
    contrasts: dict[str, list[float]]


@dataclass(frozen=True)
class RecordedReplay:
    """The episodes as training replays them, and the first update's gradients with known advantages.

    Args:
        minibatches: micro-batches of each update.
        traces: the network's inputs when the old policy was scored, one per micro-batch.
        terms: terms of each update.
        gradients: largest magnitude by parameter name; None where there was none.
    """

    minibatches: list[list[MicroBatch]]
    traces: list[Trace]
    terms: list[dict[str, float]]
    gradients: dict[str, float | None]

    @property
    def micro_batches(self) -> list[MicroBatch]:
        return [m for share in self.minibatches for m in share]


@dataclass(frozen=True)
class TrialUpdate:
    """The state after one trial update.

    Args:
        reference_moved: largest change of the reference's scores; 0 when it stood still.
        distance: largest difference between policy and reference.
        pull: largest gradient of the penalty alone (all advantages zero).
        outward: that gradient times the weights' displacement; positive when the penalty pulls back. None when the
            starting weights were not kept.
        step: the next training step, without its update.
    """

    reference_moved: float
    distance: float
    pull: float
    outward: float | None
    step: StepResult


@dataclass(frozen=True)
class Recording:
    """All that checks read. A part that failed is None; `trouble` has the reason by the part's name.

    `config` is the run's with the doctor's batch sizes.
    """

    config: Config
    state: TrainState
    rewards: Scorer
    thorough: bool
    rollout: RecordedRollout
    scores: RecordedRewards
    replay: RecordedReplay | None = None
    trial: TrialUpdate | None = None
    trouble: dict[str, str] = field(default_factory=dict)

    @property
    def policy(self) -> TrainablePolicy:
        return self.state.policy

    @property
    def episodes(self) -> list[Episode]:
        return flatten(self.rollout.groups)

    @property
    def trains_text(self) -> bool:
        c = self.config
        return c.sampling.think and c.train.experts != "image" and c.objective.text_weight > 0

    @property
    def trains_image(self) -> bool:
        return self.config.train.experts != "text" and self.config.objective.image_weight > 0

    @property
    def scores_steps(self) -> bool:
        """Whether denoising steps are scored, not final latents."""
        return self.config.objective.image == "transition"

    @property
    def low_precision(self) -> bool:
        return torch.finfo(self.policy.dtype).bits < 32

    def painted(self) -> Iterator[tuple[str, int, ImageActions, list[VelocityCall]]]:
        """Each sampled image: its name, its number in the episode, its record, the network calls that painted it."""
        for episode in self.episodes:
            for k, image in enumerate(episode.images):
                yield image_label(episode, k), k, image, self.image_calls(image)

    def image_calls(self, image: ImageActions) -> list[VelocityCall]:
        """The network calls that painted an image: those nearest to its recorded latents, or to its final one."""

        def distance(calls: Sequence[VelocityCall]) -> float:
            call, wanted = calls[-1], image.latent
            x = flow.data_estimate(call.x_ND, call.v_ND.float(), torch.tensor(call.t))  # where Euler's last step ends
            if image.window.size:
                x, wanted = calls[min(image.window.start, len(calls) - 1)].x_ND, image.before[0]
            return float((x.double() - wanted.double()).abs().mean()) if x.shape == wanted.shape else float("inf")

        found = min((calls for trace in self.rollout.traces for calls in trace.images()), key=distance)
        return [self._guided(call, image.guidance) for call in found] if image.guidance.on else found

    def _guided(self, call: VelocityCall, guidance: Guidance) -> VelocityCall:
        """The call with its guided velocity: the same latent was also passed in the poorer contexts, which follow."""
        if not guidance.acts(call.t):
            return call
        calls = (c for trace in self.rollout.traces for c in trace.calls)
        own = [c.v_ND[None].float() for c in calls if c.t == call.t and torch.equal(c.x_ND, call.x_ND)]
        if len(own) != guidance.contexts:
            return call
        v, less_text, *less_image = own
        return replace(call, v_ND=guided(v, less_text, less_image[0] if less_image else None, guidance)[0])

    def received(self, episode: Episode) -> Prefix:
        """What the network received of the whole episode; after a last text, the nearest to its record."""
        prefix = self.image_calls(episode.images[-1])[0].prefix
        if isinstance(episode.segments[-1], ImageActions):
            return prefix
        recorded = recorded_inputs(episode).items

        def alike(other: Prefix) -> tuple[int, int]:
            """How many first items agree, and how near the length is."""
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(other, recorded, strict=False)))
            return same, -abs(len(other) - len(recorded))

        reached = (p for trace in self.rollout.traces for p in trace.reached if p[: len(prefix)] == prefix)
        return max(reached, key=alike, default=prefix)

    def replayed_rows(self) -> Iterator[tuple[Trace, MicroBatch, int, Episode]]:
        """Each replayed row: its trace (empty where it was not recorded), micro-batch, row number and episode."""
        if self.replay is not None:
            episodes, micro_batches = self.episodes, self.replay.micro_batches
            traces = [*self.replay.traces, *(Trace() for _ in micro_batches)]
            for trace, m in zip(traces, micro_batches, strict=False):
                yield from ((trace, m, b, episodes[k]) for b, k in enumerate(m.rows))

    def replayed_images(self) -> Iterator[tuple[str, int, ImageActions, ImageSteps, list[VelocityCall]]]:
        """Each image of a replayed row: its name, the row, its record, what is scored, the network's calls if any.

        None where no step is scored.
        """
        for trace, m, b, episode in self.replayed_rows() if self.scores_steps else ():
            calls = [own for own in trace.images() if own[0].row == b]
            if episode.images[0].guidance.on:  # in several rounds some calls of the poorer contexts are among them
                calls = list({own[0].x_ND.numpy().tobytes(): own for own in reversed(calls)}.values())[::-1]
            calls = calls or [[] for _ in episode.images]
            scored = zip(episode.images, m.batch.actions.images, calls, strict=True)
            for k, (image, steps, own) in enumerate(scored):
                yield image_label(episode, k), b, image, steps, own


@dataclass(frozen=True)
class RecordedText:
    """A sampled text: the seed of its draws, its budget, the number of items before it, its segment."""

    seed: int
    budget: int
    before: int
    text: TextActions


@dataclass(frozen=True)
class RecordedInputs:
    """What an episode says the network received: ids, and digests of the images that were looked at; its texts."""

    items: list[Item]
    texts: list[RecordedText]


def recorded_inputs(episode: Episode, budget: Callable[[int], int] = lambda k: 0) -> RecordedInputs:
    """What is recorded of an episode; `budget` gives the most tokens of a text by its round."""
    items: list[Item] = []
    texts: list[RecordedText] = []
    images, said = 0, 0  # rounds so far, texts in this one
    for segment in episode.segments:
        if isinstance(segment, GivenText):
            items += segment.ids.tolist()
        elif isinstance(segment, GivenImage):
            items += [digest_of(x) for x in (segment.latent, segment.view) if x is not None and len(x)]
        elif isinstance(segment, ImageActions):
            images, said = images + 1, 0
        else:
            seed = derive(episode.seed, "round", images) if images else episode.seed
            items += segment.opening
            own = derive(seed, "text", said) if said else seed
            texts.append(RecordedText(own, budget(images), len(items), segment))
            items += [*segment.ids.tolist(), *segment.closing]
            said += 1
    return RecordedInputs(items, texts)


def action_ids(episode: Episode) -> list[int]:
    return [i for s in episode.segments if isinstance(s, TextActions) for i in s.ids.tolist()]


def scored_ids(m: MicroBatch, row: int) -> list[int]:
    """The token ids that replay scores as actions of a row."""
    ids_BL = torch.cat([chunk.action_BL for chunk in m.batch.chunks], dim=1)
    return ids_BL[row][m.batch.actions.mask_BL[row]].tolist()


def label(episode: Episode) -> str:
    return f"{episode.prompt.id}/{episode.member}"


def image_label(episode: Episode, k: int) -> str:
    return f"{label(episode)}, image {k + 1}" if len(episode.images) > 1 else label(episode)
