"""The course of a run as rules look at it: its first rows, its last ones, and whether a series has a trend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from unigrpo_cli.config import Config

FIRST = 5  # rows that say how a run began
LAST = 20  # rows over which trends are taken
CLEAR = 3.0  # t statistics; noise without a trend rises so over one stretch of twenty steps in two hundred

Row = dict[str, float]


@dataclass(frozen=True)
class Course:
    """What a rule may look at.

    Args:
        first: metrics of the first FIRST steps that were not skipped; numbers that are not finite are left out.
        last: those of the last LAST, the present one at the end.
        config: the run's.
        weights: of each reward asked in training, by name; 0 where it is held out.
        signs: -1 where lower is better, else 1.
    """

    first: Sequence[Row]
    last: Sequence[Row]
    config: Config
    weights: dict[str, float]
    signs: dict[str, int]

    def now(self, key: str, missing: float = math.nan) -> float:
        """The present value."""
        return self.last[-1].get(key, missing)

    def start(self, key: str) -> float:
        """The median of the first values; NaN, with which nothing compares, until the beginning is over."""
        values = [row[key] for row in self.first if key in row]
        return median(values) if values and len(self.first) == FIRST else math.nan

    def series(self, key: str) -> list[float]:
        """The last values, NaN where there was none."""
        return [row.get(key, math.nan) for row in self.last]

    def full(self) -> bool:
        """Whether there are enough rows for a trend."""
        return len(self.last) == LAST

    def rewards(self) -> list[Row]:
        """Of the last rows the rewards' means by name, larger always better."""
        return [{n: s * row.get(f"reward/{n}", math.nan) for n, s in self.signs.items()} for row in self.last]

    @property
    def trained(self) -> list[str]:
        return [name for name, weight in self.weights.items() if weight]

    @property
    def held_out(self) -> list[str]:
        return [name for name, weight in self.weights.items() if not weight]


def trend(values: Sequence[float]) -> float:
    """Slope of a series in units of its standard error (a t statistic); 0 for fewer than three finite values."""
    pairs = [(float(k), v) for k, v in enumerate(values) if math.isfinite(v)]
    if len(pairs) < 3:
        return 0.0
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in pairs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in pairs) / (len(pairs) - 2)
    if rest == 0:
        return math.copysign(math.inf, slope) if slope else 0.0
    return slope / math.sqrt(rest / spread)


def parting(history: Sequence[Row], trained: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Held-out rewards that fall while a trained one rises: how it looks when a policy learns its judge's weakness.

    Args:
        history: of each step the rewards' means by name, all with larger meaning better.

    Returns:
        Names of the held-out rewards, when trends over `history` are clear (|t| > 3) and opposite.
    """
    if not any(trend([row.get(name, math.nan) for row in history]) > CLEAR for name in trained):
        return []
    return [name for name in held_out if trend([row.get(name, math.nan) for row in history]) < -CLEAR]
