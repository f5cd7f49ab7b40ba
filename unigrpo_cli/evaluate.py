"""Evaluation: fixed prompts, fixed noise, Euler steps, the same rewards; intervals and paired comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from unigrpo_cli.algo.flow import Window
from unigrpo_cli.algo.guidance import Guidance
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Episode, GivenImage, Group, ImageActions, Prompt, TextActions, flatten
from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.io.limits import parse_json, read_text
from unigrpo_cli.models.policy import Policy
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.parallel.workers import worker_count
from unigrpo_cli.rewards.batch import RewardResult, Sample, rounds_of
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rollout import Sampling, rollout
from unigrpo_cli.suites import task_of

NO_NOISE = Window(0, 0)
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over images, its 95 % bootstrap interval over prompts, the mean of its tasks' means, its n."""

    mean: float
    ci95: tuple[float, float]
    task_mean: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of one policy on one suite.

    `values` holds the raw scores by reward, one per episode in the order of `prompt_ids`, NaN where a reward
    abstained; `texts` are the units that its intervals resample (`resampled`). `noise` is everything besides the policy
    that decides the samples (seed, samples, sampling); evaluations with equal noise are paired by `compare`.
    """

    scores: dict[str, Estimate]
    per_task: dict[str, dict[str, float]]
    values: dict[str, NDArray[np.float64]]
    prompt_ids: tuple[str, ...]
    texts: tuple[str, ...]
    noise: dict[str, Any]

    @property
    def n(self) -> int:
        return len(self.prompt_ids)

    def means(self) -> dict[str, float]:
        return {name: estimate.mean for name, estimate in self.scores.items()}

    def report(self, values: bool = False) -> dict[str, Any]:
        """As JSON: scores with intervals, per-task means, n; with `values` also the raw values for `load_report`."""
        scores = {name: asdict(estimate) for name, estimate in self.scores.items()}
        found: dict[str, Any] = {"scores": scores, "per_task": self.per_task, "n": self.n}
        if values:
            raw = {k: [None if x != x else x for x in v.tolist()] for k, v in self.values.items()}
            found |= {"values": raw, "prompt_ids": self.prompt_ids, "texts": self.texts, "noise": self.noise}
        return found


def eval_sampling(config: Config) -> Sampling:
    """The run's sampling with evaluation's steps, temperature and guidance."""
    e = config.eval
    guidance = guidance_of(config, e.guidance_text, e.guidance_image)
    return replace(train_sampling(config), steps=e.steps, temperature=e.temperature, guidance=guidance)


def guidance_of(config: Config, text: float, image: float) -> Guidance:
    """Guidance of these scales, with the one interval and renormalisation that training and evaluation share."""
    e = config.eval
    return Guidance(text, image, *e.guidance_interval, e.guidance_renorm, e.guidance_renorm_min)


def train_sampling(config: Config) -> Sampling:
    """Sampling settings of training, as `rollout` takes them."""
    s = config.sampling
    return Sampling(
        think=s.think,
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        height=s.height,
        width=s.width,
        steps=s.steps,
        shift=s.shift,
        sde=s.sde,
        noise_level=s.noise_level,
        batch_size=s.batch_size,
        guidance=guidance_of(config, s.guidance_text, s.guidance_image),
        compiled=s.compile,
        program=s.program,
        rounds=s.rounds,
        stop_phrase=s.stop_phrase,
        round_max_new_tokens=s.round_max_new_tokens,
        show_images=s.show_images,
    )


def samples_of(groups: Sequence[Group], step: int = 0) -> list[Sample]:
    """Episodes as inputs of rewards."""
    return [sample_of(e, step) for e in flatten(groups)]


def sample_of(episode: Episode, step: int) -> Sample:
    """One episode as the input of rewards; its id is unique within a step."""
    acted = [s for s in episode.segments if isinstance(s, TextActions | ImageActions)]
    before = takewhile(lambda s: not isinstance(s, TextActions | ImageActions), episode.segments)
    given = [s.pixels.numpy() for s in before if isinstance(s, GivenImage)]
    return Sample(
        prompt=episode.prompt.text,
        pixels=episode.pixels.numpy(),
        reasoning=episode.reasoning,
        metadata=episode.prompt.metadata,
        id=f"{episode.prompt.id}/{episode.member}",
        group_id=f"{step}/{episode.prompt.id}",
        source=given[-1] if given else None,
        segments=tuple(s.text if isinstance(s, TextActions) else s.pixels.numpy() for s in acted),
    )


def limited(prompts: Sequence[Prompt], per_task: int) -> list[Prompt]:
    """The first `per_task` prompts of each task; all when it is 0."""
    if not per_task:
        return list(prompts)
    seen: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        task = task_of(prompt)
        seen[task] = seen.get(task, 0) + 1
        if seen[task] <= per_task:
            kept.append(prompt)
    return kept


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Scorer,
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    ranks: Ranks = ALONE,
    strict: bool = False,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_groups: Callable[[list[Group], dict[str, RewardResult]], None] = lambda groups, scored: None,
) -> Evaluation:
    """Sample `samples` images per prompt by Euler steps and score them.

    The noise depends on (seed, prompt, sample) alone, so policies are compared on equal noise. Ranks divide the
    prompts; each returns the whole evaluation.

    Args:
        strict: refuse samples that are not finite; training leaves them to its update guard.
        on_rows: called with the number of finished episodes of this rank, for a progress bar.
        on_groups: called with each batch of episodes of this rank and its scores.
    """
    values: dict[str, list[NDArray[np.float64]]] = {r.alias: [] for r in rewards.active("eval")}
    by_segment: dict[str, list[dict[str, float]]] = {name: [] for name in values}
    if sampling.batch_size > samples:  # whole prompts, so that batches do not depend on the number of workers
        sampling = replace(sampling, batch_size=sampling.batch_size // samples * samples)
    chunk = max(1, sampling.batch_size // samples) * worker_count(len(prompts), policy.device)
    share = ranks.stretch(prompts)
    for k in range(ranks.most(-(-len(share) // chunk))):
        with ranks.together():
            part = share[k * chunk : (k + 1) * chunk]
            groups = rollout(policy, part, samples, sampling, NO_NOISE, seed, on_rows)
            if strict:
                refuse_non_finite(flatten(groups))
        drawn = samples_of(groups)
        begin = sum(ranks.gather(len(drawn))[: ranks.rank])
        everyone = rewards.score(drawn, split="eval", ranks=ranks, every_picture=True)
        scored = {name: result.select(range(begin, begin + len(drawn))) for name, result in everyone.items()}
        for name, own in scored.items():
            values[name].append(own.scores)
            by_segment[name] += own.segments
        on_groups(groups, scored)
    tasks = np.array([task_of(p) for p in prompts for _ in range(samples)])
    texts = [resampled(p) for p in prompts for _ in range(samples)]
    ids = [p.id for p in prompts for _ in range(samples)]
    told = ranks.gather([{n: np.concatenate([*parts, []]).tolist() for n, parts in values.items()}, by_segment])
    joined: dict[str, NDArray[np.float64]] = {}
    for name in values:
        joined[name] = np.concatenate([np.asarray(own[name]) for own, _ in told])
        joined |= {f"{name}/{part}": v for part, v in rounds_of([row for _, own in told for row in own[name]]).items()}
    noise = {"seed": seed, "samples": samples} | asdict(sampling)
    noise["round_max_new_tokens"] = list(sampling.round_max_new_tokens)  # as a report on disk has it
    for name in ("batch_size", "compiled", "tapered", "sde", "noise_level"):  # without effect on Euler steps
        noise.pop(name)
    return summarise(joined, tasks, ids, texts, noise)


def refuse_non_finite(episodes: Sequence[Episode]) -> None:
    """Refuse episodes whose logits or latents are not finite: their scores would mean nothing."""
    for episode in episodes:
        for segment in episode.segments:
            if isinstance(segment, TextActions):
                refuse_non_finite_actions("logits", segment.log_prob, episode.prompt)
            elif isinstance(segment, ImageActions):
                refuse_non_finite_actions("latents", segment.latent, episode.prompt)


def refuse_non_finite_actions(kind: str, values: Tensor, prompt: Prompt) -> None:
    """The same for the actions of one segment."""
    if not values.isfinite().all():
        raise WeightsError(
            f"the model's {kind} are NaN or infinite for {prompt.text!r}: its weights are broken, or its dtype is too "
            "narrow; try --set dtype=float32, or another checkpoint"
        )


def summarise(
    values: dict[str, NDArray[np.float64]],
    tasks: NDArray,
    ids: Sequence[str],
    texts: Sequence[str],
    noise: dict[str, Any],
) -> Evaluation:
    """An `Evaluation` from raw scores, one per episode."""
    per_task: dict[str, dict[str, float]] = {}
    scores = {}
    for name, own in values.items():
        by_task = {task: own[(tasks == task) & np.isfinite(own)] for task in dict.fromkeys(tasks)}
        means = {task: float(x.mean()) for task, x in by_task.items() if len(x)}
        for task, mean in means.items():
            per_task.setdefault(str(task), {})[name] = mean
        valid = np.isfinite(own)
        if valid.any():
            task_mean = float(np.mean(list(means.values())))
            interval = bootstrap(own, texts, noise["seed"])
            scores[name] = Estimate(float(own[valid].mean()), interval, task_mean, int(valid.sum()))
    return Evaluation(scores, per_task, values, tuple(ids), tuple(texts), noise)


def resampled(prompt: Prompt) -> str:
    """What a bootstrap resamples: a text with all that was painted from it, or a picture with its instruction.

    Prompts that bring pictures may share a text, as all restorations do, and are independent nevertheless.
    """
    return prompt.text if prompt.image is None else prompt.id


def bootstrap(values: NDArray[np.float64], texts: Sequence[str], seed: int) -> tuple[float, float]:
    """95 % interval of the mean, resampling prompts: images of one prompt are not independent of each other."""
    names, index = np.unique(np.asarray(texts), return_inverse=True)
    valid = np.isfinite(values)
    sums = np.bincount(index[valid], values[valid], len(names))
    counts = np.bincount(index[valid], minlength=len(names))
    draws = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    totals = counts[draws].sum(axis=1)
    means = sums[draws].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare(first: Evaluation, second: Evaluation, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Paired differences second - first by reward, on the same prompts and noise, with 95 % intervals.

    Raises:
        ValueError: when the two were not made on the same prompts and noise.
    """
    if not paired(first, second):
        raise ValueError("evaluations of different prompts or noise cannot be compared pair by pair")
    differences = {}
    for name in (n for n in first.values if n in second.values):
        delta = second.values[name] - first.values[name]
        if np.isfinite(delta).any():
            low, high = bootstrap(delta, first.texts, seed)
            differences[name] = {"mean": float(np.nanmean(delta)), "ci95": [low, high]}
    return differences


def paired(first: Evaluation, second: Evaluation) -> bool:
    """Whether two evaluations have the same prompts and noise."""
    return first.prompt_ids == second.prompt_ids and first.noise == second.noise


def load_report(path: Path) -> Evaluation:
    try:
        return _read_report(parse_json(read_text(path)))
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not an evaluation written by this version ({type(error).__name__})") from error


def _read_report(data: dict[str, Any]) -> Evaluation:
    values = {k: np.array([np.nan if x is None else x for x in v], np.float64) for k, v in data["values"].items()}
    scores = TypeAdapter(dict[str, Estimate]).validate_python(data["scores"])
    if {len(own) for own in (*values.values(), data["texts"])} - {len(data["prompt_ids"])}:
        raise ValueError("a column has another number of episodes")
    return Evaluation(scores, data["per_task"], values, tuple(data["prompt_ids"]), tuple(data["texts"]), data["noise"])
