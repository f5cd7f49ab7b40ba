"""SIMULATED training steps on up to 256 GPUs: arithmetic alone, nothing is run and no GPU is asked.

    python -m benchmarks.scaling

Work and bytes are those of the dry run (unigrpo_cli/estimate); what a card and its links sustain is assumed. Each
rank's work is divided by the card's rates, what it receives by its slowest link, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unigrpo_cli.config import Config, load_config
from unigrpo_cli.models.mot.config import BAGEL_AUTOENCODER, BAGEL_NETWORK
from unigrpo_cli.run.memory import ACCELERATOR, Rates, Workload, memory, of_each_rank, step_parts, traffic

PER_NODE = 8
BETWEEN_CARDS, BETWEEN_NODES = 2.0e11, 2.5e10
"""Bytes a second that a rank receives within a node, and from other nodes: assumed, not measured."""
PAPER = (8, 16)
"""Ranks among which the paper's 32 prompts in two updates can be shared out, in whole groups: no more than 16."""
LARGER = (8, 16, 64, 256)


@dataclass(frozen=True)
class Projected:
    """A simulated training step: seconds of work and of waiting for bytes, GiB at most, episodes in all."""

    ranks: int
    episodes: int
    gib: float
    work: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.work + self.waiting

    @property
    def each(self) -> float:
        """Episodes a rank trains on in an hour."""
        return 3600 * self.episodes / self.ranks / self.seconds


def settings(finetune: str, prompts: int) -> Config:
    """The paper's on cards of 80 GB."""
    own = [
        f"train.finetune={finetune}",
        f"train.prompts_per_step={prompts}",
        "train.micro_batch_size=4",
        "sampling.batch_size=16",
    ]
    return load_config(preset="paper", overrides=[*own, "dtype=bfloat16", "train.activation_checkpointing=true"])


def projected(config: Config, ranks: int, rates: Rates = ACCELERATOR) -> Projected:
    """One step of BAGEL-7B-MoT's shape."""
    work = Workload(BAGEL_NETWORK, BAGEL_AUTOENCODER, of_each_rank(config, ranks), world=ranks)
    link = BETWEEN_CARDS if ranks <= PER_NODE else BETWEEN_NODES
    return Projected(
        ranks,
        config.train.prompts_per_step * config.train.group_size,
        memory(work).need,
        sum(part.work.seconds(rates) for part in step_parts(work)),
        sum(sent.bytes for sent in traffic(work)) / link,
    )


def table(title: str, rows: Sequence[Projected]) -> str:
    """As Markdown."""
    lines = [f"SIMULATED: {title}", "", "| ranks | episodes | GiB | work, s | received, s | step, s | efficiency |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        share = row.work / row.seconds
        lines.append(
            f"| {row.ranks} | {row.episodes:,} | {row.gib:.0f} | {row.work:,.0f} | {row.waiting:,.0f} | "
            f"{row.seconds:,.0f} | {share:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    for finetune, name in (
        ("lora", "adapters, whole weights on every rank"),
        ("full", "all weights, layers sharded"),
    ):
        own = [projected(settings(finetune, 32), ranks) for ranks in PAPER]
        print(table(f"{name}, the paper's 32 prompts", own), end="\n\n")
        grown = [projected(settings(finetune, 4 * ranks), ranks) for ranks in LARGER]
        print(table(f"{name}, 4 prompts for each rank", grown), end="\n\n")


if __name__ == "__main__":
    main()
