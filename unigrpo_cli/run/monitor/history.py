"""The metrics that rules read: a run's first steps, its latest steps, and trends over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from unigrpo_cli.config import Config

FIRST = 5  # steps that define the start of a run
LAST = 20  # steps over which a trend is computed
CLEAR = 3.0  # t statistic of a clear trend; false-alarm rate: about 1 in 200 windows of 20 steps

Row = dict[str, float]


@dataclass(frozen=True)
class History:
    """Metrics of a run.

    Args:
        first: the first FIRST steps that were not skipped, without non-finite numbers.
        last: the last LAST such steps; the current step is the last one.
        config: the run's settings.
        weights: the weight of each training reward by name; 0 for a held-out reward.
        signs: -1 for a reward where lower is better, else 1.
        ratio_limits: largest first log-ratio of text and image that the device's rounding explains.
    """

    first: Sequence[Row]
    last: Sequence[Row]
    config: Config
    weights: Mapping[str, float]
    signs: Mapping[str, int]
    ratio_limits: Mapping[str, float]

    def now(self, key: str, missing: float = math.nan) -> float:
        return self.last[-1].get(key, missing)

    def start(self, key: str) -> float:
        """The median over the first steps; NaN, which no comparison accepts, until there are FIRST of them."""
        values = [row[key] for row in self.first if key in row]
        return median(values) if values and len(self.first) == FIRST else math.nan

    def series(self, key: str) -> list[float]:
        """The latest values; NaN where a step has none."""
        return [row.get(key, math.nan) for row in self.last]

    def full(self) -> bool:
        return len(self.last) == LAST

    def rewards(self) -> list[Row]:
        """Mean rewards of the latest steps by name, signed so that larger is better."""
        return [{n: s * row.get(f"reward/{n}", math.nan) for n, s in self.signs.items()} for row in self.last]

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(name for name, weight in self.weights.items() if weight)

    @property
    def held_out(self) -> tuple[str, ...]:
        return tuple(name for name, weight in self.weights.items() if not weight)


def trend(values: Sequence[float]) -> float:
    """The slope of a series divided by its standard error (a t statistic); 0 for fewer than three finite values."""
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


def reward_hacking(rewards: Sequence[Row], trained: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Held-out rewards with a clear falling trend while a trained reward has a clear rising one.

    Args:
        rewards: mean rewards of each step by name, signed so that larger is better.
    """
    if not any(trend([row.get(name, math.nan) for row in rewards]) > CLEAR for name in trained):
        return []
    return [name for name in held_out if trend([row.get(name, math.nan) for row in rewards]) < -CLEAR]
