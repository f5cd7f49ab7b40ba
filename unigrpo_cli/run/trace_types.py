"""What a training step saw of each action and did to it. Types only, of numpy's arrays; files: run/trace_files.py.

What was not measured is None. Fields without arrays are JSON in a trace, arrays are tensors.

Shape letters: L tokens of a text, K recorded steps of an image, T points of its time grid, N = rows * columns latent
positions, h, w, 3 a small picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, PlainValidator, PositiveInt


def _array(value: Any, dtype: type, ndim: int) -> Any:
    """Refuse anything but an array of that dtype and number of axes."""
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != ndim:
        raise ValueError(f"not an array of {np.dtype(dtype).name} with {ndim} axes")
    return value


F1 = Annotated[NDArray[np.float32], PlainValidator(partial(_array, dtype=np.float32, ndim=1))]
F2 = Annotated[NDArray[np.float32], PlainValidator(partial(_array, dtype=np.float32, ndim=2))]
Ids = Annotated[NDArray[np.int64], PlainValidator(partial(_array, dtype=np.int64, ndim=1))]
Sides = Annotated[NDArray[np.int8], PlainValidator(partial(_array, dtype=np.int8, ndim=1))]
Picture = Annotated[NDArray[np.uint8], PlainValidator(partial(_array, dtype=np.uint8, ndim=3))]
Pictures = Annotated[NDArray[np.uint8], PlainValidator(partial(_array, dtype=np.uint8, ndim=4))]
Rewards = dict[str, FiniteFloat | None]


class _Checked:
    """Lengths of arrays agree: axes that share a letter at the end of a name (`log_prob_old_L`) share a size."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    def sizes(self) -> dict[str, int]:
        """The size of each letter that is known beforehand."""
        return {}

    def __post_init__(self) -> None:
        known = self.sizes()
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                for letter, size in zip(name.rsplit("_", 1)[1], value.shape, strict=True):
                    if letter in "LKN" and known.setdefault(letter, size) != size:
                        raise ValueError(f"{name} has {size} of {letter}, not {known[letter]}")
                if name.endswith("HWC") and (not value.size or value.shape[-1] != 3):
                    raise ValueError(f"{name} has shape {list(value.shape)}")


@dataclass(frozen=True)
class GivenTextTrace:
    """Text that was read."""

    role: str
    text: str
    kind: Literal["given_text"] = "given_text"


@dataclass(frozen=True)
class GivenImageTrace(_Checked):
    """A picture that was read, small."""

    role: str
    pixels_HWC: Picture
    kind: Literal["given_image"] = "given_image"


@dataclass(frozen=True)
class TextTrace(_Checked):
    """Sampled text.

    Args:
        rewards: scores of this segment alone, by name; {} where all judge the episode.
        ids_L, tokens: of each token the id and its piece of the text; pieces joined are the text.
        log_prob_rollout_L: as it was sampled.
        log_prob_old_L, log_prob_new_L, log_prob_reference_L: replayed before the updates, as the last update of these
            tokens saw it, and under the starting model.
        log_prob_after_L: with the weights after the step.
        entropy_L: nats, of the distribution that the last update saw.
        log_ratio_L: new against old.
        clipped_L: 1 where the clip binds for a ratio above 1, -1 below, else 0.
        loss_L: share of the loss.
    """

    text: str
    finished: bool
    temperature: FiniteFloat
    rewards: Rewards
    tokens: tuple[str, ...] | None
    ids_L: Ids
    log_prob_rollout_L: F1
    log_prob_old_L: F1 | None = None
    log_prob_new_L: F1 | None = None
    log_prob_reference_L: F1 | None = None
    log_prob_after_L: F1 | None = None
    entropy_L: F1 | None = None
    advantage_L: F1 | None = None
    log_ratio_L: F1 | None = None
    clipped_L: Sides | None = None
    loss_L: F1 | None = None
    kind: Literal["text"] = "text"

    def sizes(self) -> dict[str, int]:
        return {} if self.tokens is None else {"L": len(self.tokens)}

    @property
    def change_L(self) -> NDArray[np.float32] | None:  # noqa: N802
        """What the step did to each token's log-probability."""
        if self.log_prob_after_L is None or self.log_prob_old_L is None:
            return None
        return self.log_prob_after_L - self.log_prob_old_L


@dataclass(frozen=True)
class ImageMove(_Checked):
    """How far a policy is from the old one on the steps of an image.

    Args:
        log_ratio_K: mean over N and D, by the configured trust region; log_ratio_KN: mean over D.
        mean_change_K, velocity_change_K: root mean square over N and D of the difference of the transition's means,
            and of velocities; velocity_change_KN: over D.
    """

    log_ratio_K: F1
    log_ratio_KN: F2
    mean_change_K: F1
    velocity_change_K: F1
    velocity_change_KN: F2


