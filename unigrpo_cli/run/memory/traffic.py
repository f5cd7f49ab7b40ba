"""Bytes that a rank receives from others in a training step. Arithmetic; imports no torch.

Collectives are rings: of S bytes that are gathered or scattered over W ranks each receives S (W - 1) / W, of S that
are added up everywhere twice that. Rewards' scores and metrics are kilobytes and left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from unigrpo_cli.models.mot.config import LAYERS
from unigrpo_cli.run.memory.workload import WIDE, Workload


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank receives for one purpose in a training step."""

    name: str
    bytes: float
    formula: str


def traffic(load: Workload) -> tuple[Sent, ...]:
    """All of it, the largest purposes by name; nothing for one process."""
    if load.world == 1:
        return ()
    share, batch = (load.world - 1) / load.world, load.batch
    outside = load.trained
    if load.sharded:
        outside = load.elements(lambda name: load.is_trained(name) and not name.startswith(LAYERS))
    sums = batch.optimizer_steps * 2 * WIDE * outside * share
    summed = Sent("sum gradients", sums, f"{batch.optimizer_steps} x {outside:,} x 4 B x 2")
    if not load.sharded:
        return (summed,)
    layers = load.elements(lambda name: name.startswith(LAYERS))
    narrow = load.stored(lambda name: name.startswith(LAYERS))
    passes = batch.micro_batches * load.config.train.minibatches
    replays = passes * (1 + 2 * batch.backwards)  # old; forward and backward of every epoch
    found = [
        Sent("gather to sample", narrow * share, f"{narrow:,} B of layers once"),
        Sent(
            "gather layers",
            replays * WIDE * layers * share,
            f"{passes} micro-batches x (1 + 2 x {batch.backwards}) passes x {layers:,} x 4 B",
        ),
        Sent("gather the reference", passes * narrow * share, f"{passes} micro-batches x {narrow:,} B")
        if load.needs_reference
        else None,
        Sent(
            "scatter gradients",
            passes * batch.backwards * WIDE * layers * share,
            f"{passes * batch.backwards} backward passes x {layers:,} x 4 B",
        ),
        summed,
    ]
    return tuple(sent for sent in found if sent is not None and sent.bytes)
