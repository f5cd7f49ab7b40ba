"""What a reward answers, read as numbers: one for each sample, and one for each segment that it scores."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardOutput

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

    Raises:
        RewardError: when declared scores are missing, or there are others.
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
