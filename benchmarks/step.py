"""A default training step of the embedded model: its phases, its operators, and a reward that waits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, record_function

import unigrpo_cli.train as algorithm
from benchmarks.cases import Cases, Comparison
from benchmarks.report import Goal, Row
from unigrpo_cli.config import Config, load_config
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.parallel.workers import in_turn
from unigrpo_cli.rewards.batch import RewardBatch
from unigrpo_cli.rewards.loaded import LoadedReward
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import PendingScores
from unigrpo_cli.rewards.spec import RewardSpec
from unigrpo_cli.run.setup import load_policy, open_rewards, reward_choices
from unigrpo_cli.suites import training_prompts
from unigrpo_cli.train import training_step
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.schedule import prompts_for
from unigrpo_cli.training.state import TrainState

STEP = "embedded: training step"
OPERATORS = "Operators of a training step of the embedded model, those above 2 % of its time"
WHOLE = "whole step"
CALLS = {
    "rollout": (algorithm, "rollout"),
    "reward": (PendingScores, "submit"),  # runs local rewards; `finish` waits for remote ones
    "old": (algorithm, "score_old_and_reference"),
    "update": (algorithm, "update"),
}
"""The phases of `training_step`, each by the one call that it is."""
LEAST_SHARE = 0.02
NETWORK, HEAD, BACKWARD, OPTIMIZER, REWARD, REST = "network", "head", "backward", "optimizer", "reward", "rest"
BETWEEN = "Python, between operators"
MOVES = (
    "copy",
    "cat",
    "index",
    "slice",
    "fill",
    "zero",
    "clone",
    "gather",
    "scatter",
    "repeat",
    "empty",
    "select",
    "stack",
)
"""Parts of the names of operators that only move numbers: no arithmetic wherever they are."""


def waiting_part(rows: int) -> str:
    return f"embedded: a reward that waits, batches of {rows}"


def rows(cases: Cases) -> list[Row]:
    found = [*(Row(STEP, name, "s") for name in (*CALLS, WHOLE)), Row(STEP, "model arithmetic", "%")]
    for part in map(waiting_part, cases.waiting_rows):
        found += [Row(part, "waiting in all", "s"), Row(part, "sampling", "s")]
        found.append(Row(part, "hidden behind sampling", "%"))
        found.append(Row(part, "hidden", "%", Goal(70, at_most=False)))
    return found


def settings(bench: Comparison, **more: Any) -> Config:
    """The embedded model's own settings. Threads are the command's."""
    named = bench.cases.embedded | {"threads": torch.get_num_threads()} | more
    return load_config(named={name.replace("__", "."): value for name, value in named.items()})


def prepared(config: Config) -> TrainState:
    policy = prepare_policy(load_policy(config.model, None, config), config)
    state = TrainState(policy, make_optimizer(policy, config))
    state.step = 1  # of those that replay old scores where they must: every sixteenth, from 0, replays all
    return state


def measure_step(bench: Comparison) -> None:
    """Phases, medians of up to five steps after one to warm up; then the operators of one more."""
    config = settings(bench)
    state, prompts = prepared(config), training_prompts(config.prompts)
    plugins = Plugins()
    plugins.load(None, None)
    found: list[dict[str, float]] = []
    with open_rewards(reward_choices(config), plugins, config, embedded=True) as rewards:

        def run() -> None:
            training_step(state, prompts_for(prompts, config, state.step), rewards, config)

        def watched() -> None:
            seconds: dict[str, float] = {}
            with ExitStack() as stack:
                for owner, name in CALLS.values():
                    stack.enter_context(bench.clock.watching(owner, name, seconds))
                whole_s = bench.clock.once(run)
            found.append({phase: seconds[name] for phase, (_, name) in CALLS.items()} | {WHOLE: whole_s})

        bench.clock.repeated(watched, bench.cases.share_s)
        middle = {name: statistics.median(step[name] for step in found[1:]) for name in (*CALLS, WHOLE)}
        for name in CALLS:
            bench.report.add(STEP, name, middle[name], f"{middle[name] / middle[WHOLE]:.0%} of the step")
        episodes = config.train.prompts_per_step * config.train.group_size
        bench.report.add(STEP, WHOLE, middle[WHOLE], f"{episodes} episodes, {len(found) - 1} steps")
        profile(bench, run)


# ----- operators


@contextmanager
def marked(owner: Any, name: str, mark: Callable[..., str]) -> Iterator[None]:
    """Calls of `owner.name` as a range in a profile, of the name that `mark` makes of what they are given."""
    own: Callable[..., Any] = getattr(owner, name)

    def call(*given: Any, **named: Any) -> Any:
        with record_function(mark(*given)):
            return own(*given, **named)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, own)


def profile(bench: Comparison, run: Callable[[], object]) -> None:
    """Where a call's time goes: operators by who called them, and what no operator accounts for."""
    with ExitStack() as stack:
        stack.enter_context(marked(MoT, "forward", lambda *_: NETWORK))
        stack.enter_context(marked(MoTPolicy, "logits", lambda *_: HEAD))
        stack.enter_context(marked(LoadedReward, "collect", lambda loaded, *_: f"{REWARD} {loaded.alias}"))
        seen = stack.enter_context(torch.profiler.profile(activities=[ProfilerActivity.CPU]))
        began = time.perf_counter()
        with in_turn():
            run()
        whole_us = 1e6 * (time.perf_counter() - began)
    spent: dict[tuple[str, str], list[float]] = {}
    here = thread_of(NETWORK, seen.events())
    for event in seen.events():
        if not event.is_user_annotation and event.self_cpu_time_total > 0:
            place = place_of(event) if event.thread == here else REWARD
            own = spent.setdefault((event.name, place), [0.0, 0])
            own[0] += event.self_cpu_time_total
            own[1] += 1
    ranges: dict[str, float] = {}
    for event in seen.events():
        if event.is_user_annotation:
            ranges[event.name] = ranges.get(event.name, 0.0) + event.cpu_time_total
    waited = {name: us for name, us in ranges.items() if name.startswith(f"{REWARD} ")}
    inside = ranges[NETWORK] + ranges[HEAD]
    between = {NETWORK: inside, REST: whole_us - inside - sum(waited.values())}
    for (_, place), (us, _) in spent.items():
        if place != REWARD:
            between[NETWORK if place in (NETWORK, HEAD) else REST] -= us
    arithmetic = sum(us for (name, place), (us, _) in spent.items() if is_arithmetic(name, place))
    bench.report.add(STEP, "model arithmetic", 100 * arithmetic / whole_us, "of a step that is profiled, so slower")
    lines = [
        (us, name, place, str(int(n)), is_arithmetic(name, place))
        for (name, place), (us, n) in spent.items()
        if place != REWARD  # of rewards counts what they are waited for
    ]
    lines += [(us, BETWEEN, place, "", False) for place, us in between.items()]
    lines += [(us, "all of it", name, "1", False) for name, us in waited.items()]
    for us, name, place, calls, counts in sorted(lines, reverse=True):
        if us / whole_us > LEAST_SHARE:
            line = {"operator": f"`{name}`", "called by": place, "share, %": 100 * us / whole_us, "calls": calls}
            bench.report.add_line(OPERATORS, line | {"model arithmetic": "yes" if counts else "no"})


