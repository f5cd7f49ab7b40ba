"""What a check looks at, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unigrpo_cli.algo.flow import Window
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, Group, flatten
from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.doctor.recorder import Account, Look
from unigrpo_cli.run.memory.plan import Plan
from unigrpo_cli.train import MicroBatch, StepResult
from unigrpo_cli.training.state import TrainState

OK, WARN, FAULT, SKIPPED = "ok", "warn", "FAULT", "skipped"


@dataclass(frozen=True)
class Outcome:
    """A verdict with the number behind it: `value` against `limit`, in words `seen`."""

    verdict: str
    value: float | None
    limit: float | None
    seen: str


@dataclass(frozen=True)
class Finding:
    """An outcome by the name of its check. `means` and `remedy` are empty when nothing is wrong."""

    name: str
    verdict: str
    value: float | None
    limit: float | None
    seen: str
    means: str
    remedy: str


def judged(value: float, limit: float, seen: str, otherwise: str = FAULT) -> Outcome:
    """Ok up to a limit; a value that is no number is above any."""
    return Outcome(OK if value <= limit else otherwise, value, limit, seen)


def skipped(why: str) -> Outcome:
    return Outcome(SKIPPED, None, None, why)


@dataclass(frozen=True)
class Drawn:
    """Groups drawn by the training's own rollout, the window it was to use, and what the network saw."""

    groups: list[Group]
    window: Window
    accounts: list[Account]
    again: list[Group] | None = None  # with the same seed
    other: list[Group] | None = None  # with another

    @property
    def episodes(self) -> list[Episode]:
        return flatten(self.groups)


@dataclass(frozen=True)
class Judged:
    """Rewards of the drawn episodes.

    Args:
        scored: as training scores them; `advantage_B` as it weighs them.
        alone: each episode scored by itself, for rewards that can be asked so; by alias, NaN for no opinion.
        again: all scored a second time, by alias.
        contrasts: of a reward that gave one number for all: what it gives for things as unlike as can be.
        unreadable: of each reward, what it answered to a sample that cannot be read: see `probe.py`.
    """

    scored: dict[str, RewardResult]
    advantage_B: Tensor
    alone: dict[str, list[float]]
    again: dict[str, list[float]]
    contrasts: dict[str, list[float]]
    unreadable: dict[str, list[str]]


@dataclass(frozen=True)
class Pushes:
    """How the loss weighs what one micro-batch did, in units of each row's own advantage: equal for all when sound.

    Args:
        text_BL: of each word, times the words of its row; NaN off-mask.
        image_BK: of each denoising step, along the gradient of its log-probability; [B, 0] when none is trained.
    """

    text_BL: Tensor
    image_BK: Tensor


@dataclass(frozen=True)
class Replayed:
    """The drawn episodes as training replays them, with advantages of our own for gradients.

    Args:
        shares: micro-batches of each update; `rows` the episode behind each row of each micro-batch.
        accounts, of_reference: what the network saw when old and reference scores were made, one per micro-batch.
        terms: of the first update.
        gradients: largest magnitude by parameter name; None where there was none.
        by_term: largest magnitude of each expert's gradient from the text or the image term alone, without
            penalties, on the first micro-batch: `by_term["text"]["image"]` is what text teaches the image expert.
        pushes: one per micro-batch.
    """

    shares: list[list[MicroBatch]]
    rows: list[list[int]]
    accounts: list[Account]
    of_reference: list[Account]
    terms: list[dict[str, float]]
    gradients: dict[str, float | None]
    by_term: dict[str, dict[str, float]]
    pushes: list[Pushes]

    @property
    def batches(self) -> list[MicroBatch]:
        return [m for share in self.shares for m in share]


@dataclass(frozen=True)
class Moved:
    """After a trial update.

    Args:
        reference_moved: largest change of the reference's scores; 0 when it stood still.
        distance: largest difference between policy and reference.
        pull: largest gradient with all advantages zero, i.e. of the penalty alone.
        outward: that gradient times the way the weights have come; above 0 when the penalty pulls back. None when
            the starting weights were not kept.
        step: a training step from there, as training makes it, but for the update.
    """

    reference_moved: float
    distance: float
    pull: float
    outward: float | None
    step: StepResult


@dataclass(frozen=True)
class Evidence:
    """All that checks look at. What could not be had is None, and `trouble` says why, by the name of the part.

    `config` is the run's, with the doctor's sizes of batches.
    """

    config: Config
    state: TrainState
    rewards: Scorer
    thorough: bool
    drawn: Drawn
    judged: Judged
    replayed: Replayed | None = None
    moved: Moved | None = None
    plan: Plan | None = None
    trouble: dict[str, str] = field(default_factory=dict)

    @property
    def policy(self) -> TrainablePolicy:
        return self.state.policy

    @property
    def writes(self) -> bool:
        """Whether words are trained."""
        c = self.config
        return c.sampling.think and c.train.experts != "image" and c.objective.text_weight > 0

    @property
    def paints(self) -> bool:
        """Whether denoising steps are trained."""
        return self.config.train.experts != "text" and self.config.objective.image_weight > 0

    @property
    def coarse(self) -> bool:
        """Whether the network computes in less than fp32."""
        return torch.finfo(self.policy.dtype).bits < 32

    def painting(self, episode: Episode) -> list[Look]:
        """The looks at an episode's last image while it was painted: those nearest to what is recorded."""
        image = episode.images[-1]
        start = image.window.start

        def distance(looks: Sequence[Look]) -> float:
            at = looks[min(start, len(looks) - 1)].x_ND
            if at.shape != image.before.shape[1:]:
                return float("inf")
            return float((at.double() - image.before[0].double()).abs().mean())

        return min((p for a in self.drawn.accounts for p in a.paintings()), key=distance)


def label(episode: Episode) -> str:
    return f"{episode.prompt.id}/{episode.member}"
