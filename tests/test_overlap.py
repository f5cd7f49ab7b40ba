"""Scoring while sampling: the same scores in the same order, begun early only where that is safe, and faster."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from tests import small
from unigrpo_cli import train
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardOutput, Sample
from unigrpo_cli.rewards.loaded import LoadedReward, RewardLimits
from unigrpo_cli.rewards.registry import Plugins, RewardEntry
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import RewardSpec

CONTEXT = RewardContext("cpu", 0, True, True)


class Judge:
    """Says the sample's number, after a while; notes the batches that it saw."""

    range = (0.0, 100.0)
    batch_size: int | None = None
    concurrency = 0
    wait_s = 0.0

    def __init__(self, _options: object):
        self.seen: list[list[str]] = []
        self.rested: list[str] = []

    def score(self, batch: RewardBatch) -> RewardOutput:
        self.seen.append(batch.ids)
        time.sleep(self.wait_s)
        numbers = [float(i) for i in batch.ids]
        return RewardOutput(numbers, components={"half": [n / 2 for n in numbers]}, info=[{"id": i} for i in batch.ids])

    def offload(self) -> None:
        self.rested.append("off")

    def reload(self) -> None:
        self.rested.append("on")


@contextmanager
def opened(policy: RewardLimits | None = None, **attributes: object) -> Iterator[tuple[Scorer, Judge]]:
    plugins = Plugins()
    plugins.rewards.add("judge", type("Judge", (Judge,), attributes))
    with Scorer([RewardSpec("judge", "judge", 1.0, {})], plugins, CONTEXT, policy or RewardLimits()) as rewards:
        yield rewards, rewards.rewards[0].reward


def samples(*ids: int) -> list[Sample]:
    return [Sample("p", np.zeros((2, 2, 3), np.uint8), id=str(i)) for i in ids]


ORDER = [str(i) for i in range(6)]


@pytest.mark.parametrize("overlap", ["auto", "all", "none"])
@pytest.mark.parametrize(
    "attributes", [{}, {"batch_size": 2}, {"concurrency": 4}, {"concurrency": 4, "scope": "group"}]
)
def test_scores_come_in_the_order_that_is_asked_for(overlap: str, attributes: dict) -> None:
    """Batches may be added in any order; scores, parts and remarks follow the ids."""
    with opened(**attributes) as (rewards, judge):
        scoring = rewards.start(step=3, overlap=overlap)
        for part in ((4, 5), (0, 1, 2), (3,)):
            scoring.add(samples(*part))
        scoring.submit(ORDER)
        scored = scoring.finish()["judge"]
        assert scored.scores.tolist() == list(range(6))
        assert scored.components["half"].tolist() == [i / 2 for i in range(6)]
        assert [row["id"] for row in scored.info] == ORDER
        early = attributes.get("scope") != "group" and (
            (overlap == "all" and "batch_size" in attributes) or (overlap != "none" and "concurrency" in attributes)
        )
        assert (judge.seen[0] == ["4", "5"]) is early


def test_what_wants_the_whole_rollout_gets_it_in_one_call() -> None:
    """A reward without a batch size may compare the members of a group."""
    with opened() as (rewards, judge):
        scoring = rewards.start(step=0, overlap="all")
        scoring.add(samples(1, 0))
        scoring.add(samples(2))
        scoring.submit(["0", "1", "2"])
        scoring.finish()
        assert judge.seen == [["0", "1", "2"]]


def test_waiting_is_hidden_behind_sampling() -> None:
    """Four batches, 50 ms each to sample and to judge: the judging of three is hidden."""

    def seconds(overlap: str) -> float:
        with opened(concurrency=1, batch_size=1, wait_s=0.05) as (rewards, _):
            began = time.perf_counter()
            scoring = rewards.start(step=0, overlap=overlap)
            for k in range(4):
                time.sleep(0.05)
                scoring.add(samples(k))
            scoring.submit(["0", "1", "2", "3"])
            scoring.finish()
            return time.perf_counter() - began

    assert seconds("none") > 0.39
    assert any(seconds("auto") < 0.35 for _ in range(5)), "a busy machine may need several tries"


