"""Scoring that begins while the step still samples or replays: it judges the same episodes, only earlier."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from unigrpo_cli.errors import RewardError
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.rewards.batch import RewardBatch, Sample
from unigrpo_cli.rewards.scorer import LoadedReward, RewardResult, RewardSet, waits_elsewhere


def begins_early(opened: LoadedReward, overlap: str) -> bool:
    """Whether a reward may be handed parts of a rollout.

    `auto`: those that wait for another machine. `all`: also those that compute here and take batches of a size of
    their own; one without wants the whole rollout in one call. Those that compare the members of a group never do.
    """
    if overlap == "none" or getattr(opened.reward, "scope", "sample") != "sample":
        return False
    return waits_elsewhere(opened) or (overlap == "all" and getattr(opened.reward, "batch_size", None) is not None)


class Scoring:
    """The scoring of one rollout: `add` samples as they come, `ask` when all are there, `finish` when it is needed.

    Over several ranks `finish` gives everybody's scores to everybody, for what is learnt from them looks at all.
    """

    def __init__(
        self,
        rewards: RewardSet,
        *,
        step: int,
        split: str = "train",
        overlap: str = "auto",
        ranks: Ranks = ALONE,
    ):
        self.rewards, self.step, self.split, self.ranks = rewards, step, split, ranks
        self._samples: list[Sample] = []
        self._batches: list[RewardBatch] = []
        self._order: list[int] | None = None
        self._parts = 1
        asked = rewards.asked(split)
        early = [] if rewards.on_first else [r for r in asked if begins_early(r, overlap)]
        self._early: dict[str, list[tuple[int, Future]]] = {r.alias: [] for r in early}
        away = [] if rewards.on_first or overlap == "none" else [r for r in asked if waits_elsewhere(r)]
        self._away: dict[str, list[tuple[int, Future]]] = {r.alias: [] for r in away}
        self._known: dict[str, RewardResult] = {}

    @property
    def begins_early(self) -> bool:
        """Whether anything is judged before all is sampled."""
        return bool(self._early)

    def add(self, samples: Sequence[Sample]) -> None:
        """Hand over finished episodes; whoever can begins to judge them."""
        self._samples += samples
        if self.rewards.on_first:
            return
        batch = self.rewards.prepare(samples, step=self.step, split=self.split)
        self._batches.append(batch)
        for opened in self.rewards.asked(self.split):
            if opened.alias in self._early:
                self._early[opened.alias] += self.rewards.submit(opened, batch)

    def ask(self, ids: Sequence[str], parts: int = 1) -> None:
        """All is there: rewards that compute here judge it now, and rest; those elsewhere begin at the latest now.

        Args:
            ids: of this rank's own samples, in the order that scores are wanted in.
            parts: in which they were shared out.

        Raises:
            RewardError: when a reward that computes here, or on the first rank, fails or breaks its contract.
        """
        at = {sample.id: k for k, sample in enumerate(self._samples)}
        self._order, self._parts = [at[i] for i in ids], parts
        if self.rewards.on_first:
            own = [self._samples[k] for k in self._order]
            self._known = _on_first(self.rewards, own, self.ranks, parts, step=self.step, split=self.split)
            return
        with self.ranks.together():
            whole, asked = self._whole(), self.rewards.asked(self.split)
            for opened in asked:
                if opened.alias in self._away:
                    self._away[opened.alias] = self._early.get(opened.alias) or self.rewards.submit(opened, whole)
            for opened in asked:
                if opened.alias not in self._away:
                    calls = self._early.get(opened.alias) or self.rewards.submit(opened, whole)
                    self._known[opened.alias] = self._in_order(opened, calls)
            self.rewards.rest([r for r in self.rewards.rewards if r.alias not in self._away])

    def finish(self) -> dict[str, RewardResult]:
        """Scores of all that was added by alias, in the order asked for; all ranks' as `Ranks.joined` has them.

        Raises:
            RewardError: when a reward fails, breaks its contract or abstains too often, on any rank.
            ValueError: before `ask`.
        """
        if self._order is None:
            raise ValueError("scores are finished before they are asked for")
        if self.rewards.on_first:
            return self._known
        with self.ranks.together():
            asked = self.rewards.asked(self.split)
            away = {r.alias: self._in_order(r, self._away[r.alias]) for r in asked if r.alias in self._away}
            results = {r.alias: (self._known | away)[r.alias] for r in asked}
            self.rewards.announce(self._whole(), results)
            self.rewards.rest([r for r in self.rewards.rewards if r.alias in self._away])
        results = _of_all(results, self.ranks, self._parts)
        with self.ranks.together():
            self.rewards.watch({alias: scored.valid for alias, scored in results.items()})
        return results

    def _whole(self) -> RewardBatch:
        """All samples as rewards see them, in the order asked for."""
        assert self._order is not None
        added = [sample for batch in self._batches for sample in batch.samples]
        return replace(self._batches[0], samples=tuple(added[k] for k in self._order))

    def _in_order(self, opened: LoadedReward, calls: list[tuple[int, Future]]) -> RewardResult:
        """What a reward said, in the order asked for; batches that began early were in their own."""
        assert self._order is not None
        scored = self.rewards.collect(opened, calls)
        return taken(scored, self._order) if opened.alias in self._early else scored


def scores_of(
    rewards: RewardSet, samples: Sequence[Sample], ranks: Ranks = ALONE, *, step: int = 0, split: str
) -> dict[str, RewardResult]:
    """Scores of this rank's own samples, if it has any, wherever they are judged; all ranks must ask.

    Raises:
        RewardError: when a reward fails, breaks its contract or abstains too often, on any rank.
    """
    if rewards.on_first:
        sizes = ranks.gather(len(samples))
        begin = sum(sizes[: ranks.rank])
        everyone = _on_first(rewards, samples, ranks, None, step=step, split=split)
        return {name: taken(scored, range(begin, begin + len(samples))) for name, scored in everyone.items()}
    with ranks.together():
        own = rewards.score(samples, step=step, split=split, watched=False) if samples else {}
    told = ranks.gather({name: scored.valid.tolist() for name, scored in own.items()})
    with ranks.together():
        names = {name for row in told for name in row}  # a rank without samples knows of none
        valid = {name: [flag for row in told for flag in row.get(name, ())] for name in names}
        rewards.watch({name: np.array(flags, dtype=bool) for name, flags in valid.items()})
    return own


def scores_of_all(
    rewards: RewardSet, samples: Sequence[Sample], ranks: Ranks = ALONE, *, step: int = 0, split: str
) -> dict[str, RewardResult]:
    """Scores of all ranks' samples, one rank's after the other's, on every rank; all ranks must ask.

    Raises:
        RewardError: when a reward fails, breaks its contract or abstains too often, on any rank.
    """
    if rewards.on_first:
        return _on_first(rewards, samples, ranks, None, step=step, split=split)
    own = scores_of(rewards, samples, ranks, step=step, split=split)
    if ranks.alone:
        return own
    told = [rows for rows in ranks.gather({name: _told(scored) for name, scored in own.items()}) if rows]
    return {name: _heard(_joined([rows[name] for rows in told], _chained)) for name in told[0]}


def _on_first(
    rewards: RewardSet, own: Sequence[Sample], ranks: Ranks, parts: int | None, *, step: int, split: str
) -> dict[str, RewardResult]:
    """All ranks' samples judged on the first rank, and their scores told to all.

    Args:
        parts: in which they were shared out; None for one rank's after the other's.
    """
    rows: dict[str, Any] = {}
    sent = samples_of_all(own, ranks)
    with ranks.together():
        if ranks.first:
            whole = _chained(sent) if parts is None else ranks.joined(sent, parts)
            scored = rewards.score(whole, step=step, split=split) if whole else {}
            rows = {name: _told(own) for name, own in scored.items()}
    return {name: _heard(row) for name, row in ranks.from_first(rows).items()}


def samples_of_all(own: Sequence[Sample], ranks: Ranks) -> list[list[Sample]]:
    """Every rank's samples, on the first; on the others nothing.

    Raises:
        RewardError: when metadata of a prompt cannot be sent as it is.
    """
    if ranks.alone:
        return [list(own)]
    words = [
        {"prompt": s.prompt, "reasoning": s.reasoning, "metadata": s.metadata, "id": s.id, "group_id": s.group_id}
        | {"shape": s.pixels.shape}
        for s in own
    ]
    with ranks.together():
        for sample in own:
            _refuse_what_json_changes(sample)
    pixels = [np.ascontiguousarray(s.pixels).reshape(-1) for s in own]
    flat = np.concatenate(pixels) if pixels else np.zeros(0, dtype=np.uint8)
    held = ranks.to_first(torch.from_numpy(flat))
    told = ranks.gather(words)
    found = []
    for rows, data in zip(told, held, strict=False):
        at, share = 0, []
        for row in rows:
            shape = tuple(row.pop("shape"))
            size = int(np.prod(shape))
            share.append(Sample(pixels=data[at : at + size].numpy().reshape(shape), **row))
            at += size
        found.append(share)
    return found


def _refuse_what_json_changes(sample: Sample) -> None:
    try:
        same = json.loads(json.dumps(sample.metadata)) == sample.metadata
    except (TypeError, ValueError):
        same = False
    if not same:
        raise RewardError(
            f"metadata of prompt {sample.prompt!r} is no plain JSON, so it cannot be sent to the first rank; "
            "let each rank judge its own episodes with reward.scoring_rank=each"
        )


def _of_all(own: dict[str, RewardResult], ranks: Ranks, parts: int) -> dict[str, RewardResult]:
    """Scores of all ranks from those of each."""
    if ranks.alone:
        return own
    told = ranks.gather({name: _told(scored) for name, scored in own.items()})
    return {name: _heard(_joined([rows[name] for rows in told], partial(ranks.joined, parts=parts))) for name in own}


def _chained(shares: Sequence[Sequence[Any]]) -> list[Any]:
    return [row for share in shares for row in share]


def _joined(rows: Sequence[dict[str, Any]], join: Callable[[list[list[Any]]], list[Any]]) -> dict[str, Any]:
    components = {}
    for name in dict.fromkeys(name for row in rows for name in row["components"]):  # one may have parts of its own
        known = [row["components"].get(name, [float("nan")] * len(row["scores"])) for row in rows]
        components[name] = join(known)
    whole = {key: join([row[key] for row in rows]) for key in ("scores", "valid", "info")}
    return whole | {"components": components}


def _told(scored: RewardResult) -> dict[str, Any]:
    """As JSON, which keeps every bit of an fp64 number."""
    return {
        "scores": scored.scores.tolist(),
        "valid": scored.valid.tolist(),
        "components": {name: values.tolist() for name, values in scored.components.items()},
        "info": scored.info,
    }


def _heard(row: dict[str, Any]) -> RewardResult:
    return RewardResult(
        np.asarray(row["scores"], dtype=np.float64),
        np.asarray(row["valid"], dtype=bool),
        {name: np.asarray(values, dtype=np.float64) for name, values in row["components"].items()},
        row["info"],
    )


def taken(scored: RewardResult, order: Sequence[int]) -> RewardResult:
    """Scores of some samples, in another order."""
    index = np.asarray(order, dtype=int)
    return RewardResult(
        scored.scores[index],
        scored.valid[index],
        {name: values[index] for name, values in scored.components.items()},
        [scored.info[k] for k in order],
    )