@dataclass(frozen=True)
class ImageTrace(_Checked):
    """A sampled image and its stochastic steps.

    Args:
        times_T, window_start: the schedule, and the first recorded step.
        rewards: as in `TextTrace`.
        pixels_HWC: the picture, small.
        x0_KHWC: the estimate of the data before each recorded step, by the old policy, decoded and small.
        std_K: deviation of the transition.
        log_prob_rollout_K: mean over N and D.
        advantage_KN: only where positions have advantages of their own.
        clipped_K, loss_K: as in `TextTrace`; the loss with its penalty.
        penalty_K: distance from the reference, unweighted.
        update: the move that the last update of these steps saw; after: with the weights after the step.
    """

    grid: tuple[PositiveInt, PositiveInt]
    sde: str
    noise_level: FiniteFloat
    window_start: NonNegativeInt
    rewards: Rewards
    times_T: F1
    pixels_HWC: Picture
    log_prob_rollout_K: F1
    x0_KHWC: Pictures | None = None
    std_K: F1 | None = None
    advantage_K: F1 | None = None
    advantage_KN: F2 | None = None
    clipped_K: Sides | None = None
    penalty_K: F1 | None = None
    loss_K: F1 | None = None
    update: ImageMove | None = None
    after: ImageMove | None = None
    kind: Literal["image"] = "image"

    def sizes(self) -> dict[str, int]:
        return {"N": self.grid[0] * self.grid[1], "K": len(self.log_prob_rollout_K)}

    def __post_init__(self) -> None:
        super().__post_init__()
        for move in (self.update, self.after):
            if move is not None and move.log_ratio_KN.shape != (self.sizes()["K"], self.sizes()["N"]):
                raise ValueError(f"log_ratio_KN has shape {list(move.log_ratio_KN.shape)}")
        if self.window_start + len(self.log_prob_rollout_K) >= len(self.times_T):
            raise ValueError("the window is outside the schedule")

    @property
    def steps(self) -> range:
        return range(self.window_start, self.window_start + len(self.log_prob_rollout_K))

    @property
    def t_K(self) -> NDArray[np.float32]:  # noqa: N802
        return self.times_T[list(self.steps)]

    @property
    def t_next_K(self) -> NDArray[np.float32]:  # noqa: N802
        return self.times_T[[k + 1 for k in self.steps]]


SegmentTrace = Annotated[GivenTextTrace | GivenImageTrace | TextTrace | ImageTrace, Field(discriminator="kind")]


@dataclass(frozen=True)
class RewardRow:
    """Raw scores of an episode by name, None where a reward abstained; parts of them; their reasons.

    `segments` are scores of its texts and images (`text_1`, `image_1`, `text_2`, ...), by reward.
    """

    rewards: Rewards
    components: dict[str, dict[str, FiniteFloat]]
    info: dict[str, Any]
    segments: dict[str, Rewards] = field(default_factory=dict)

    @classmethod
    def of(cls, row: dict[str, Any]) -> RewardRow:
        return cls(row["rewards"], row["components"], row["info"], row.get("segments", {}))

    def of_segment(self, name: str) -> Rewards:
        return {reward: own[name] for reward, own in self.segments.items() if name in own}


@dataclass(frozen=True)
class EpisodeTrace:
    """One sample of a prompt.

    Args:
        rewards, components, info: as in `RewardRow`.
        advantage: of the last acted segment.
    """

    member: NonNegativeInt
    seed: int
    rewards: Rewards
    components: dict[str, dict[str, FiniteFloat]]
    info: dict[str, Any]
    advantage: FiniteFloat | None
    segments: tuple[SegmentTrace, ...]


@dataclass(frozen=True)
class GroupTrace:
    """The samples of one prompt.

    Args:
        update: which of the step's minibatches trained them, from 0.
    """

    prompt_id: str
    prompt: str
    metadata: dict[str, Any]
    update: NonNegativeInt | None
    episodes: tuple[EpisodeTrace, ...]


@dataclass(frozen=True)
class ObjectiveTrace:
    """The objective as configured; fields as those of `algo.objective.Objective`."""

    text_weight: FiniteFloat
    image_weight: FiniteFloat
    text_clip: FiniteFloat
    image_clip: FiniteFloat
    text_kl: FiniteFloat
    trust_region: str
    penalty: str
    penalty_weight: FiniteFloat
    map_ratio: str = "step"


@dataclass(frozen=True)
class StepTrace:
    """Some groups of one training step.

    Args:
        step: as in metrics.jsonl; 0 for episodes that no step has seen.
        objective, denominator: of the loss; the denominator counts the episodes behind one optimizer step.
        reward_weights: of the trained rewards, by name.
        updates: optimizer steps that were made.
        skipped: why the rest of them was not.
    """

    step: NonNegativeInt
    objective: ObjectiveTrace | None
    denominator: PositiveInt | None
    reward_weights: dict[str, FiniteFloat]
    updates: NonNegativeInt
    skipped: str | None
    groups: tuple[GroupTrace, ...] = field(repr=False)
