"""What a reward gets and returns, and its answer read as numbers. Torch is imported only when a reward uses tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.model_cache import Shared

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image


SEGMENT_KINDS = ("text", "image")


@dataclass(frozen=True)
class Sample:
    """One episode as a reward sees it.

    Args:
        prompt: the prompt, never the reasoning.
        pixels: the last picture, [height, width, 3] uint8.
        reasoning: all text the policy wrote, or None when it wrote none.
        metadata: of the prompt, e.g. GenEval's `include`.
        id, group_id: equal group ids mark samples of one prompt in one rollout.
        source: the picture that the episode was given, e.g. of an edit; None without one.
        segments: sampled texts and pictures in order; empty for one text, `reasoning`, and one picture, `pixels`.
    """

    prompt: str
    pixels: NDArray[np.uint8]
    reasoning: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    group_id: str = ""
    source: NDArray[np.uint8] | None = None
    segments: tuple[str | NDArray[np.uint8], ...] = ()

    @property
    def acted(self) -> tuple[str | NDArray[np.uint8], ...]:
        """Sampled texts and pictures in order; the last picture is `pixels`."""
        if not self.segments:
            return (self.pixels,) if self.reasoning is None else (self.reasoning, self.pixels)
        last = _pictures_at(self.segments)[-1]
        return (*self.segments[:last], self.pixels, *self.segments[last + 1 :])

    @property
    def texts(self) -> tuple[str, ...]:
        """Every sampled text, in order."""
        return tuple(s for s in self.acted if isinstance(s, str))

    @property
    def pictures(self) -> tuple[NDArray[np.uint8], ...]:
        """Every sampled picture, in order."""
        return tuple(s for s in self.acted if not isinstance(s, str))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the segments in order: `text_1`, `image_1`, `text_2`, ..."""
        kinds = ["text" if isinstance(s, str) else "image" for s in self.acted]
        return tuple(f"{kind}_{kinds[: k + 1].count(kind)}" for k, kind in enumerate(kinds))

    @property
    def preceding_text(self) -> str | None:
        """The text right before the last picture; None without one."""
        acted = self.acted
        before = acted[max(_pictures_at(acted)[-1] - 1, 0)]
        return before if isinstance(before, str) else None

    def by_round(self) -> tuple[Sample, ...]:
        """A sample for each picture: the episode up to it. The last one is the whole episode."""
        acted = self.acted
        earlier = enumerate(_pictures_at(acted)[:-1], start=1)
        return (*(self._up_to(acted[: k + 1], f"round_{turn}") for turn, k in earlier), self)

    def _up_to(self, segments: tuple[str | NDArray[np.uint8], ...], name: str) -> Sample:
        texts, last = [s for s in segments if isinstance(s, str)], segments[-1]
        assert not isinstance(last, str)
        return replace(
            self,
            pixels=last,
            reasoning="\n\n".join(texts) if texts else None,
            segments=segments,
            id=f"{self.id}/{name}",
            group_id=f"{self.group_id}/{name}",
        )


def _pictures_at(segments: Sequence[str | NDArray[np.uint8]]) -> list[int]:
    return [k for k, s in enumerate(segments) if not isinstance(s, str)]


@dataclass(frozen=True)
class RewardBatch:
    """Samples with column views; slicing gives a batch.

    `step` is the training step (0 outside training) and `split` is "train" or "eval".
    """

    samples: tuple[Sample, ...]
    step: int = 0
    split: str = "train"
    device: str = "cpu"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: slice | Sequence[int]) -> RewardBatch:
        if isinstance(index, slice):
            return replace(self, samples=self.samples[index])
        return replace(self, samples=tuple(self.samples[i] for i in index))

    @property
    def prompts(self) -> list[str]:
        return [s.prompt for s in self.samples]

    @cached_property
    def images(self) -> list[Image]:
        """PIL images, RGB."""
        from PIL import Image

        return [Image.fromarray(pixels) for pixels in self.pixels]

    @property
    def pixels(self) -> list[NDArray[np.uint8]]:
        """Arrays [height, width, 3] uint8."""
        return [s.pixels for s in self.samples]

    @cached_property
    def tensors(self) -> torch.Tensor:
        """[B, 3, height, width] fp32 in [0, 1]; all images must have one size."""
        import numpy as np
        import torch

        return torch.from_numpy(np.stack(self.pixels)).permute(0, 3, 1, 2).to(self.device).float() / 255

    @property
    def reasoning(self) -> list[str | None]:
        return [s.reasoning for s in self.samples]

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """Every text of each episode."""
        return [s.texts for s in self.samples]

    @property
    def pictures(self) -> list[tuple[NDArray[np.uint8], ...]]:
        """Every picture of each episode, arrays [height, width, 3] uint8; the last is that of `pixels`."""
        return [s.pictures for s in self.samples]

    @property
    def sources(self) -> list[NDArray[np.uint8] | None]:
        """The picture that each episode was given."""
        return [s.source for s in self.samples]

    @property
    def metadata(self) -> list[Mapping[str, Any]]:
        return [s.metadata for s in self.samples]

    @property
    def ids(self) -> list[str]:
        return [s.id for s in self.samples]

    @property
    def group_ids(self) -> list[str]:
        return [s.group_id for s in self.samples]


