"""Samples that cannot be read: does a reward say so, or does it turn its failure into a number?

Pictures, words and metadata whose every use raises. A reward that never looks at one of them is not asked about
it: an answer counts against a reward only after it was refused what it looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from unigrpo_cli.rewards.batch import RewardBatch, RewardOutput, Sample
from unigrpo_cli.rewards.loaded import LoadedReward

PARTS = ("picture", "reasoning", "metadata")
RAISES, ABSTAINS, NOT_ASKED, LATE = "raises", "abstains", "not asked", "no answer in time"


class UnreadableError(OSError):
    """What using an unreadable thing raises, as a truncated file would."""


class UnreadablePictureError(UnreadableError, ValueError, RuntimeError):
    """Decoders and networks raise one or another of these about a picture, and whoever catches any is asked."""


Refuse = Callable[[], Any]


class UnreadableImage(Image.Image):
    """A picture of some size whose pixels cannot be had."""

    def __init__(self, refuse: Refuse, size: tuple[int, int]):
        super().__init__()
        self._refuse, self._mode, self._size = refuse, "RGB", size

    def load(self) -> Any:
        self._refuse()

    def copy(self) -> Any:
        self._refuse()

    @property
    def __array_interface__(self) -> Any:
        return self._refuse()


class UnreadableArray(np.ndarray):
    """Pixels that refuse arithmetic; whoever gets past that finds an empty picture."""

    refuse: Refuse

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        return self.refuse()

    def __array_function__(self, *_: Any, **__: Any) -> Any:
        return self.refuse()

    def __getitem__(self, key: Any) -> Any:
        return self.refuse()

    def __iter__(self) -> Any:
        return self.refuse()

    def __getattribute__(self, name: str) -> Any:
        if name in _ARITHMETIC:
            object.__getattribute__(self, "refuse")()
        return super().__getattribute__(name)


_ARITHMETIC = frozenset(("mean", "sum", "max", "min", "std", "var", "any", "all", "item", "flat", "T"))
_ARITHMETIC |= {"astype", "copy", "view", "reshape", "transpose", "flatten", "ravel", "tobytes", "tolist"}
_ARITHMETIC |= {"__array_interface__"}


class UnreadableTensor(torch.Tensor):
    """A tensor with which nothing can be done."""

    refuse: Refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for own in args:
            if isinstance(own, UnreadableTensor):
                own.__dict__["refuse"]()
        raise UnreadableError("the picture cannot be read")


def _refusing(kind: type, names: str) -> type:
    """A subclass whose methods refuse."""

    def method(self: Any, *_: Any, **__: Any) -> Any:
        return self.refuse()

    return type(f"Unreadable{kind.__name__.title()}", (kind,), dict.fromkeys(names.split(), method))


UnreadableText = _refusing(
    str,
    "__len__ __iter__ __contains__ __getitem__ __add__ split strip lower upper count find index "
    "startswith endswith replace removeprefix removesuffix splitlines encode partition rpartition rstrip lstrip",
)
UnreadableDict = _refusing(dict, "__len__ __iter__ __contains__ __getitem__ get keys values items copy __or__")


class UnreadablePictures(RewardBatch):
    """A batch of one picture that cannot be read, in each of the forms that a reward may ask for."""

    refuse: Refuse
    size: tuple[int, int]

    @cached_property
    def images(self) -> list[Image.Image]:
        return [UnreadableImage(self.refuse, self.size)]

    @cached_property
    def tensors(self) -> torch.Tensor:
        tensor = torch.zeros(1, 3, 0, 0).as_subclass(UnreadableTensor)
        tensor.__dict__["refuse"] = self.refuse
        return tensor


def _batch(sample: Sample, part: str, refuse: Refuse) -> RewardBatch:
    """One sample of which a part cannot be read."""
    if part == "picture":
        array = np.zeros((0, 0, 3), np.uint8).view(UnreadableArray)
        array.refuse = refuse
        batch = UnreadablePictures((replace(sample, pixels=array),))
        batch.__dict__["refuse"], batch.__dict__["size"] = refuse, sample.pixels.shape[1::-1]
        return batch
    refusing: Any = UnreadableText() if part == "reasoning" else UnreadableDict()
    refusing.refuse = refuse
    return RewardBatch((replace(sample, **{part: refusing}),))


def unreadable(opened: LoadedReward, sample: Sample, part: str, timeout_s: float | None) -> str:
    """What a reward answers when `part` of a sample cannot be read: raises, abstains, a number, or was not asked.

    It is asked for a part that the sample has. A number after it was refused what it looked at is how a failure
    becomes a score.
    """
    if part == "reasoning" and sample.reasoning is None:
        return NOT_ASKED
    refused: list[bool] = []

    def refuse() -> Any:
        refused.append(True)
        kind = UnreadablePictureError if part == "picture" else UnreadableError
        raise kind(f"the {part} cannot be read")

    batch = _batch(sample, part, refuse)
    try:
        answer = opened.raw_score(batch, timeout_s)
    except TimeoutError:
        return LATE
    if isinstance(answer, BaseException):
        return RAISES
    scores = answer.scores if isinstance(answer, RewardOutput) else answer
    try:
        first = next(iter(scores))
        number = math.nan if first is None else float(first)
    except (TypeError, ValueError, StopIteration):
        return RAISES  # no answer that the run would take: it would stop there
    if not math.isfinite(number):
        return ABSTAINS
    return f"{number:g}" if refused else NOT_ASKED
