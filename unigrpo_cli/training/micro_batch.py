"""The episodes of one backward pass, with the scores and advantages that stay fixed over its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unigrpo_cli.algo.objective import Advantages, Scores, per_action
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
    """

    batch: Batch
    rows: list[int]
    old: Scores | None
    reference: Scores | None
    advantages: Advantages = UNKNOWN

    @property
    def old_scores(self) -> Scores:
        assert self.old is not None
        return self.old


def with_advantages(minibatches: Sequence[Sequence[MicroBatch]], advantage_BS: Tensor) -> list[list[MicroBatch]]:
    """Each micro-batch with the advantages of its episodes."""

    def completed(m: MicroBatch) -> MicroBatch:
        actions = m.batch.actions
        return replace(m, advantages=per_action(advantage_BS[m.rows].to(actions.mask_BL.device), actions))

    return [[completed(m) for m in share] for share in minibatches]
