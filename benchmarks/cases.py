"""What is compared on a CPU, and at what sizes: chosen once, by what is done with models of that size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.clock import Clock
from benchmarks.report import Report
from benchmarks.shapes import Size, bagel_shape
from unigrpo_cli.models.mot.config import AutoencoderConfig, MoTConfig


@dataclass(frozen=True)
class Cases:
    """Sizes of the comparisons.

    Args:
        embedded: settings of the embedded model on top of its defaults.
        compared: members of the group that is also sampled one at a time.
        large: a random network to sample from.
        small: a random network for text-only steps, each of `prompts` x the first of its groups.
        budget_s, share_s: seconds for everything, unless the command says otherwise, and for one measurement.
    """

    embedded: dict[str, Any]
    compared: int
    large: Size
    small: Size
    prompts: int
    budget_s: float
    share_s: float


CODEC = AutoencoderConfig((32, 64, 128, 128), 1, 16)  # small, as BAGEL's is beside its network


def _size(shape: MoTConfig, **task: int) -> Size:
    return Size(shape, CODEC, copies=3, micro_batches=(8,), groups=(task.pop("group"),), **task)


CASES = {
    "full": Cases(
        embedded={},
        compared=8,
        # Both experts together have 105 million weights.
        large=_size(
            bagel_shape(768, 8, 12, 2, 2048, 4096, 32), pixels=192, calls=10, thinking=128, given=60, group=8, rank=16
        ),
        small=_size(
            bagel_shape(256, 4, 4, 2, 1024, 4096, 32), pixels=192, calls=10, thinking=128, given=60, group=8, rank=16
        ),
        prompts=2,
        budget_s=600,
        share_s=20,
    ),
    "tiny": Cases(
        embedded={"sampling.max_new_tokens": 8, "sampling.steps": 6},
        compared=2,
        large=_size(bagel_shape(64, 2, 4, 2, 96, 512, 8), pixels=32, calls=6, thinking=6, given=10, group=2, rank=2),
        small=_size(bagel_shape(32, 2, 4, 2, 64, 512, 8), pixels=32, calls=6, thinking=6, given=10, group=2, rank=2),
        prompts=2,
        budget_s=600,
        share_s=0,
    ),
}


@dataclass
class Comparison:
    """What measurements share."""

    cases: Cases
    clock: Clock
    report: Report

    def agree(self, part: str, name: str, difference: float, limit: float) -> None:
        """Report how far two ways to the same thing are apart."""
        assert difference <= limit, f"{part}, {name}: {difference:.1e}, more than the {limit:.0e} of rounding"
        self.report.add(part, name, difference, f"must be <= {limit:.0e}")
