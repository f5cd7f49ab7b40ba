"""From samples to scores: one path for training, evaluation, saved episodes and single pictures.

`Scorer.score` scores samples now. `Scorer.start` scores them as they come, while others are sampled; the scores are
the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unigrpo_cli.errors import RewardError
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardResult, Sample
from unigrpo_cli.rewards.gather import results_of_all, results_of_first, samples_of_all
from unigrpo_cli.rewards.loaded import (
    DEFAULT_LIMITS,
    Call,
    LoadedReward,
    RewardIdentity,
    RewardLimits,
    load_reward,
    make_reward,
)
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.spec import RewardSpec, parse_rewards


class Scorer:
    """The rewards of a run. A context manager: leaving it tears them down."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        plugins: Plugins,
        context: RewardContext,
        limits: RewardLimits = DEFAULT_LIMITS,
        *,
        first_rank_only: bool = False,
        local: bool = True,
    ):
        """Find, configure and set up every reward.

        Args:
            first_rank_only: of several ranks, the first scores the samples of all.
            local: False sets up nothing: another rank scores, this one only knows the rewards' names.
        """
        self.plugins, self.limits = plugins, limits
        self.context = context = replace(context, other_reward=self._other_reward)
        self.first_rank_only, self.local = first_rank_only, local
        self.rewards: list[LoadedReward] = []
        self._offloaded = False
        found = [load_reward(spec, plugins, limits) for spec in specs]  # all options first: setup can take minutes
        try:
            for loaded in found:
                if local:
                    loaded.setup(context)
                self.rewards.append(loaded)
                if local:
                    plugins.call("unigrpo_reward_setup", name=loaded.alias, reward=loaded.reward, context=context)
        except BaseException:
            self.__exit__(None)
            for loaded in found:
                loaded.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        """Drop queued calls and tear down all but rewards that hang; errors are warnings."""
        rewards, self.rewards = self.rewards, []
        for loaded in rewards:
            loaded.worker.cancel_queued()
            if self.local:
                with _warned():
                    self.plugins.call("unigrpo_reward_teardown", name=loaded.alias, reward=loaded.reward)
                with _warned():
                    loaded.teardown()
            loaded.close()

    def _other_reward(self, text: str) -> Any:
        """A reward for another one's use, by a text as in `--reward`."""
        specs = parse_rewards([text])
        if len(specs) != 1:
            raise RewardError(f"{text!r} names {len(specs)} rewards; give one")
        return make_reward(specs[0], self.plugins)[1]

    # ----- which rewards

    def active(self, split: str) -> list[LoadedReward]:
        """The rewards that score "train" or "eval" samples."""
        return [r for r in self.rewards if split == "eval" or not r.spec.eval_only]

    @property
    def weights(self) -> dict[str, float]:
        """Weight in training by alias, negative where lower scores are better."""
        return {r.alias: r.spec.weight * r.sign for r in self.active("train")}

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        return {r.alias: r.range for r in self.active("train")}

    def set_ranges(self, ranges: Sequence[tuple[float, float]]) -> None:
        """Take ranges from the rank that set the rewards up."""
        for loaded, (low, high) in zip(self.rewards, ranges, strict=True):
            loaded.range = (low, high)

    def identities(self) -> tuple[RewardIdentity, ...]:
        return tuple(r.identity() for r in self.rewards)

    def abstentions(self) -> dict[str, list[bool]]:
        """By alias, on which of the last samples each reward abstained: part of a checkpoint."""
        return {r.alias: list(r.recent) for r in self.rewards}

    def restore_abstentions(self, abstentions: dict[str, list[bool]]) -> None:
        """The same from a checkpoint; rewards that it lacks start empty."""
        for loaded in self.rewards:
            loaded.recent.extend(abstentions.get(loaded.alias, ()))

    def check_options(self, metadata: Sequence[Any], split: str) -> None:
        """Let rewards refuse what their setup would refuse, before anything is fetched."""
        for loaded in self.active(split):
            loaded.call("check_options", self.context, metadata)

    def check_needs(self, metadata: Sequence[Any], *, has_reasoning: bool, has_source: bool, split: str) -> None:
        """Check, before sampling, that every prompt carries what the rewards of a split need.

        Args:
            metadata: of each prompt.
            has_reasoning: whether the policy writes text.
            has_source: whether every prompt has a picture.
        """
        for loaded in self.active(split):
            for need in sorted(getattr(loaded.reward, "needs", ())):
                kind, _, key = need.partition(":")
                if kind == "metadata" and key:
                    lacking = [k for k, row in enumerate(metadata) if key not in row]
                    if lacking:
                        raise RewardError(
                            f"reward {loaded.alias!r} needs metadata {key!r}, which {len(lacking)} of "
                            f"{len(metadata)} prompts lack, the first of them {_shown(metadata[lacking[0]])}; "
                            "give a .jsonl file with it in every row"
                        )
                elif kind == "source" and not has_source:
                    raise RewardError(
                        f"reward {loaded.alias!r} needs the picture that an episode starts from, but some prompts have "
                        "none; give prompts with an `image`, and a program that reads it, e.g. sampling.program=edit"
                    )
                elif kind in ("reasoning", "texts") and not has_reasoning:
                    raise RewardError(
                        f"reward {loaded.alias!r} needs reasoning, but the policy does not think "
                        "(sampling.think is false)"
                    )
            if self.local:
                loaded.call("check_metadata", metadata)

    # ----- scoring

    def score(
        self,
        samples: Sequence[Sample],
        *,
        step: int = 0,
        split: str = "train",
        ranks: Ranks = ALONE,
        every_picture: bool = False,
    ) -> dict[str, RewardResult]:
        """Results by alias, of all ranks' samples in the order of the ranks. All ranks must call this.

        Args:
            every_picture: as in `start`.
        """
        pending = self.start(step=step, split=split, ranks=ranks, every_picture=every_picture)
        with pending.together():
            pending.add(samples)
        pending.submit()
        return pending.finish()

    def start(
        self,
        *,
        step: int = 0,
        split: str = "train",
        overlap: str = "auto",
        ranks: Ranks = ALONE,
        every_picture: bool = False,
    ) -> PendingScores:
        """Begin the scoring of one rollout.

        Args:
            every_picture: a reward that scores whole episodes also scores each episode up to each earlier picture;
                `RewardResult.segments` then has the scores of all its pictures.
        """
        return PendingScores(self, step, split, overlap, ranks, every_picture)

    def prepare(self, samples: Sequence[Sample], *, step: int, split: str) -> RewardBatch:
        """Samples as rewards get them: after `unigrpo_before_score`."""
        batch = _frozen(RewardBatch(tuple(samples), step, split, self.context.device))
        changed = self.plugins.call("unigrpo_before_score", batch=batch)
        if changed is None:
            return batch
        if not isinstance(changed, RewardBatch) or len(changed) != len(batch):
            raise RewardError(f"unigrpo_before_score must give a RewardBatch of the same {len(batch)} samples")
        return _frozen(changed)

    def notify(self, batch: RewardBatch, results: dict[str, RewardResult]) -> None:
        """Show results to plugins. An observer's error is a warning."""
        for alias, result in results.items():
            with _warned():
                self.plugins.call("unigrpo_after_score", name=alias, batch=batch, scored=copy.deepcopy(result))

    def record_abstentions(self, valid: Mapping[str, NDArray[np.bool_]]) -> None:
        """Count abstentions by alias. Every rank counts those of all, so all stop together."""
        for loaded in self.rewards:
            if loaded.alias in valid:
                loaded.record_abstentions(valid[loaded.alias])

    def offload(self, rewards: Sequence[LoadedReward]) -> None:
        """Free the device until the next scoring, with `reward.offload`."""
        if self.limits.offload:
            self._offloaded = True
            for loaded in rewards:
                loaded.call("offload")
            self.context.shared.move("cpu")

    def reload(self) -> None:
        """Bring offloaded rewards back to the device."""
        if self._offloaded:
            self._offloaded = False
            self.context.shared.move(self.context.device)
            for loaded in self.rewards:
                loaded.call("reload")


