"""Sampling a group in one batch against one episode at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

import unigrpo_cli.rollout as stages
from benchmarks import plain
from benchmarks.cases import Cases, Comparison
from benchmarks.clock import ratio
from benchmarks.report import RELATIVE, Goal, Row
from benchmarks.shapes import Size, prompt_text, random_policy
from unigrpo_cli.algo.flow import Window
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Episode, Prompt, TextActions
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rollout import Sampling
from unigrpo_cli.run.setup import load_policy
from unigrpo_cli.suites import training_prompts

EMBEDDED, LARGE = "embedded", "100M"
MODELS = (EMBEDDED, LARGE)
SEED, WINDOW = 0, Window(1, 3)
LATENTS = {EMBEDDED: 1e-4, LARGE: 1e-5}
"""The embedded model predicts data, and v = (x - data) / t divides its rounding by small t."""


def sampling_part(model: str, cases: Cases) -> str:
    return f"{model}: a group of {cases.compared}"


def rows(cases: Cases) -> list[Row]:
    found = []
    for model in MODELS:
        part = sampling_part(model, cases)
        found += [
            Row(part, "one at a time", "s/sample"),
            Row(part, "in one batch", "s/sample"),
            Row(part, "times faster", "x", Goal(3, at_most=False)),
            Row(part, "thinking, times faster", "x"),
            Row(part, "painting, times faster", "x"),
            Row(part, "latents differ", RELATIVE),
        ]
    return found


# ----- what is drawn


@cache
def large_policy(size: Size) -> MoTPolicy:
    return random_policy(size, torch.device("cpu"), torch.float32)


def asked(bench: Comparison, model: str) -> tuple[MoTPolicy, Prompt, Sampling]:
    """A model, its prompt, and how it is sampled: in batches of the whole group."""
    if model == EMBEDDED:
        config = load_config(named=bench.cases.embedded)
        policy = load_policy(config.model, None, config)
        return policy, training_prompts(config.prompts)[0], replace(train_sampling(config), batch_size=2**10)
    size = bench.cases.large
    return large_policy(size), Prompt("benchmark", prompt_text(size)), sampling_of(size)


def sampling_of(size: Size) -> Sampling:
    return Sampling(
        think=True,
        max_new_tokens=size.thinking,
        temperature=1.0,
        height=size.pixels,
        width=size.pixels,
        steps=size.calls,
        shift=3.0,
        sde="flow",
        noise_level=0.8,
        batch_size=2**10,
    )


def brief(sampling: Sampling) -> Sampling:
    """Enough to warm up."""
    return replace(sampling, max_new_tokens=3, steps=5)


# ----- one batch against one at a time


def measure_sampling(bench: Comparison, model: str) -> None:
    """The same episodes both ways, whole and by stage."""
    policy, prompt, sampling = asked(bench, model)
    part, members, clock = sampling_part(model, bench.cases), bench.cases.compared, bench.clock
    drawn: dict[str, Sequence[Episode]] = {}

    def ours(how: Sampling = sampling) -> None:
        (group,) = stages.rollout(policy, [prompt], members, how, WINDOW, SEED)
        drawn["ours"] = group.episodes

    def one_by_one(how: Sampling = sampling) -> None:
        drawn["plain"] = plain.rollout(policy, prompt, members, how, WINDOW, SEED)

    ours(brief(sampling))
    one_by_one(brief(sampling))
    own_s: dict[str, float] = {}
    plain_s: dict[str, float] = {}
    with ExitStack() as stack:
        for owner, names, seconds in (
            (stages, ("sample_text", "sample_image"), own_s),
            (plain, ("write", "paint"), plain_s),
        ):
            for name in names:
                stack.enter_context(clock.watching(owner, name, seconds))
        times = clock.in_turn({"ours": ours, "plain": one_by_one}, bench.cases.share_s, warm=True)

    texts = [s for e in drawn["plain"] for s in e.segments if isinstance(s, TextActions)]
    length = statistics.mean(len(text.ids) for text in texts)
    note = f"{length:.0f} words on average, {len(times['ours'])} rounds"
    bench.report.add(part, "one at a time", statistics.median(times["plain"]) / members, note)
    bench.report.add(part, "in one batch", statistics.median(times["ours"]) / members)
    bench.report.add(part, "times faster", ratio(times, "plain", "ours"))
    bench.report.add(part, "thinking, times faster", plain_s["write"] / own_s["sample_text"])
    bench.report.add(part, "painting, times faster", plain_s["paint"] / own_s["sample_image"])
    bench.agree(part, "latents differ", difference_of(drawn["ours"], drawn["plain"]), LATENTS[model])


def difference_of(ours: Sequence[Episode], plainly: Sequence[Episode]) -> float:
    """Largest difference of final latents, relative to the largest latent."""
    largest = 0.0
    for a, b in zip(ours, plainly, strict=True):
        for mine, other in zip(a.segments, b.segments, strict=True):
            if isinstance(mine, TextActions):
                assert torch.equal(mine.ids, other.ids), f"member {a.member} wrote other words one at a time"
        largest = max(largest, relative(a.images[-1].latent, b.images[-1].latent))
    return largest


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number there."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
