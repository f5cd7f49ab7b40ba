"""Scoring that begins while the rollout still samples: on-policy still, for it judges the same episodes earlier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unigrpo_cli.rewards.batch import RewardBatch, Sample
from unigrpo_cli.rewards.lane import Pending
from unigrpo_cli.rewards.scoring import OpenReward, RewardSet, Scored, waits_elsewhere


def begins_early(opened: OpenReward, overlap: str) -> bool:
    """Whether a reward may be handed parts of a rollout.

    `auto`: those that wait for another machine. `all`: also those that compute here and take batches of a size of
    their own; one without wants the whole rollout in one call. Those that compare the members of a group never do.
    """
    if overlap == "none" or getattr(opened.reward, "scope", "sample") != "sample":
        return False
    return waits_elsewhere(opened) or (overlap == "all" and getattr(opened.reward, "batch_size", None) is not None)


class Scoring:
    """The scoring of one rollout: `add` samples as they come, `finish` when all are there."""

    def __init__(self, rewards: RewardSet, *, step: int, split: str = "train", overlap: str = "auto"):
        self.rewards, self.step, self.split = rewards, step, split
        self._batches: list[RewardBatch] = []
        self._early: dict[str, list[tuple[int, Pending]]] = {
            r.alias: [] for r in rewards.asked(split) if begins_early(r, overlap)
        }

    def add(self, samples: Sequence[Sample]) -> None:
        """Hand over finished episodes; whoever can begins to judge them."""
        batch = self.rewards.prepare(samples, step=self.step, split=self.split)
        self._batches.append(batch)
        for opened in self.rewards.asked(self.split):
            if opened.alias in self._early:
                self._early[opened.alias] += self.rewards.submit(opened, batch)

    def finish(self, ids: Sequence[str]) -> dict[str, Scored]:
        """Scores of all that was added by alias, in the order of `ids`.

        Raises:
            RewardError: when a reward fails, breaks its contract or abstains too often.
        """
        added = [sample for batch in self._batches for sample in batch.samples]
        at = {sample.id: k for k, sample in enumerate(added)}
        order = [at[i] for i in ids]
        whole = replace(self._batches[0], samples=tuple(added[k] for k in order))
        results = {}
        for opened in self.rewards.asked(self.split):
            if opened.alias in self._early:
                results[opened.alias] = _taken(self.rewards.collect(opened, self._early[opened.alias]), order)
            else:
                results[opened.alias] = self.rewards.collect(opened, self.rewards.submit(opened, whole))
        self.rewards.announce(whole, results)
        return results


def _taken(scored: Scored, order: Sequence[int]) -> Scored:
    index = np.asarray(order, dtype=int)
    return Scored(
        scored.scores[index],
        scored.valid[index],
        {name: values[index] for name, values in scored.components.items()},
        [scored.info[k] for k in order],
    )