class PendingScores:
    """The scoring of one rollout: `add` samples as they come, `submit` when all are there, `finish` to get results."""

    def __init__(self, scorer: Scorer, step: int, split: str, overlap: str, ranks: Ranks, every_picture: bool):
        self._scorer, self._step, self._split, self._ranks = scorer, step, split, ranks
        self._every_picture = every_picture
        self._elsewhere = scorer.first_rank_only and ranks.world > 1
        self._active = scorer.active(split)
        usable = [] if self._elsewhere else self._active
        self._early = {r.alias for r in usable if r.begins_early(overlap)}
        self._remote = {r.alias for r in usable if r.is_remote and overlap != "none"}
        self._samples: list[Sample] = []
        self._rows: list[tuple[Sample, ...]] = []  # of each sample, what rewards see: by picture, the whole one last
        self._order: list[int] | None = None
        self._parts: int | None = None
        self._calls: dict[str, list[Call]] = {r.alias: [] for r in self._active}
        self._results: dict[str, RewardResult] = {}

    @property
    def begins_early(self) -> bool:
        """Whether a reward scores samples before all are there."""
        return bool(self._early)

    def together(self) -> AbstractContextManager[None]:
        """`Ranks.together`: an error on one rank is an error on all."""
        return nullcontext() if self._ranks.world == 1 else self._ranks.together()

    def add(self, samples: Sequence[Sample]) -> None:
        """Add finished episodes; rewards that begin early start to score them."""
        self._samples += samples
        if self._elsewhere or not samples:
            return
        rows = [sample.by_round() if self._every_picture else (sample,) for sample in samples]
        flat = self._scorer.prepare([row for own in rows for row in own], step=self._step, split=self._split)
        prepared = iter(flat.samples)
        new = [tuple(next(prepared) for _ in own) for own in rows]
        self._rows += new
        if self._early - self._remote:  # local rewards that begin early; otherwise the device is the rollout's
            self._scorer.reload()
        for loaded in self._active:
            if loaded.alias in self._early:
                self._calls[loaded.alias] += loaded.submit(self._seen_by(loaded, new))

    def submit(self, ids: Sequence[str] | None = None, parts: int | None = None) -> None:
        """All samples are there: score them with local rewards, and start the remote ones that have not begun.

        Args:
            ids: of this rank's samples, in the order of the results; None for the order in which they were added.
            parts: into which `Ranks.share` cut the samples; None puts one rank's results after the other's.
        """
        at = {sample.id: k for k, sample in enumerate(self._samples)}
        self._order = list(range(len(self._samples))) if ids is None else [at[i] for i in ids]
        self._parts = parts
        if self._elsewhere:
            self._score_on_first([self._samples[k] for k in self._order])
            return
        with self.together():
            self._scorer.reload()
            ordered = [self._rows[k] for k in self._order]
            begun = set(self._early)
            for loaded in self._active:
                if loaded.alias in self._remote - begun:
                    self._calls[loaded.alias] = loaded.submit(self._seen_by(loaded, ordered))
            for loaded in self._active:
                if loaded.alias not in self._remote:
                    if loaded.alias not in begun:
                        self._calls[loaded.alias] = loaded.submit(self._seen_by(loaded, ordered))
                    self._results[loaded.alias] = self._collect(loaded)
            self._scorer.offload([r for r in self._scorer.rewards if r.alias not in self._remote])

    def finish(self) -> dict[str, RewardResult]:
        """Results by alias, of all ranks.

        Raises:
            RewardError: when a reward fails, breaks its contract or abstains too often, on any rank.
            ValueError: before `submit`.
        """
        if self._order is None:
            raise ValueError("finish() before submit()")
        if self._elsewhere:
            return self._results
        with self.together():
            for loaded in self._active:
                if loaded.alias in self._remote:
                    self._results[loaded.alias] = self._collect(loaded)
            results = {r.alias: self._results[r.alias] for r in self._active}
            if self._rows:
                self._scorer.notify(self._batch([self._rows[k][-1] for k in self._order]), results)
            self._scorer.offload([r for r in self._scorer.rewards if r.alias in self._remote])
        if self._ranks.world > 1:
            results = results_of_all(results, self._ranks, self._parts)
        with self.together():
            self._scorer.record_abstentions({alias: result.opinions for alias, result in results.items()})
        return results

    def _score_on_first(self, own: Sequence[Sample]) -> None:
        samples = samples_of_all(own, self._ranks, self._parts)
        results: dict[str, RewardResult] = {}
        with self.together():
            if samples:
                results = self._scorer.score(
                    samples, step=self._step, split=self._split, every_picture=self._every_picture
                )
        self._results = results_of_first(results, self._ranks)

    def _batch(self, samples: Sequence[Sample]) -> RewardBatch:
        return RewardBatch(tuple(samples), self._step, self._split, self._scorer.context.device)

    def _seen_by(self, loaded: LoadedReward, rows: Sequence[tuple[Sample, ...]]) -> RewardBatch:
        """What a reward scores of some samples: each picture, or the episode once if it scores segments itself."""
        return self._batch([row for own in rows for row in (own[-1:] if loaded.segments else own)])

    def _collect(self, loaded: LoadedReward) -> RewardResult:
        """A reward's results in their order; early batches were in the order of sampling."""
        assert self._order is not None
        early = loaded.alias in self._early
        result = loaded.collect(self._calls[loaded.alias])
        if self._every_picture and not loaded.segments:
            result = _by_episode(
                result, [len(self._rows[k]) for k in (range(len(self._rows)) if early else self._order)]
            )
        return result.select(self._order) if early else result


