"""Agreement of two scores of the same samples: rank correlation, verdicts, differences. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def ranks(values: Numbers) -> Numbers:
    """Ranks from 0; ties share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[place]


def spearman(a: Numbers, b: Numbers) -> float | None:
    """Spearman's correlation: Pearson's correlation of the ranks. None when either is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / length if length else None


def kappa(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float | None:
    """Cohen's kappa of two verdicts: agreement beyond chance, given each one's share of yes.

    None when both always give the same verdict, which chance explains.
    """
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return (float((a == b).mean()) - chance) / (1 - chance) if chance < 1 else None


def agreement(a: Numbers, b: Numbers, tags: Sequence[str], threshold: float) -> dict[str, Any]:
    """A report on two scores of N samples. Samples on which either abstains (NaN) are counted and left out.

    A verdict is whether a score reaches `threshold`.
    """
    both = np.isfinite(a) & np.isfinite(b)
    report: dict[str, Any] = {
        "n": int(both.sum()),
        "abstained": [int((~np.isfinite(a)).sum()), int((~np.isfinite(b)).sum())],
        "threshold": threshold,
    }
    names = np.asarray(tags, dtype=object)[both]
    x, y = a[both], b[both]
    report |= _compared(x, y, threshold)
    report["per_tag"] = {
        str(tag): {"n": int((names == tag).sum())} | _compared(x[names == tag], y[names == tag], threshold)
        for tag in sorted(set(names))
    }
    return report


def _compared(x: Numbers, y: Numbers, threshold: float) -> dict[str, float | None]:
    if not len(x):
        return dict.fromkeys(("spearman", "agreement", "kappa", "mean_difference"))
    yes, also = x >= threshold, y >= threshold
    return {
        "spearman": spearman(x, y),
        "agreement": float((yes == also).mean()),
        "kappa": kappa(yes, also),
        "mean_difference": float((x - y).mean()),
    }