def thread_of(mark: str, events: Sequence[Any]) -> int:
    """The thread that a range was in; rewards are called in threads of their own."""
    return next(event.thread for event in events if event.name == mark)


def place_of(event: Any) -> str:
    """Which part of the step an operator belongs to: the nearest range around it that says so."""
    above = event
    while above is not None:
        if above.name in (NETWORK, HEAD):
            return above.name
        if above.name.startswith("autograd::engine"):
            return BACKWARD
        if above.name.startswith("Optimizer."):
            return OPTIMIZER
        above = above.cpu_parent
    return REST


def is_arithmetic(name: str, place: str) -> bool:
    """Products, attention, norms, rotations and activations of the network, forward and backward."""
    return place in (NETWORK, HEAD, BACKWARD) and not any(move in name for move in MOVES)


# ----- a reward that waits


class Waiting:
    """Stands for a judge elsewhere, which takes a while for each sample. Notes when it was busy."""

    range = (0.0, 1.0)
    concurrency = 1
    seconds_each = 0.0

    def __init__(self, _options: object):
        self.calls: list[tuple[float, float]] = []

    def score(self, batch: RewardBatch) -> list[float]:
        began = time.perf_counter()
        time.sleep(self.seconds_each * len(batch))
        self.calls.append((began, time.perf_counter()))
        return [float(p.mean()) / 255 for p in batch.pixels]


