"""The episodes of one backward pass, with the scores and advantages that stay fixed over its updates."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unigrpo_cli.algo.objective import Advantages, Scores, per_action
from unigrpo_cli.errors import UsageError
from unigrpo_cli.parallel.ranks import Ranks
from unigrpo_cli.replay import Batch

UNKNOWN = Advantages(torch.zeros(0, 0), ())


@dataclass(frozen=True)
class MicroBatch:
    """Episodes of one backward pass.

    Args:
        batch: the recorded actions.
        rows: which of this rank's episodes they are.
        old: scores of the policy that drew them; None until the first update, whose own scores they are.
        reference: scores of the starting model; None where the objective needs none.
        advantages: one per action; empty until the rewards are known.
        traced: a trace of the step shows some of them.
        new: scores that the last update saw, kept for a trace.
    """

    batch: Batch
    rows: list[int]
    old: Scores | None
    reference: Scores | None
    advantages: Advantages = UNKNOWN
    traced: bool = False
    new: Scores | None = None

    @property
    def old_scores(self) -> Scores:
        assert self.old is not None
        return self.old

    def scored(self, new: Scores) -> MicroBatch:
        """With the scores of an update; the first update's own are the old ones where no pass made those."""
        return replace(self, old=self.old or new, new=new if self.traced else None)


def with_advantages(
    minibatches: Sequence[Sequence[MicroBatch]], advantage_BS: Tensor, maps: Sequence[tuple[Tensor, ...]] = ()
) -> list[list[MicroBatch]]:
    """Each micro-batch with the advantages of its episodes, and the maps of their images where there are any."""

    def completed(m: MicroBatch) -> MicroBatch:
        actions = m.batch.actions
        device = actions.mask_BL.device
        own = zip(*(maps[row] for row in m.rows), strict=True) if maps else ()
        maps_BN = tuple(torch.stack(image).to(device) for image in own)
        return replace(m, advantages=per_action(advantage_BS[m.rows].to(device), actions, maps_BN))

    return [[completed(m) for m in share] for share in minibatches]


def refuse_uneven_passes(batches: Sequence[Batch], ranks: Ranks) -> None:
    """Refuse micro-batches whose passes through sharded weights not all ranks make: they would wait for ever."""
    passes = [
        [[c.ids_BS.shape[1] > 0, c.image is not None, c.latent_BND is not None] for c in batch.chunks]  # as JSON has it
        for batch in batches
    ]
    if any(own != passes for own in ranks.gather(passes)):
        raise UsageError(
            "episodes have other segments on other ranks, so ranks with sharded weights would make different numbers "
            "of passes; give ranks.weights=whole, train.finetune=lora, or a program in which no row stops early"
        )


def marked(minibatches: Sequence[Sequence[MicroBatch]], groups: Container[int], members: int) -> list[list[MicroBatch]]:
    """Each micro-batch, `traced` where it holds an episode of one of the groups."""
    return [[replace(m, traced=any(r // members in groups for r in m.rows)) for m in share] for share in minibatches]
