"""What is compared on a CPU, and at what sizes: chosen once, by what is done with models of that size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.clock import Clock
from benchmarks.report import Report
from benchmarks.shapes import Size, bagel_shape
from unigrpo_cli.models.mot.config import AutoencoderConfig, MoTConfig


@dataclass(frozen=True)
class Cases:
    """Sizes of all comparisons.

    Args:
        embedded: settings of the embedded model's training step on top of its defaults.
        groups: group sizes whose cost per sample is compared, the smallest first.
        compared: members of the group that is also drawn one at a time.
        large, small: a random network for sampling, and one for all that has many parts.
        contexts, copies: tokens of context before an image and noisy images K after it, of the replay.
        replayed_pixels: side of that image.
        proportioned: a random network with the proportions of BAGEL's layers, for the replay too.
        prompts: of a text-only step, each with the first of the small one's groups.
        waiting_rows: episodes per batch while a reward waits, one after the other.
        curves: what the costs of the small network are followed over.
        budget_s, share_s: seconds for everything, unless the command says otherwise, and for the rounds of one
            measurement; there is always one.
    """

    embedded: dict[str, Any]
    groups: tuple[int, ...]
    compared: int
    large: Size
    small: Size
    contexts: tuple[int, ...]
    copies: tuple[int, ...]
    replayed_pixels: int
    proportioned: Size
    prompts: int
    waiting_rows: tuple[int, ...]
    curves: dict[str, tuple[int, ...]]
    budget_s: float
    share_s: float

    @property
    def wordy(self) -> Size:
        """The large network with twice the words and images of four ninths of the tokens."""
        return replace(self.large, thinking=2 * self.large.thinking, pixels=self.large.pixels * 2 // 3 // 16 * 16)


def _size(shape: MoTConfig, autoencoder: AutoencoderConfig, **task: Any) -> Size:
    settled = {"copies": 3, "micro_batches": (8,), "rank": 16}
    return Size(shape, autoencoder, **(settled | task))


CODEC = AutoencoderConfig((32, 64, 128, 128), 1, 16)  # small, as BAGEL's is beside its network

CASES = {
    "full": Cases(
        embedded={},
        groups=(4, 8, 16, 32),
        compared=8,
        # Both experts together 105 million weights; the middle of what a model of that size is asked for on a CPU,
        # images of 64 to 256 tokens and texts of 64 to 256 tokens.
        large=_size(
            bagel_shape(768, 8, 12, 2, 2048, 4096, 32),
            CODEC,
            pixels=192,
            calls=10,
            thinking=128,
            given=60,
            groups=(8,),
        ),
        small=_size(
            bagel_shape(256, 4, 4, 2, 1024, 4096, 32),
            CODEC,
            pixels=192,
            calls=10,
            thinking=128,
            given=60,
            groups=(8,),
        ),
        contexts=(300, 450, 600),
        copies=(3, 8),
        replayed_pixels=512,
        # An eighth of BAGEL's width, with its seven queries to a key and its ratio of MLP to width. Beside 1,024
        # image tokens attention is a quarter of the operations here, two fifths in the small one and 4 % in BAGEL.
        proportioned=_size(
            bagel_shape(448, 4, 7, 1, 2368, 4096, 32),
            CODEC,
            pixels=512,
            calls=10,
            thinking=128,
            given=60,
            groups=(8,),
        ),
        prompts=2,
        waiting_rows=(48, 16),  # the preset's own, and small ones
        curves={
            "group size": (4, 8, 32),
            "thinking, tokens": (32, 128, 512),
            "image, tokens": (64, 144, 576),
            "K": (1, 3, 8),
        },
        budget_s=1500,
        share_s=20,
    ),
    "tiny": Cases(
        embedded={
            "reward.names": ["fidelity"],  # of the two defaults one takes seconds to load
            "sampling.max_new_tokens": 8,
            "sampling.steps": 6,
            "train.prompts_per_step": 2,
            "train.group_size": 4,
            "train.micro_batch_size": 4,
        },
        groups=(2, 4),
        compared=2,
        large=_size(
            bagel_shape(64, 2, 4, 2, 96, 512, 8),
            CODEC,
            pixels=32,
            calls=6,
            thinking=6,
            given=10,
            groups=(2,),
            rank=2,
        ),
        small=_size(
            bagel_shape(32, 2, 4, 2, 64, 512, 8),
            CODEC,
            pixels=32,
            calls=6,
            thinking=6,
            given=10,
            groups=(2,),
            rank=2,
        ),
        contexts=(24,),
        copies=(2, 3),
        replayed_pixels=64,
        proportioned=_size(
            bagel_shape(28, 2, 7, 1, 148, 512, 8),
            CODEC,
            pixels=64,
            calls=6,
            thinking=6,
            given=10,
            groups=(2,),
            rank=2,
        ),
        prompts=2,
        waiting_rows=(2,),
        curves={"K": (2,)},
        budget_s=1500,
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
        """Report how far two ways to the same thing are apart.

        Raises:
            AssertionError: when that is more than rounding, for then nothing else here means anything.
        """
        assert difference <= limit, f"{part}, {name}: {difference:.1e}, more than the {limit:.0e} of rounding"
        self.report.add(part, name, difference, f"must be <= {limit:.0e}")