def _by_episode(result: RewardResult, pictures: Sequence[int]) -> RewardResult:
    """The results of episodes from those of their pictures: the last picture's, with the scores of all by name."""
    ends = np.cumsum(pictures, dtype=int).tolist()
    segments = [
        {f"image_{k + 1}": float(result.scores[end - count + k]) for k in range(count)}
        for end, count in zip(ends, pictures, strict=True)
    ]
    return replace(result.select([end - 1 for end in ends]), segments=segments)


@contextmanager
def _warned() -> Iterator[None]:
    """Errors become warnings: the work is done, or only an observer failed."""
    try:
        yield
    except RewardError as error:
        warnings.warn(str(error), stacklevel=3)


def _frozen(batch: RewardBatch) -> RewardBatch:
    """Pixels that no reward can make writable: they lie in immutable bytes."""

    def frozen(s: Sample) -> Sample:
        segments = tuple(part if isinstance(part, str) else _immutable(part) for part in s.segments)
        source = None if s.source is None else _immutable(s.source)
        return replace(s, pixels=_immutable(s.pixels), source=source, segments=segments)

    return replace(batch, samples=tuple(map(frozen, batch.samples)))


def _immutable(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    owner: Any = pixels
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, bytes):
        return pixels
    return np.frombuffer(pixels.tobytes(), pixels.dtype).reshape(pixels.shape) if pixels.size else pixels


def _shown(row: Mapping[str, Any]) -> str:
    text = str(row.get("prompt", ""))
    return repr(text if len(text) <= 60 else f"{text[:60]} ...")
