"""What a reward gets and returns. Torch is imported only when a reward uses tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unigrpo_cli.rewards.model_cache import Shared

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One episode as a reward sees it.

    Args:
        prompt: the prompt, never the reasoning.
        pixels: the image, [height, width, 3] uint8.
        reasoning: the text the policy wrote, or None when it wrote none.
        metadata: of the prompt, e.g. GenEval's `include`.
        id, group_id: equal group ids mark samples of one prompt in one rollout.
    """

    prompt: str
    pixels: NDArray[np.uint8]
    reasoning: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    group_id: str = ""


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
    """

    scores: Any
    components: Mapping[str, Any] = field(default_factory=dict)
    info: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class RewardResult:
    """One reward's checked answer for B samples.

    Args:
        scores: fp64, NaN where the reward abstained.
        valid: where it did not.
        components, info: as in `RewardOutput`.
    """

    scores: NDArray[np.float64]
    valid: NDArray[np.bool_]
    components: dict[str, NDArray[np.float64]]
    info: list[dict[str, Any]]

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
        )

    def to_json(self) -> dict[str, Any]:
        """As lists, which JSON keeps to the bit."""
        return {
            "scores": self.scores.tolist(),
            "valid": self.valid.tolist(),
            "components": {name: values.tolist() for name, values in self.components.items()},
            "info": self.info,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RewardResult:
        import numpy as np

        return cls(
            np.asarray(row["scores"], dtype=np.float64),
            np.asarray(row["valid"], dtype=bool),
            {name: np.asarray(values, dtype=np.float64) for name, values in row["components"].items()},
            row["info"],
        )


@dataclass(frozen=True)
class RewardContext:
    """What a reward may use in `setup`.

    Args:
        embedded: True when the policy is the embedded model: rewards with small weights of their own use them.
        shared: models that several rewards use, each loaded once.
    """

    device: str
    seed: int
    embedded: bool
    offline: bool
    shared: Shared = field(default_factory=Shared)
