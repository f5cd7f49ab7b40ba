"""What every reward promises, as checks that can be run on any plugin."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardOutput, RewardResult, Sample
from unigrpo_cli.rewards.function import MARK
from unigrpo_cli.rewards.loaded import LoadedReward, RewardLimits
from unigrpo_cli.rewards.registry import Plugins, RewardEntry
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import RewardSpec, parse_rewards
from unigrpo_cli.toy.prompts import draw_scene, held_out_prompts
from unigrpo_cli.toy.render import render
from unigrpo_cli.toy.world import plan_text

TOLERANCE = 1e-4  # a network's scores move this much with the batch they are in


@dataclass(frozen=True)
class Check:
    """One promise, whether it was kept, and what was seen."""

    name: str
    ok: bool
    seen: str


def example_samples(count: int = 8, seed: int = 0) -> list[Sample]:
    """Pictures of the shapes world with prompts, metadata and plans."""
    rng = np.random.default_rng(seed)
    suite = held_out_prompts(per_tag=count)
    rows = suite[:: len(suite) // count][:count]
    samples = []
    for k, row in enumerate(rows):
        scene = draw_scene(row, rng)
        samples.append(Sample(row["prompt"], render(scene, rng), plan_text(scene), row, f"{k}", f"{k // 2}"))
    return samples


def check_reward(
    reward: Any,
    *,
    plugin: str | None = None,
    options: Mapping[str, Any] | None = None,
    samples: Sequence[Sample] | None = None,
    plugins: Plugins | None = None,
    max_seconds: float | None = None,
) -> list[Check]:
    """Run all checks on a reward.

    A reward with `scope = "group"` compares the samples of a group, so it is excused from being the same alone.

    Args:
        reward: a name as in `--reward`, a reward class, or a function decorated with `@reward`.
        plugin: the file or module that the name is in, if it is not installed.
        options: what would be given as `@key=value`.
        samples: what to score; default eight pictures of the shapes world with prompts, metadata and plans.
        max_seconds: longest time per sample that is accepted; None accepts any.

    Raises:
        RewardError: when it cannot be found or set up.
    """
    if plugins is None:
        plugins = Plugins()
        plugins.load([plugin] if plugin else None)
    choice = _choice(reward, options or {}, plugins)
    given = list(samples if samples is not None else example_samples())
    context = RewardContext(device="cpu", seed=0, embedded=True, offline=False)
    rewards = Scorer([choice], plugins, context, RewardLimits(max_abstain=1.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with rewards:
            checks = _scoring(rewards, given, max_seconds)
    torn = [str(w.message) for w in said if "failed in teardown" in str(w.message)]
    for other in [w for w in said if str(w.message) not in torn]:
        warnings.warn(other.message, other.category, stacklevel=2)
    checks.append(Check("can be torn down", not torn, torn[0] if torn else "done"))
    return checks


def _choice(reward: Any, options: Mapping[str, Any], plugins: Plugins) -> RewardSpec:
    """The reward to check; one given as an object is added to the plugins under its own name."""
    if isinstance(reward, str):
        (choice,) = parse_rewards([reward], {})
        choice.options.update(options)
        return choice
    made = getattr(reward, MARK, reward)
    name = str(getattr(made, "name", None) or getattr(made, "__name__", type(made).__name__))
    origin = str(getattr(made, "__module__", "-"))
    plugins.rewards._put(RewardEntry(name, origin, "-", load=lambda: reward))
    return RewardSpec(name, f"{origin}/{name}", 1.0, dict(options))


def _scoring(rewards: Scorer, given: Sequence[Sample], max_seconds: float | None) -> list[Check]:
    """All checks of a reward that is set up."""
    opened = rewards.rewards[0]

    def score(rows: Sequence[Sample]) -> RewardResult:
        return rewards.score(rows)[opened.alias]

    try:
        rewards.check_needs([s.metadata for s in given], has_reasoning=True, split="train")
        began = time.perf_counter()
        first = score(given)
        seconds = (time.perf_counter() - began) / max(1, len(given))
    except RewardError as error:
        return [Check("answers with one number per sample", False, str(error))]
    checks = [Check("answers with one number per sample", True, f"{len(given)} scores")]
    checks += _about(first, opened.range, seconds, max_seconds)
    try:
        checks += _again(score, first, given, alone=getattr(opened.reward, "scope", "sample") == "sample")
    except RewardError as error:
        checks.append(Check("answers again", False, str(error)))
    if not opened.worker.hung:
        checks.append(_nothing(opened))
    return checks


def _nothing(opened: LoadedReward) -> Check:
    """No samples, no scores. A run never asks that, so refusing with an exception is as good as an empty answer."""
    answer = opened.raw_score(RewardBatch(()))
    if isinstance(answer, BaseException):
        return Check("says nothing about nothing", True, f"refuses: {type(answer).__name__}")
    scores = answer.scores if isinstance(answer, RewardOutput) else answer
    count = len(scores) if hasattr(scores, "__len__") else -1
    seen = f"{count} scores for no samples" if count >= 0 else f"one {type(scores).__name__} for no samples"
    return Check("says nothing about nothing", count == 0, seen)


def _about(first: RewardResult, limits: tuple[float, float], seconds: float, max_seconds: float | None) -> list[Check]:
    """Checks of one answer."""
    abstained, count = int((~first.valid).sum()), len(first.valid)
    low, high = limits
    seen = first.scores[first.valid]
    inside = bool(((seen >= low - 1e-6) & (seen <= high + 1e-6)).all())
    limit = "" if max_seconds is None else f", {1000 * max_seconds:g} ms accepted"
    timed = f"{1000 * seconds:.1f} ms per sample{limit}"
    spread = f"{seen.min():.4g} to {seen.max():.4g}" if len(seen) else "nothing"
    return [
        Check("has an opinion", abstained < count, f"{abstained} of {count} abstained"),
        Check("stays in its declared range", inside, f"{spread} in [{low:g}, {high:g}]"),
        Check("is fast enough", max_seconds is None or seconds <= max_seconds, timed),
    ]


def _again(
    score: Callable[[Sequence[Sample]], RewardResult], first: RewardResult, given: Sequence[Sample], *, alone: bool
) -> list[Check]:
    """Checks of further answers against the first: the same samples again, in another order, one by one."""
    checks = [_same("gives the same twice", first, score(given))]
    order = list(range(len(given)))
    random.Random(0).shuffle(order)
    rotated, back = score([given[k] for k in order]), np.argsort(order)
    straight = RewardResult(rotated.scores[back], rotated.valid[back], {}, [])
    checks.append(_same("does not depend on the order", first, straight))
    if alone:
        ones = [score([row]) for row in given]
        joined = RewardResult(np.concatenate([s.scores for s in ones]), np.concatenate([s.valid for s in ones]), {}, [])
        checks.append(_same("does not depend on the batch", first, joined))
    return checks


def _same(name: str, a: RewardResult, b: RewardResult) -> Check:
    both = a.valid & b.valid
    gap = float(np.abs(a.scores[both] - b.scores[both]).max()) if both.any() else 0.0
    agree = bool((a.valid == b.valid).all())
    scale = max(1.0, float(np.abs(a.scores[both]).max())) if both.any() else 1.0
    return Check(name, agree and gap <= TOLERANCE * scale, f"largest difference {gap:.2g}")
