"""Models that several rewards use are loaded once, dropped with their last user, and moved together."""

from __future__ import annotations

import threading

from unigrpo_cli.rewards.batch import RewardContext
from unigrpo_cli.rewards.model_cache import Shared
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards


class Model:
    def __init__(self) -> None:
        self.device = "cuda"

    def to(self, device: str) -> None:
        self.device = device


def test_one_key_is_loaded_once_and_lives_as_long_as_its_users() -> None:
    shared = Shared()
    first, second = shared.get("a", Model), shared.get("a", Model)
    assert first is second
    assert shared.get("b", Model) is not first
    shared.release("a")
    assert shared.get("a", Model) is first
    for _ in range(2):
        shared.release("a")
    assert shared.get("a", Model) is not first
    assert shared.loads == {"a": 2, "b": 1}
    shared.release("nobody's")


def test_many_threads_load_once() -> None:
    shared, gate = Shared(), threading.Barrier(8)

    def ask() -> None:
        gate.wait()
        shared.get("a", Model)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert shared.loads["a"] == 1


def test_all_that_is_held_moves_together() -> None:
    shared = Shared()
    models = [shared.get(k, Model) for k in "ab"]
    shared.get("no model", lambda: 3)
    shared.move("cpu")
    assert [m.device for m in models] == ["cpu", "cpu"]


def test_two_clip_rewards_have_one_encoder() -> None:
    plugins = Plugins()
    plugins.load()
    context = RewardContext("cpu", 0, True, True)
    choices = parse_rewards(["a=clip", "b=clip@scale=percent", "c=clip@precision=bf16"])
    with Scorer(choices, plugins, context) as rewards:
        a, b, c = (r.reward for r in rewards.rewards)
        assert a.encoder is b.encoder
        assert c.encoder is not a.encoder
    assert list(context.shared.loads.values()) == [1, 1]
    assert not context.shared._held
