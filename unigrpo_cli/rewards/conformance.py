"""The promises of a reward, as checks that run on any plugin."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardOutput, RewardResult, Sample
from unigrpo_cli.rewards.function import MARK
from unigrpo_cli.rewards.loaded import LoadedReward, RewardLimits
from unigrpo_cli.rewards.registry import Plugins, RewardEntry, message_of
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import RewardSpec, parse_rewards
from unigrpo_cli.toy.edits import edit_target, scene_of, target_picture, train_edits
from unigrpo_cli.toy.prompts import corrupt_plan, draw_scene, held_out_prompts
from unigrpo_cli.toy.reflect import reflection_text
from unigrpo_cli.toy.render import render
from unigrpo_cli.toy.world import THINK_CLOSE, THINK_OPEN, plan_text

TOLERANCE = 1e-4
"""Relative: a network's scores move by this much with the batch they are in."""


@dataclass(frozen=True)
class Check:
    """One promise, whether it is kept, and what was seen."""

    name: str
    ok: bool
    seen: str


def example_samples(count: int = 8, seed: int = 0) -> list[Sample]:
    """Pictures of the shapes world, all painted as asked, with prompts, metadata and plans."""
    rng = np.random.default_rng(seed)
    suite = held_out_prompts(per_tag=count)
    rows = suite[:: len(suite) // count][:count]
    samples = []
    for k, row in enumerate(rows):
        scene = draw_scene(row, rng)
        samples.append(Sample(row["prompt"], render(scene, rng), plan_text(scene), row, f"{k}", f"{k // 2}"))
    return samples


def contrasting_samples(seed: int = 0) -> list[Sample]:
    """Eight samples that deserve different scores: for each of four prompts one as asked, and one with a fault.

    The faults: one thing wrong in the picture; nothing painted; a plan that does not answer the prompt; noise in place
    of a picture and words in place of a plan.
    """
    rng = np.random.default_rng(seed)
    rows = {row["tag"]: row for row in held_out_prompts(per_tag=1)}
    samples: list[Sample] = []
    for k, tag in enumerate(("counting", "color_attr", "position", "two_object")):
        row = rows[tag]
        scene = draw_scene(row, rng)
        wrong = corrupt_plan(scene, row, rng)
        picture, plan = render(scene, rng), plan_text(scene)
        noise = rng.integers(0, 256, picture.shape, dtype=np.uint8)
        fault = [
            (render(wrong, rng), plan),
            (render((), rng), f"{THINK_OPEN} {THINK_CLOSE}"),
            (picture, plan_text(wrong)),
            (noise, "a picture with some things in it, " * 40),
        ][k]
        for pixels, text in ((picture, plan), fault):
            samples.append(Sample(row["prompt"], pixels, text, row, str(len(samples)), str(k)))
    return samples


def several_round_samples(seed: int = 0) -> list[Sample]:
    """The contrasting samples as episodes of two rounds with a source: a first picture with a fault, and words on both.

    Half of the second words are not true of the first picture, and ask for a wrong one.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for k, last in enumerate(contrasting_samples(seed)):
        scene = draw_scene(dict(last.metadata), rng)
        shown = corrupt_plan(scene, dict(last.metadata), rng)
        second = reflection_text(shown, scene) if k % 4 < 2 else reflection_text(scene, shown)
        first = reflection_text(shown, scene)
        segments = (first, render(shown, rng), second, last.pixels)
        words = "\n\n".join(part for part in segments if isinstance(part, str))
        samples.append(replace(last, reasoning=words, source=render(shown, rng), segments=segments))
    return samples


def edit_samples(seed: int = 0) -> list[Sample]:
    """Four edits, each carried out and left undone, with plans; the first undone one is noise."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for k, row in enumerate(train_edits(4, seed)):
        source = row.pop("image")
        noise = rng.integers(0, 256, source.shape, dtype=np.uint8)
        text = reflection_text(scene_of(row["source"]), edit_target(row))
        for pixels in (target_picture(row), source if k else noise):
            samples.append(Sample(row["prompt"], pixels, text, row, str(len(samples)), str(k), source))
    return samples


def fitting_samples(needs: Collection[str], segments: Collection[str]) -> list[Sample]:
    if "metadata:target" in needs:
        return edit_samples()
    return (
        several_round_samples() if segments or {"texts", "pictures", "source"} & set(needs) else contrasting_samples()
    )


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

    Args:
        reward: a name as in `--reward`, a reward class, or a function decorated with `@reward`.
        plugin: the file or module with the name, if it is not installed.
        options: as `@key=value` gives them.
        samples: what to score, `fitting_samples` by default.
        max_seconds: limit of the time per sample; None for no limit.
    """
    if plugins is None:
        plugins = Plugins()
        plugins.load([plugin] if plugin else None)
    spec = _spec_of(reward, options or {}, plugins)
    context = RewardContext(device="cpu", seed=0, embedded=True, offline=False)
    scorer = Scorer([spec], plugins, context, RewardLimits(max_abstain=1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with scorer:
            loaded = scorer.rewards[0]
            fitting = fitting_samples(getattr(loaded.reward, "needs", ()), loaded.segments)
            checks = _checks(scorer, fitting if samples is None else list(samples), max_seconds)
    failed = [str(w.message) for w in caught if "failed in teardown" in str(w.message)]
    for other in [w for w in caught if str(w.message) not in failed]:
        warnings.warn(other.message, other.category, stacklevel=2)
    return [*checks, Check("can be torn down", not failed, failed[0] if failed else "done")]


def _spec_of(reward: Any, options: Mapping[str, Any], plugins: Plugins) -> RewardSpec:
    """The reward to check; an object is added to the plugins under its own name."""
    if isinstance(reward, str):
        (spec,) = parse_rewards([reward], {})
        spec.options.update(options)
        return spec
    made = getattr(reward, MARK, reward)
    name = str(getattr(made, "name", None) or getattr(made, "__name__", type(made).__name__))
    origin = str(getattr(made, "__module__", "-"))
    plugins.rewards.add_entry(RewardEntry(name, origin, "-", load=lambda: reward))
    return RewardSpec(name, f"{origin}/{name}", 1.0, dict(options))


def _checks(scorer: Scorer, samples: Sequence[Sample], max_seconds: float | None) -> list[Check]:
    """All checks of a reward that is set up."""
    loaded = scorer.rewards[0]

    def score(rows: Sequence[Sample]) -> RewardResult:
        return scorer.score(rows)[loaded.alias]

    try:
        scorer.check_needs([s.metadata for s in samples], has_reasoning=True, has_source=True, split="train")
        began = time.perf_counter()
        first = score(samples)
        seconds = (time.perf_counter() - began) / max(1, len(samples))
    except RewardError as error:
        return [Check("answers with one number per sample", False, str(error))]
    checks = [Check("answers with one number per sample", True, f"{len(samples)} scores")]
    checks += _of_answer(first, loaded, seconds, max_seconds)
    if loaded.segments:
        checks.append(_segments(first, loaded))
    try:
        checks += _repeated(score, first, samples, alone=loaded.scores_alone)
    except RewardError as error:
        checks.append(Check("answers again", False, str(error)))
    if not loaded.worker.hung:
        checks += [_unreadable(loaded, samples[0]), _empty(loaded)] if samples else [_empty(loaded)]
    return checks


def _of_answer(first: RewardResult, loaded: LoadedReward, seconds: float, max_seconds: float | None) -> list[Check]:
    abstained, count = int((~first.valid).sum()), len(first.valid)
    low, high = loaded.range
    known = first.scores[first.valid]
    inside = bool(((known >= low - 1e-6) & (known <= high + 1e-6)).all())
    limit = "" if max_seconds is None else f", limit {1000 * max_seconds:g} ms"
    spread = f"{known.min():.4g} to {known.max():.4g}" if len(known) else "nothing"
    return [
        Check("has an opinion", abstained < count, f"{abstained} of {count} abstained"),
        _distinct(first, loaded),
        Check("stays in its declared range", inside, f"{spread} in [{low:g}, {high:g}]"),
        Check(
            "is fast enough",
            max_seconds is None or seconds <= max_seconds,
            f"{1000 * seconds:.1f} ms per sample{limit}",
        ),
    ]


def _segments(first: RewardResult, loaded: LoadedReward) -> Check:
    """A reward that declares segments scores some of them. Undeclared ones are refused when the answer is read."""
    known = [x for row in first.segments for x in row.values() if x == x]
    seen = f"{len(known)} scores of {', '.join(sorted(loaded.segments))} segments in {len(first.segments)} samples"
    return Check("scores the segments that it declares", bool(known), seen)


def _distinct(first: RewardResult, loaded: LoadedReward) -> Check:
    """Different samples have different scores. One score for all is how a caught exception looks."""
    name = "tells samples apart"
    known = first.scores[first.valid]
    if len(known) < 2:
        return Check(name, True, "fewer than two opinions")
    if (known == known[0]).all():
        return Check(
            name, False, f"{known[0]:.4g} for all {len(known)} samples; if it fails inside, let the exception out"
        )
    size = getattr(loaded.reward, "batch_size", None) or len(first.scores)
    calls = [first.scores[at : at + size] for at in range(0, len(first.scores), size)]
    full = [own[np.isfinite(own)] for own in calls if np.isfinite(own).sum() > 1]
    if full and all((own == own[0]).all() for own in full):
        return Check(name, False, f"one score for each call of {size} samples; score every sample by itself")
    return Check(name, True, f"{len(np.unique(known))} different scores")


def _repeated(
    score: Callable[[Sequence[Sample]], RewardResult], first: RewardResult, samples: Sequence[Sample], *, alone: bool
) -> list[Check]:
    """Checks of further answers against the first: the same samples again, in another order, one by one.

    A reward with `scope = "group"` compares samples, so it may score a sample differently when it is alone.
    """
    checks = [_same("gives the same twice", first, score(samples))]
    order = list(range(len(samples)))
    random.Random(0).shuffle(order)
    back = np.argsort(order).tolist()
    checks.append(_same("does not depend on the order", first, score([samples[k] for k in order]).select(back)))
    if alone:
        ones = RewardResult.join([score([sample]) for sample in samples])
        checks.append(_same("does not depend on the batch", first, ones))
    return checks


def _same(name: str, a: RewardResult, b: RewardResult) -> Check:
    named = [list(row) for row in a.segments] == [list(row) for row in b.segments]
    x, y = (np.array([*r.scores, *(x for row in r.segments for x in row.values())]) for r in (a, b))
    if not named:
        return Check(name, False, "other segments are scored")
    both = np.isfinite(x) & np.isfinite(y)
    gap = float(np.abs(x[both] - y[both]).max()) if both.any() else 0.0
    agree = bool((np.isfinite(x) == np.isfinite(y)).all())
    scale = max(1.0, float(np.abs(x[both]).max())) if both.any() else 1.0
    return Check(name, agree and gap <= TOLERANCE * scale, f"largest difference {gap:.2g}")


def _empty(loaded: LoadedReward) -> Check:
    """No samples, no scores. A run never asks this, so an exception is as good as an empty answer."""
    name = "handles an empty batch"
    answer = loaded.raw_score(RewardBatch(()))
    if isinstance(answer, BaseException):
        return Check(name, True, f"refuses: {type(answer).__name__}")
    scores = answer.scores if isinstance(answer, RewardOutput) else answer
    if not hasattr(scores, "__len__"):
        return Check(name, False, f"one {type(scores).__name__} for no samples")
    return Check(name, len(scores) == 0, f"{len(scores)} scores for no samples")


def _unreadable(loaded: LoadedReward, sample: Sample) -> Check:
    """A picture that cannot be read has no score. A number would be a swallowed exception."""
    name = "does not score an unreadable picture"
    batch = _UnreadablePicture((replace(sample),))
    answer = loaded.raw_score(batch)
    if not batch.refused:
        return Check(name, True, "does not look at pictures")
    if isinstance(answer, BaseException):
        return Check(name, True, f"raises: {message_of(answer)}")
    scores = answer.scores if isinstance(answer, RewardOutput) else answer
    try:
        (score,) = scores
        value = math.nan if score is None else float(score)
    except (TypeError, ValueError):
        return Check(name, True, "gives no number")
    if not math.isfinite(value):
        return Check(name, True, "abstains")
    return Check(name, False, f"gives {value:.4g} after an exception; let it out, or abstain with None")


class _UnreadableImage(Image.Image):
    """A picture like a truncated file: it has a size, and any use of its pixels raises."""

    def __init__(self, size: tuple[int, int], refuse: Callable[[], NoReturn]):
        super().__init__()
        self._mode, self._size, self._refuse = "RGB", size, refuse

    def load(self) -> Any:
        self._refuse()

    def copy(self) -> Any:
        self._refuse()

    @property
    def __array_interface__(self) -> Any:
        self._refuse()


class _UnreadablePicture(RewardBatch):
    """One sample whose picture cannot be read."""

    @property
    def refused(self) -> bool:
        return self.__dict__.get("_refused", False)

    def _refuse(self) -> NoReturn:
        self.__dict__["_refused"] = True
        raise OSError("image file is truncated")

    @cached_property
    def images(self) -> list[Image.Image]:
        height, width = self.samples[0].pixels.shape[:2]
        return [_UnreadableImage((width, height), self._refuse)]

    @property
    def pixels(self) -> Any:
        self._refuse()

    @cached_property
    def tensors(self) -> Any:
        self._refuse()
