"""The first half of the recorded step: rollout, rewards, advantages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from unigrpo_cli import train
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Group, Prompt
from unigrpo_cli.errors import RewardError
from unigrpo_cli.evaluate import sample_of, samples_of
from unigrpo_cli.parallel.ranks import ALONE
from unigrpo_cli.rewards.batch import Sample
from unigrpo_cli.rewards.loaded import LoadedReward
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.doctor.recorder import Recorder
from unigrpo_cli.run.doctor.recording import RecordedRewards, RecordedRollout


def record_rollout(
    recorder: Recorder, prompts: list[Prompt], rewards: Scorer, config: Config, step: int, thorough: bool
) -> tuple[RecordedRollout, dict]:
    """The first half of a training step; in a thorough examination also a second rollout with the same seed."""
    seed = derive(config.seed, "doctor", step)
    every_picture = train.credit_of(config) == "reward-to-go"
    pending = rewards.start(step=step, overlap=config.reward.overlap, every_picture=every_picture)

    def sampled(**more: Any) -> list[Group]:
        sampling, window = train.train_sampling(config), train.window_of(config, step)
        return train.rollout(recorder.as_policy, prompts, config.train.group_size, sampling, window, seed, **more)

    groups = sampled(on_episodes=lambda new: pending.add([sample_of(e, step) for e in new]))
    traces = recorder.take()
    pending.submit([s.id for s in samples_of(groups, step)])
    scored = pending.finish()
    again = sampled() if thorough else None
    recorder.take()
    return RecordedRollout(groups, traces, again), scored


def record_rewards(
    rollout: RecordedRollout, scored: dict, rewards: Scorer, config: Config, step: int, thorough: bool
) -> RecordedRewards:
    samples = samples_of(rollout.groups, step)
    seed = derive(config.seed, "doctor", step)
    kind_BS = train.kinds_of_all(rollout.groups, ALONE, 1)
    advantage_BS = train.advantages(scored, kind_BS, rewards, config, len(rollout.groups), seed)
    found = RecordedRewards(scored, advantage_BS, kind_BS, {}, {}, {})
    for loaded in rewards.active("train"):
        name, own = loaded.alias, scored[loaded.alias]

        def score(samples: Sequence[Sample], loaded: LoadedReward = loaded) -> list[float]:
            batch = rewards.prepare(samples, step=step, split="train")
            return loaded.collect(loaded.submit(batch)).scores.tolist()

        def score_or_abstain(sample: Sample) -> float:
            try:
                return score([sample])[0]
            except RewardError:  # it says that it cannot score this one
                return float("nan")

        known = own.scores[own.valid]
        if len(known) and (known == known[0]).all():
            found.contrasts[name] = [score_or_abstain(s) for s in _contrasts(samples)]
        if loaded.is_remote and not thorough:
            continue
        if loaded.scores_alone:
            found.alone[name] = [score([sample])[0] for sample in samples]
        found.again[name] = score(samples)
    return found


def _contrasts(samples: Sequence[Sample]) -> list[Sample]:
    """Samples with very different pictures, prompts and texts."""
    first, last = samples[0], samples[-1]
    noise = np.random.default_rng(0).integers(0, 256, first.pixels.shape, dtype=np.uint8)
    black, white = np.zeros_like(first.pixels), np.full_like(first.pixels, 255)
    pictures = [replace(first, pixels=pixels) for pixels in (black, white, noise, last.pixels[::-1].copy())]
    prompts = [replace(s, prompt=last.prompt, metadata=last.metadata) for s in samples[:2]]
    texts = (last.reasoning, "", "other words") if first.reasoning else ()
    return [*pictures, *prompts, *(replace(first, reasoning=text) for text in texts)]


@contextmanager
def abstentions_restored(rewards: Scorer) -> Iterator[None]:
    """The doctor's abstentions are not counted and stop nothing."""
    before = [(loaded, loaded.limits, list(loaded.recent)) for loaded in rewards.rewards]
    for loaded, limits, _ in before:
        loaded.limits = replace(limits, max_abstain=1.0)
    try:
        yield
    finally:
        for loaded, limits, recent in before:
            loaded.limits = limits
            loaded.recent.clear()
            loaded.recent.extend(recent)
