"""What every reward promises, as checks that can be run on any plugin."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardContext, Sample
from unigrpo_cli.rewards.grammar import parse_rewards
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scoring import Policy, RewardSet, Scored
from unigrpo_cli.shapes.prompts import draw_scene, held_out_prompts
from unigrpo_cli.shapes.render import render
from unigrpo_cli.shapes.world import plan_text

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
    text: str,
    *,
    plugin: str | None = None,
    samples: Sequence[Sample] | None = None,
    plugins: Plugins | None = None,
) -> list[Check]:
    """Run all checks on a reward given as in `--reward`.

    A reward with `scope = "group"` compares the samples of a group, so it is excused from being the same alone.

    Raises:
        RewardError: when it cannot be found or set up.
    """
    if plugins is None:
        plugins = Plugins()
        plugins.load([plugin] if plugin else None)
    given = list(samples if samples is not None else example_samples())
    context = RewardContext(device="cpu", seed=0, embedded=True, offline=False)
    checks: list[Check] = []
    with RewardSet(parse_rewards([text]), plugins, context, Policy(max_abstain=1.0)) as rewards:
        opened = rewards.rewards[0]
        alias = opened.alias

        def score(rows: Sequence[Sample]) -> Scored:
            return rewards.score(rows)[alias]

        try:
            rewards.check_needs([s.metadata for s in given], has_reasoning=True, split="train")
            began = time.perf_counter()
            first = score(given)
            seconds = time.perf_counter() - began
        except RewardError as error:
            return [Check("answers with one number per sample", False, str(error))]
        checks.append(Check("answers with one number per sample", True, f"{len(given)} scores"))
        checks += _about(first, opened.range, seconds)
        try:
            checks += _again(score, first, given, alone=getattr(opened.reward, "scope", "sample") == "sample")
        except RewardError as error:
            checks.append(Check("answers again", False, str(error)))
    checks.append(Check("can be torn down", True, "done"))
    return checks


def _about(first: Scored, limits: tuple[float, float], seconds: float) -> list[Check]:
    """Checks of one answer."""
    abstained, count = int((~first.valid).sum()), len(first.valid)
    low, high = limits
    seen = first.scores[first.valid]
    inside = bool(((seen >= low - 1e-6) & (seen <= high + 1e-6)).all())
    spread = f"{seen.min():.4g} to {seen.max():.4g}" if len(seen) else "nothing"
    return [
        Check("has an opinion", abstained < count, f"{abstained} of {count} abstained"),
        Check("stays in its declared range", inside, f"{spread} in [{low:g}, {high:g}]"),
        Check("is timed", True, f"{1000 * seconds / count:.1f} ms per sample"),
    ]


def _again(
    score: Callable[[Sequence[Sample]], Scored], first: Scored, given: Sequence[Sample], *, alone: bool
) -> list[Check]:
    """Checks of further answers against the first: the same samples again, in another order, one by one."""
    checks = [_same("gives the same twice", first, score(given))]
    order = list(range(len(given)))
    random.Random(0).shuffle(order)
    turned, back = score([given[k] for k in order]), np.argsort(order)
    straight = Scored(turned.scores[back], turned.valid[back], {}, [])
    checks.append(_same("does not depend on the order", first, straight))
    if alone:
        ones = [score([row]) for row in given]
        joined = Scored(np.concatenate([s.scores for s in ones]), np.concatenate([s.valid for s in ones]), {}, [])
        checks.append(_same("does not depend on the batch", first, joined))
    return checks


def _same(name: str, a: Scored, b: Scored) -> Check:
    both = a.valid & b.valid
    gap = float(np.abs(a.scores[both] - b.scores[both]).max()) if both.any() else 0.0
    agree = bool((a.valid == b.valid).all())
    scale = max(1.0, float(np.abs(a.scores[both]).max())) if both.any() else 1.0
    return Check(name, agree and gap <= TOLERANCE * scale, f"largest difference {gap:.2g}")