@pytest.mark.parametrize("overlap", ["auto", "all"])
@pytest.mark.parametrize("scope", ["sample", "group"])
def test_judges_elsewhere_are_not_waited_for_when_all_is_there(scope: str, overlap: str) -> None:
    """Also those that want the whole rollout; only `finish` waits for them, so training can go on."""
    heard, asked = threading.Event(), threading.Event()

    class Elsewhere(Judge):
        concurrency = 1

        def score(self, batch: RewardBatch) -> list[float]:
            heard.set()
            assert asked.wait(5)
            return [1.0] * len(batch)

    plugins = Plugins()
    plugins.rewards.add("judge", type("Judge", (Elsewhere,), {"scope": scope}))
    with Scorer([RewardSpec("judge", "judge", 1.0, {})], plugins, CONTEXT) as rewards:
        scoring = rewards.start(step=0, overlap=overlap)
        scoring.add(samples(0, 1))
        scoring.submit(["1", "0"])
        asked.set()
        assert heard.wait(5)
        assert scoring.finish()["judge"].scores.tolist() == [1.0, 1.0]


def test_rewards_that_wait_elsewhere_wait_together() -> None:
    """Two judges that each wait until the other has been asked: one after the other they would wait forever."""
    meeting = threading.Barrier(2)

    class Meets(Judge):
        concurrency = 1

        def score(self, batch: RewardBatch) -> list[float]:
            meeting.wait(timeout=5)
            return [1.0] * len(batch)

    plugins = Plugins()
    plugins.rewards.add("a", Meets)
    plugins.rewards.add("b", type("Other", (Meets,), {}))
    choices = [RewardSpec(name, name, 1.0, {}) for name in "ab"]
    with Scorer(choices, plugins, CONTEXT) as rewards:
        assert rewards.score(samples(0))["b"].scores.tolist() == [1.0]


def test_a_failure_while_sampling_stops_the_step() -> None:
    class Fails(Judge):
        concurrency = 1

        def score(self, batch: RewardBatch) -> list[float]:
            raise ValueError("no judge")

    plugins = Plugins()
    plugins.rewards.add("judge", Fails)
    with Scorer([RewardSpec("judge", "judge", 1.0, {})], plugins, CONTEXT) as rewards:
        scoring = rewards.start(step=0)
        scoring.add(samples(0))
        scoring.submit(["0"])
        with pytest.raises(RewardError, match="ValueError: no judge"):
            scoring.finish()


def test_rewards_rest_between_scorings_where_that_is_asked_for() -> None:
    with opened(RewardLimits(offload=True)) as (rewards, judge):
        for _ in range(2):
            rewards.score(samples(0))
        assert judge.rested == ["off", "on", "off"]
        scoring = rewards.start(step=2)
        scoring.add(samples(0))
        scoring.add(samples(1))
        assert judge.rested == ["off", "on", "off"], "the device belongs to the rollout until all is drawn"
        scoring.submit(["0", "1"])
        assert judge.rested == ["off", "on", "off", "on", "off"]
    with opened() as (rewards, judge):
        rewards.score(samples(0))
        assert judge.rested == []


@pytest.mark.parametrize(
    ("options", "early"), [({}, False), ({"url": "http://127.0.0.1:1/v1"}, True), ({"model": "org/model"}, False)]
)
def test_a_judge_behind_an_endpoint_is_asked_early_and_one_that_computes_here_is_not(
    options: dict, early: bool
) -> None:
    from unigrpo_plugins.vlm import VlmOptions, VlmReward

    reward = VlmReward(VlmOptions(**options))
    entry = RewardEntry("vlm", "unigrpo-cli", "-", lambda: VlmReward)
    loaded = LoadedReward(RewardSpec("vlm", "vlm"), entry, reward, RewardLimits())
    assert loaded.begins_early("auto") is early


def test_workers_end_with_their_rewards() -> None:
    """No thread and no reward outlives its set."""
    before, alive = threading.active_count(), []
    for _ in range(3):
        with opened() as (rewards, judge):
            rewards.score(samples(0))
            alive.append(weakref.ref(judge))
        del rewards, judge
    for thread in threading.enumerate():
        if thread.name.startswith("reward judge"):
            thread.join(timeout=5)
    gc.collect()
    assert threading.active_count() <= before
    assert [ref() for ref in alive] == [None] * 3