COLUMNS = (
    "images",
    "pixels",
    "tensors",
    "prompts",
    "reasoning",
    "texts",
    "pictures",
    "sources",
    "metadata",
    "ids",
    "group_ids",
    "step",
    "split",
    "batch",
)
"""Parameter names of a reward function; each gets that column of the batch."""


@dataclass(frozen=True)
class RewardOutput:
    """Scores of a batch of B samples.

    Args:
        scores: B numbers. NaN or None abstains: the sample is left out of its group's statistics.
        components: parts of the score by name, B numbers each; logged, not trained on.
        info: one JSON-able dict per sample (reasons, boxes); saved beside the sample.
        segments: of a reward that declares `segments`, one dict per sample: a score by the segment's name
            (`Sample.names`). NaN or None abstains; a segment left out has no score of its own.
    """

    scores: Any
    components: Mapping[str, Any] = field(default_factory=dict)
    info: Sequence[Mapping[str, Any]] | None = None
    segments: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class RewardResult:
    """One reward's checked answer for B samples.

    Args:
        scores: fp64, NaN where the reward abstained.
        valid: where it did not.
        components, info: as in `RewardOutput`.
        segments: by the segment's name, NaN where the reward abstained; empty where only the episode has a score.
    """

    scores: NDArray[np.float64]
    valid: NDArray[np.bool_]
    components: dict[str, NDArray[np.float64]]
    info: list[dict[str, Any]]
    segments: list[dict[str, float]] = field(default_factory=list)

    @property
    def opinions(self) -> NDArray[np.bool_]:
        """Where the reward did not abstain: of each sample, or of each picture where it scored every one."""
        import numpy as np

        pictures = [x for row in self.segments for name, x in row.items() if name.startswith("image_")]
        return np.isfinite(pictures) if pictures else self.valid

    @property
    def mean(self) -> float | None:
        """Mean over valid samples; None when there is none."""
        return float(self.scores[self.valid].mean()) if self.valid.any() else None

    def select(self, index: Sequence[int]) -> RewardResult:
        """The results of some samples, in the given order."""
        rows = list(index)
        return RewardResult(
            self.scores[rows] if rows else self.scores[:0],
            self.valid[rows] if rows else self.valid[:0],
            {name: values[rows] if rows else values[:0] for name, values in self.components.items()},
            [self.info[k] for k in rows],
            [self.segments[k] for k in rows] if self.segments else [],
        )

    @classmethod
    def join(cls, parts: Sequence[RewardResult]) -> RewardResult:
        """Results of one batch after the other. A component that a batch lacks is NaN there."""
        import numpy as np

        names = dict.fromkeys(name for part in parts for name in part.components)
        return cls(
            np.concatenate([np.zeros(0), *(p.scores for p in parts)]),
            np.concatenate([np.zeros(0, bool), *(p.valid for p in parts)]),
            {n: np.concatenate([p.components.get(n, np.full(len(p.scores), np.nan)) for p in parts]) for n in names},
            [row for p in parts for row in p.info],
            [row for p in parts for row in p.segments],
        )

    def to_json(self) -> dict[str, Any]:
        """As lists, which JSON keeps to the bit."""
        return {
            "scores": self.scores.tolist(),
            "valid": self.valid.tolist(),
            "components": {name: values.tolist() for name, values in self.components.items()},
            "info": self.info,
            "segments": self.segments,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RewardResult:
        import numpy as np

        return cls(
            np.asarray(row["scores"], dtype=np.float64),
            np.asarray(row["valid"], dtype=bool),
            {name: np.asarray(values, dtype=np.float64) for name, values in row["components"].items()},
            row["info"],
            row["segments"],
        )


def rounds_of(segments: Sequence[Mapping[str, float]]) -> dict[str, NDArray[np.float64]]:
    """Scores by round and text, one number per episode; no rounds where every episode has one picture.

    `round_k` is the score of the picture that stands after round k: an episode that stopped before keeps its last one.
    `text_k` is that of the k-th text, NaN where there is none.

    Args:
        segments: `RewardResult.segments`.
    """
    import numpy as np

    names = list(dict.fromkeys(name for row in segments for name in row))
    pictures = sorted((n for n in names if n.startswith("image_")), key=lambda n: int(n.partition("_")[2]))
    found: dict[str, list[float]] = {}
    standing = [math.nan] * len(segments)
    for name in pictures if len(pictures) > 1 else ():
        standing = [row.get(name, before) for row, before in zip(segments, standing, strict=True)]
        found[name.replace("image_", "round_")] = standing
    for name in (n for n in names if n.startswith("text_")):
        found[name] = [row.get(name, math.nan) for row in segments]
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def segments_row(k: int, scored: Mapping[str, RewardResult]) -> dict[str, Any]:
    """The scores of an episode's segments by reward and name, under `segments`; nothing where none has any."""
    rows = {n: s.segments[k] for n, s in scored.items() if s.segments and s.segments[k]}
    found = {n: {name: x if x == x else None for name, x in row.items()} for n, row in rows.items()}
    return {"segments": found} if found else {}


def _no_rewards(name: str) -> Any:
    raise LookupError(f"no rewards are known here, so {name!r} cannot be made")


@dataclass(frozen=True)
class RewardContext:
    """What a reward may use in `setup`.

    Args:
        embedded: True when the policy is the embedded model: rewards with small weights of their own use them.
        shared: models that several rewards use, each loaded once.
        other_reward: makes another reward, named as in `--reward`; it is not set up yet.
    """

    device: str
    seed: int
    embedded: bool
    offline: bool
    shared: Shared = field(default_factory=Shared)
    other_reward: Callable[[str], Any] = field(default=_no_rewards, repr=False)


LARGEST = 1e30
"""Largest magnitude of a score: its square, and sums of squares, stay far inside fp64."""

Names = tuple[str, ...]
"""The segments of a sample, `Sample.names`."""


def abstained(names: Sequence[Names], kinds: Collection[str]) -> RewardOutput:
    """The answer of a reward that abstains on samples with these segments, of which it scores some kinds."""
    segments = [{name: math.nan for name in own if kind_of(name) in kinds} for own in names] if kinds else None
    return RewardOutput([math.nan] * len(names), segments=segments)


def kind_of(name: str) -> str:
    """`text` of `text_2`."""
    return name.partition("_")[0]


def segment_scores(
    given: Sequence[Mapping[str, Any]] | None, names: Sequence[Names], kinds: Collection[str], label: str
) -> list[dict[str, float]]:
    """Scores of segments by name, NaN where the reward abstained; an empty list for a reward of whole episodes.

    Args:
        given: `RewardOutput.segments`.
        names: the segments that each sample has.
        kinds: those that the reward declares.
        label: the reward in messages.
    """
    if given is None and not kinds:
        return []
    if given is None:
        raise RewardError(
            f"{label} declares segments = {sorted(kinds)}, but gave none: give a RewardOutput with `segments`, one "
            "dict per sample"
        )
    if len(given) != len(names):
        raise RewardError(f"{label} gave segments of {len(given)} samples for {len(names)} samples")
    import numpy as np

    found: list[dict[str, float]] = []
    for row, own in zip(given, names, strict=True):
        accepted = [name for name in own if kind_of(name) in kinds]
        for name in row:
            if name not in accepted:
                raise RewardError(
                    f"{label} scored the segment {name!r}; accepted: {', '.join(accepted) or 'none'} (of "
                    f"{', '.join(own)}, by its declared segments = {sorted(kinds)})"
                )
        values = numbers_of(list(row.values()), len(row), f"{label} gave for segments")
        found.append(dict(zip(row, np.where(np.isfinite(values), values, math.nan).tolist(), strict=True)))
    return found


def numbers_of(values: Any, count: int, what: str) -> NDArray[np.float64]:
    """One fp64 number per sample; None becomes NaN."""
    needed = f"it must give a list of {count} numbers"
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    single = isinstance(values, str | bytes | dict | set | frozenset) or not hasattr(values, "__len__")
    if single or getattr(values, "ndim", 1) == 0:
        raise RewardError(f"{what} one {type(values).__name__}; {needed}")
    if getattr(values, "ndim", 1) > 1:
        raise RewardError(f"{what} shape {list(values.shape)} scores for {count} samples; {needed}")
    if len(values) != count:
        raise RewardError(f"{what} {len(values)} scores for {count} samples; it must give one number per sample")
    import numpy as np

    numbers = np.empty(count)
    for k, value in enumerate(values):
        if isinstance(value, str | bytes):
            raise RewardError(f"{what} the text {value!r}; {needed}")
        if isinstance(value, list | tuple):
            raise RewardError(f"{what} shape [{count}, {len(value)}] scores for {count} samples; {needed}")
        try:
            numbers[k] = _number(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(f"{what} something that is not a number: {error}; {needed}") from error
    large = numbers[np.isfinite(numbers) & (np.abs(numbers) > LARGEST)]
    if len(large):
        raise RewardError(f"{what} {large[0]:g}; scores must lie between {-LARGEST:g} and {LARGEST:g}: rescale them")
    return numbers


def _number(value: Any) -> float:
    """A real number as float. Complex numbers, dates and durations would lose a part."""
    if value is None:
        return math.nan
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_complex():
            raise TypeError("a complex number")
    elif getattr(getattr(value, "dtype", None), "kind", "f") not in "biuf":
        raise TypeError(f"a {value.dtype}")
    if getattr(value, "ndim", 0):
        raise TypeError(f"an array of shape {list(value.shape)}")
    if not hasattr(value, "__float__"):
        raise TypeError(f"a {type(value).__name__}")
    return float(value)