def measure_waiting(bench: Comparison, rows: int) -> None:
    """How much of a judge's time lies before training waits for it, by the wall; it takes as long as sampling."""
    rates = {"train__lr_text": 0.0, "train__lr_image": 0.0}  # the same episodes every time
    config = settings(bench, sampling__batch_size=rows, **rates)
    state, prompts = prepared(config), training_prompts(config.prompts)
    plugins = Plugins()
    plugins.rewards.add("waiting", Waiting)
    episodes = config.train.prompts_per_step * config.train.group_size
    found: dict[str, list[float]] = {}
    with open_rewards([RewardSpec("waiting", "waiting", 1.0, {})], plugins, config, embedded=True) as rewards:
        judge = rewards.rewards[0].reward

        def run() -> None:
            judge.calls.clear()
            own = moments_of(lambda: training_step(state, prompts_for(prompts, config, state.step), rewards, config))
            busy_s = sum(end - began for began, end in judge.calls)

            def before(moment: float) -> float:
                """The share of the judge's time that lies before it."""
                return sum(min(end, moment) - min(began, moment) for began, end in judge.calls) / busy_s

            found.setdefault("sampling", []).append(own.sampled - own.began)
            found.setdefault("hidden by sampling", []).append(before(own.sampled))
            found.setdefault("hidden", []).append(before(own.idle))

        for _ in range(4):
            run()
        alone_s = statistics.median(found["sampling"][1:])
        judge.seconds_each = alone_s / episodes
        found.clear()
        bench.clock.repeated(run, bench.cases.share_s)
    part, middle = waiting_part(rows), {name: statistics.median(values) for name, values in found.items()}
    bench.report.add(part, "waiting in all", alone_s, f"{episodes} samples, as long as sampling them alone")
    note = f"in {-(-episodes // rows)} batches, the last two in halves, {len(found['hidden'])} steps"
    bench.report.add(part, "sampling", middle["sampling"], note)
    bench.report.add(part, "hidden behind sampling", 100 * middle["hidden by sampling"])
    bench.report.add(part, "hidden", 100 * middle["hidden"], "behind sampling and the replay of what stays fixed")


@dataclass(frozen=True)
class Moments:
    """When a training step began, had sampled, and had nothing to do but wait for rewards; seconds of the wall."""

    began: float
    sampled: float
    idle: float


def moments_of(step: Callable[[], object]) -> Moments:
    found = [time.perf_counter()]
    submit, finish = PendingScores.submit, PendingScores.finish

    def submitted(scoring: PendingScores, *given: Any, **named: Any) -> None:
        found.append(time.perf_counter())
        submit(scoring, *given, **named)

    def finished(scoring: PendingScores) -> Any:
        found.append(time.perf_counter())
        return finish(scoring)

    with patch.object(PendingScores, "submit", submitted), patch.object(PendingScores, "finish", finished):
        step()
    return Moments(*found)