def test_a_failing_farewell_does_not_keep_a_reward_open() -> None:
    from unigrpo_cli.rewards.hooks import hookimpl

    closed: list[str] = []

    class Rude:
        @hookimpl
        def unigrpo_reward_teardown(self) -> None:
            raise ValueError("no goodbye")

    plugins = Plugins()
    plugins.rewards.add("judge", type("Judge", (Judge,), {"teardown": lambda self: closed.append("judge")}))
    plugins.manager.register(Rude())
    with pytest.warns(UserWarning, match="no goodbye"):
        with Scorer([RewardSpec("judge", "judge", 1.0, {})], plugins, CONTEXT) as rewards:
            rewards.score(samples(0))
    assert closed == ["judge"]


def _stepped(
    judge: type, monkeypatch: pytest.MonkeyPatch, replaying: Callable[[], None], **policy: Any
) -> train.StepResult:
    """A small training step with that judge; `replaying` is called when the fixed scores are to be made."""
    fixed = train.score_old_and_reference

    def score_old_and_reference(*given: Any) -> Any:
        replaying()
        return fixed(*given)

    monkeypatch.setattr(train, "score_old_and_reference", score_old_and_reference)
    own = ("train.prompts_per_step=1", "train.group_size=2", "train.minibatches=1")
    config = load_config(overrides=[*small.SETTINGS, *own])
    plugins = Plugins()
    plugins.rewards.add("judge", judge)
    with Scorer([RewardSpec("judge", "judge", 1.0, {})], plugins, CONTEXT, RewardLimits(**policy)) as rewards:
        return train.training_step(small.state_of(config), [Prompt("a", "a red circle")], rewards, config)


class Brightness(Judge):
    range = (0.0, 255.0)

    def score(self, batch: RewardBatch) -> list[float]:
        return [float(pixels.mean()) for pixels in batch.pixels]


@pytest.mark.parametrize("scope", ["sample", "group"])
def test_a_training_step_replays_while_a_judge_works(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old and the reference policy's scores need no reward: the judge, once asked, answers beside them."""
    judging, replays = threading.Event(), threading.Event()
    calls: list[int] = []

    class Elsewhere(Brightness):
        concurrency = 1

        def score(self, batch: RewardBatch) -> list[float]:
            calls.append(len(batch))
            judging.set()
            assert replays.wait(10), "training waited for the judge"
            return super().score(batch)

    def replaying() -> None:
        assert judging.wait(10), "the judge was not asked"
        replays.set()

    done = _stepped(type("Judge", (Elsewhere,), {"scope": scope}), monkeypatch, replaying)
    assert done.skipped is None
    assert done.advantage_BS.abs().min() > 0
    assert sum(calls) == 2, "each sample is judged once"


def test_what_computes_here_has_left_the_device_before_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    story: list[str] = []

    class Here(Brightness):
        def score(self, batch: RewardBatch) -> list[float]:
            story.append("score")
            return super().score(batch)

        def offload(self) -> None:
            story.append("off")

    _stepped(Here, monkeypatch, lambda: story.append("replay"), offload=True)
    assert story == ["score", "off", "replay"]


def test_after_an_error_nobody_waits_for_what_has_not_begun() -> None:
    """Eight calls of a fifth of a second are queued when training fails; one of them has begun."""
    began = time.perf_counter()

    def fails() -> None:
        raise MemoryError

    with opened(concurrency=1, batch_size=1, wait_s=0.2) as (rewards, judge), suppress(MemoryError), rewards:
        scoring = rewards.start(step=0)
        scoring.add(samples(*range(8)))
        scoring.submit([str(k) for k in range(8)])
        while not judge.seen:
            time.sleep(0.01)
        fails()
    assert time.perf_counter() - began < 1  # all eight take 1.6
    assert len(judge.seen) == 1


def test_scores_must_be_asked_for() -> None:
    with opened() as (rewards, _):
        scoring = rewards.start(step=0)
        scoring.add(samples(0))
        with pytest.raises(ValueError, match="finish\\(\\) before submit"):
            scoring.finish()
