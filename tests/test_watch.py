"""The watch: statistics in closed form, every rule on rows that must and must not trigger it, and on real steps."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tools.toy_model import build_model
from unigrpo_cli import RewardContext, reward
from unigrpo_cli import rollout as rollout_module
from unigrpo_cli import train as train_module
from unigrpo_cli.algo.objective import Actions, Objective, Scores, text_term, unigrpo_loss
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Episode, Group, Prompt, TextActions
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import RewardResult, RewardSet
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.run.console import Display, TrainingView
from unigrpo_cli.run.monitor import RULES, Watch, parting, rollout_metrics, trend
from unigrpo_cli.train import training_step
from unigrpo_cli.training.metrics import memory, over_updates
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy
from unigrpo_cli.training.state import TrainState

Row = dict[str, float]


def test_a_trend_by_hand() -> None:
    """0, 1, 1, 2: slope .6, residuals -.1 .3 -.3 .1, so t = .6 / sqrt(.1 / 5)."""
    assert trend([0.0, 1.0, 1.0, 2.0]) == pytest.approx(0.6 / math.sqrt(0.2 / 2 / 5))
    assert trend([2.0, 1.0, 1.0, 0.0]) == pytest.approx(-0.6 / math.sqrt(0.2 / 2 / 5))


def test_straight_lines_flat_ones_and_gaps() -> None:
    assert trend([1.0, 2.0, 3.0]) == math.inf
    assert trend([3.0, 2.0, 1.0]) == -math.inf
    assert trend([1.0, 1.0, 1.0]) == 0.0
    assert trend([1.0, 2.0]) == 0.0
    assert trend([0.0, math.nan, 1.0, 1.0, 2.0]) == pytest.approx(trend([0.0, math.nan, 1.0, 1.0, 2.0, math.nan]))


def test_noise_alone_is_seldom_clear() -> None:
    draw = random.Random(0)
    clear = sum(abs(trend([draw.gauss(0, 1) for _ in range(20)])) > 3 for _ in range(2000))
    assert clear / 2000 < 0.015


def test_only_opposite_clear_trends_are_told() -> None:
    up, down = [0.1, 0.2, 0.4, 0.5, 0.6], [0.9, 0.8, 0.6, 0.5, 0.4]

    def history(trained: list[float], watched: list[float]) -> list[dict[str, float]]:
        return [{"a": x, "b": y} for x, y in zip(trained, watched, strict=True)]

    assert parting(history(up, down), ["a"], ["b"]) == ["b"]
    assert parting(history(up, up), ["a"], ["b"]) == []
    assert parting(history(down, down), ["a"], ["b"]) == []
    assert parting(history(up, [0.5, 0.4, 0.6, 0.5, 0.4]), ["a"], ["b"]) == []
    assert parting(history(up, down), ["a"], []) == []


# ----- statistics


def test_moments_of_the_ratio_and_sides_of_the_clip_by_hand() -> None:
    """Two episodes: log-ratios .3 -.3 with A = 1, and .3 (one token) with A = -1; clip .2.

    Above binds where A > 0, below where A < 0: of the three only the first is clipped.
    """
    log_prob = torch.tensor([[0.3, -0.3], [0.3, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    advantage = torch.tensor([1.0, -1.0])
    _, found = text_term(log_prob, torch.zeros(2, 2), mask, advantage, clip=0.2, episodes=2)
    assert found["text/log_ratio_mean"].item() == pytest.approx((0.0 + 0.3) / 2)
    assert found["text/log_ratio_square"].item() == pytest.approx(0.09)
    assert found["text/clip_fraction_above"].item() == pytest.approx((0.5 + 0) / 2)
    assert found["text/clip_fraction_below"] == 0
    _, flipped = text_term(log_prob, torch.zeros(2, 2), mask, -advantage, clip=0.2, episodes=2)
    assert flipped["text/clip_fraction_above"].item() == pytest.approx((0 + 1.0) / 2)
    assert flipped["text/clip_fraction_below"].item() == pytest.approx((0.5 + 0) / 2)
    for stats in (found, flipped):
        sides = stats["text/clip_fraction_above"] + stats["text/clip_fraction_below"]
        assert sides.item() == pytest.approx(stats["text/clip_fraction"].item())


def test_a_deviation_over_updates_is_of_all_their_actions() -> None:
    """Moments add up, deviations do not: log-ratios 0 0 and 1 3 have mean 1 and variance 10/4 - 1."""
    first = {"text/log_ratio_mean": 0.0, "text/log_ratio_square": 0.0, "image/velocity-mse": 1.0}
    second = {"text/log_ratio_mean": 2.0, "text/log_ratio_square": 5.0, "image/velocity-mse": 4.0}
    found = over_updates([first, second])
    assert found["text/log_ratio_std"] == pytest.approx(math.sqrt(1.5))
    assert found["image/first_velocity-mse"] == 1.0
    assert found["image/velocity-mse"] == 2.5
    assert over_updates([]) == {}


def test_statistics_of_micro_batches_add_up() -> None:
    draw = torch.Generator().manual_seed(0)
    new, old = (torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 4, generator=draw) < 0.7
    advantage = torch.randn(6, generator=draw, dtype=torch.float64)
    objective = Objective(1.0, 0.0, 0.2, 1e-6, 0.0, "ratio-norm", "none", 0.0)

    def means(rows: slice) -> dict[str, torch.Tensor]:
        scores = [Scores(x[rows], torch.zeros_like(x[rows]), ()) for x in (new, old)]
        return unigrpo_loss(Actions(mask[rows], ()), *scores, None, advantage[rows], objective, episodes=6).means

    whole, parts = means(slice(0, 6)), [means(slice(0, 1)), means(slice(1, 6))]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_members_that_equal_another_are_counted() -> None:
    """Groups a a b c and d d d e: 2 + 3 of 8, and none across groups."""

    def group(words: Sequence[int]) -> Group:
        prompt = Prompt("p", "p")
        texts = [TextActions(torch.tensor([w, 1]), torch.zeros(2), True, 1.0, (), (), "") for w in words]
        return Group(prompt, tuple(Episode(prompt, k, k, (t,)) for k, t in enumerate(texts)))

    scored = {
        "r": RewardResult(
            np.array([1.0, 3.0, math.nan, 1, 1, 1, 1, 1]), np.array([1, 1, 0, 0, 0, 0, 0, 0], bool), {}, []
        )
    }
    advantage = torch.tensor([1.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    found = rollout_metrics([group([1, 1, 2, 3]), group([4, 4, 4, 1])], scored, advantage)
    assert found["text/duplicates"] == 5 / 8
    assert "image/duplicates" not in found
    assert found["advantage/zero"] == 6 / 8
    assert found["advantage/zero_groups"] == 1 / 2
    assert found["reward/r/spread"] == 1.0


def test_memory_is_of_this_process() -> None:
    before = memory()
    held = torch.ones(2**26)  # a quarter of a GiB
    after = memory()
    assert after["memory/process"] - before["memory/process"] == pytest.approx(0.25, abs=0.1)
    assert after["memory/process_peak"] >= after["memory/process"] * 0.99
    assert held.sum() > 0


# ----- rules on rows made by hand

HEALTHY: Row = {
    **{"reward/a": 0.5, "reward/a/abstained": 0.0, "reward/a/spread": 0.2},
    **{"reward/b": 0.5, "reward/b/abstained": 0.0, "reward/b/spread": 0.2},
    **{"advantage/zero_groups": 0.1, "advantage/zero": 0.1},
    **{"text/length": 12.0, "text/truncated": 0.0, "text/duplicates": 0.5, "image/duplicates": 0.0},
    **{"text/drift_mean": 1e-7, "image/drift_mean": 1e-8, "text/entropy": 0.7},
    **{"text/loss": 0.0, "image/loss": 0.0, "text/approx_kl": 1e-4, "image/kl_old": 1e-8},
    **{"text/clip_fraction": 0.1, "text/clip_fraction_above": 0.05, "text/clip_fraction_below": 0.05},
    **{"image/clip_fraction": 0.1, "image/clip_fraction_above": 0.05, "image/clip_fraction_below": 0.05},
    **{"text/log_ratio_mean": -1e-4, "text/log_ratio_std": 0.02, "text/max_abs_log_ratio": 0.1},
    **{"image/log_ratio_mean": 1e-9, "image/log_ratio_std": 2e-6, "image/max_abs_log_ratio": 1e-5},
    **{"text/first_max_abs_log_ratio": 0.0, "image/first_max_abs_log_ratio": 0.0, "image/abs_log_ratio": 2e-6},
    **{"image/velocity-mse": 2e-4, "image/first_velocity-mse": 1e-4},
    **{"text/grad_norm": 0.05, "image/grad_norm": 1e-4, "grad_clipped": 0.0},
    **{"seconds/rollout": 1.0, "seconds/reward": 0.1, "seconds/old": 1.0, "seconds/update": 1.0},
    "memory/process": 1.0,
}


def _after(healthy: int, steps: int, **changed: float) -> list[Row]:
    """Healthy rows, then some in which something is otherwise; `__` stands for `/` in names."""
    return [{}] * healthy + [{k.replace("__", "/"): v for k, v in changed.items()}] * steps


def _course(name: str, values: Sequence[float], **and_: Sequence[float]) -> list[Row]:
    """One key's values, step by step, and others'."""
    columns = {name: values} | {k.replace("__", "/"): v for k, v in and_.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


WAVE = [0.01 * (-1) ** k for k in range(22)]
CASES: dict[str, tuple[list[Row], list[Row]]] = {
    "stale-old-policy": (_after(0, 1, image__first_max_abs_log_ratio=1e-9), _after(0, 3)),
    "rollout-drift": (_after(1, 2, text__drift_mean=0.03), _after(1, 9, text__drift_mean=0.01)),
    "clip-one-sided": (
        _after(0, 3, image__clip_fraction=0.2, image__clip_fraction_above=0.2, image__log_ratio_mean=5e-6),
        _after(0, 9, image__clip_fraction=0.2, image__clip_fraction_above=0.2),  # few good, many bad members
    ),
    "clip-high": (_after(0, 3, text__clip_fraction=0.6), _after(0, 9, text__clip_fraction=0.4)),
    "clip-never": (_after(0, 20, text__max_abs_log_ratio=1e-3), _after(0, 22, text__max_abs_log_ratio=0.03)),
    "ratio-far": (_after(0, 3, image__abs_log_ratio=1e-3), _after(0, 9, image__abs_log_ratio=2e-5)),
    "kl-large": (_after(0, 3, text__approx_kl=0.1), _after(0, 2, text__approx_kl=0.1)),
    "penalty-stuck": (
        [{"image/first_velocity-mse": 0.0}] * 3,
        [{"image/first_velocity-mse": 0.0, "image/grad_norm": 0.0}] * 9,  # nothing has moved
    ),
    "penalty-growing": (
        _course("image/velocity-mse", [1e-6 * 1.3**k for k in range(20)]),
        _course("image/velocity-mse", [1e-6 * (k + 1) ** 2 for k in range(40)]),
    ),
    "entropy-collapse": (_after(5, 3, text__entropy=0.05), _after(5, 9, text__entropy=0.1)),
    "entropy-explosion": (_after(5, 3, text__entropy=2.5), _after(5, 9, text__entropy=2.0)),
    "text-truncated": (_after(0, 3, text__truncated=0.9), _after(0, 9, text__truncated=0.4)),
    "text-shrinking": (_after(5, 3, text__length=3.0), _after(5, 9, text__length=5.0)),
    "identical-images": (_after(0, 3, image__duplicates=1.0), _after(0, 9, image__duplicates=0.05)),
    "identical-texts": (_after(0, 5, text__duplicates=1.0), _after(0, 9, text__duplicates=0.98)),
    "zero-spread": (_after(0, 3, advantage__zero_groups=0.7), _after(0, 9, advantage__zero_groups=0.4)),
    "constant-reward": (_after(0, 3, reward__a__spread=0.0), _after(0, 9, reward__b__spread=0.0)),
    "reward-falling": (
        _course("reward/a", [0.5 - 0.01 * k + w for k, w in enumerate(WAVE)]),
        _course("reward/a", [0.5 + w for w in WAVE]),
    ),
    "held-out-falling": (
        _course("reward/a", [0.1 * k for k in range(20)], reward__b=[-0.1 * k for k in range(20)]),
        _course("reward/a", WAVE, reward__b=[-0.1 * k for k in range(22)]),
    ),
    "abstentions": (_after(5, 3, reward__b__abstained=0.2), _after(0, 12, reward__b__abstained=0.2)),
    "gradient-lost": (
        _after(0, 3, text__grad_norm=0.0),
        _after(0, 9, text__grad_norm=0.0, advantage__zero=1.0),  # nothing to learn
    ),
    "gradient-vanished": (_after(5, 3, image__grad_norm=1e-8), _after(5, 9, image__grad_norm=1e-5)),
    "gradient-clipped": (_after(0, 10, grad_clipped=1.0), [{"grad_clipped": k % 4 and 1.0} for k in range(30)]),
    "gradient-spikes": (
        [*_after(12, 1, text__grad_norm=2.0), *_after(1, 1, text__grad_norm=2.0)],
        _after(12, 1, text__grad_norm=2.0),  # one outlier
    ),
    "phase-slower": (
        _after(5, 3, seconds__rollout=3.0),
        _after(5, 9, seconds__rollout=3.0, seconds__old=3.0, seconds__update=3.0),  # a shared machine
    ),
    "memory-growing": (
        _course("memory/process", [1 + 0.05 * k for k in range(20)]),
        _course("memory/process", [1 + 0.05 * k + 0.1 * (k % 2) for k in range(30)]),
    ),
}


def _watch(facts: dict[str, Any], *settings: str) -> Watch:
    return Watch(facts, load_config(overrides=list(settings)), {"a": 1.0, "b": 0.0}, {"a": 1, "b": 1})


def _names(rows: Sequence[Row], *settings: str) -> list[str]:
    """Rules that begin to last, in order, one for each saying."""
    watch, begun = _watch({}, *settings), []
    for row in rows:
        before = set(watch.lasting)
        said = watch.see(HEALTHY | row, None)
        new = [key.split()[0] for key in watch.lasting if key not in before]
        assert len(said) == len(new)
        begun += new
    return begun


def test_every_rule_has_a_case_and_a_place_in_the_documentation() -> None:
    assert [rule.name for rule in RULES] == list(CASES)
    text = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
    for rule in RULES:
        assert f"| `{rule.name}` |" in text


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_once_when_it_must_and_not_when_it_must_not(name: str) -> None:
    bad, good = CASES[name]
    assert _names(bad[:-1]).count(name) == 0, "one step earlier"
    assert _names(bad) == [name], "that rule and no other"
    assert _names([*bad, *[bad[-1]] * 3]).count(name) == 1
    assert name not in _names(good)


def test_a_healthy_run_is_left_in_peace() -> None:
    assert _names([{}] * 60) == []


def test_one_update_a_step_is_never_clipped_and_that_is_no_news() -> None:
    still = {"text/max_abs_log_ratio": 0.0, "image/max_abs_log_ratio": 0.0}
    assert "clip-never" in _names([still] * 25)
    assert _names([still] * 25, "train.minibatches=1") == []


def test_lower_is_better_turns_a_trend_around() -> None:
    rows = _course("reward/a", [0.5 - 0.01 * k + w for k, w in enumerate(WAVE)])
    watch = Watch({}, load_config(), {"a": -1.0}, {"a": -1})
    assert not any(watch.see(HEALTHY | row, None) for row in rows)
    rising = _course("reward/a", [0.5 + 0.01 * k + w for k, w in enumerate(WAVE)])
    watch = Watch({}, load_config(), {"a": -1.0}, {"a": -1})
    assert any("getting worse" in line for row in rising for line in watch.see(HEALTHY | row, None))


def test_limits_are_the_configurations() -> None:
    rows = _after(0, 3, text__truncated=0.9)
    assert _names(rows, "monitor.truncated=0.95") == []
    assert _names(_after(0, 3, text__drift_mean=0.03), "train.drift_limit=0.1") == []


def test_steps_that_do_not_tell_the_ratio_heal_nothing() -> None:
    """Most have no first ratio of their own: a fault stands until a step that has one says otherwise."""
    stale, silent, well = ([{"text/first_max_abs_log_ratio": value}] for value in (0.1, math.nan, 0.0))
    assert _names([*stale, *silent * 15, *stale]) == ["stale-old-policy"]
    assert _names([*stale, *silent * 6, *well, *silent * 6, *stale]) == ["stale-old-policy"] * 2


def test_said_again_only_after_five_quiet_steps() -> None:
    bad, quiet = _after(0, 3, text__truncated=0.9), [{}]
    assert _names([*bad, *quiet * 4, *bad]) == ["text-truncated"]
    assert _names([*bad, *quiet * 5, *bad]) == ["text-truncated"] * 2
    once = _after(0, 1, text__first_max_abs_log_ratio=0.1)
    assert _names([*once, *quiet * 4, *once]) == ["stale-old-policy"]
    assert _names([*once, *quiet * 5, *once]) == ["stale-old-policy"] * 2
    watch = _watch({})
    for row in [*bad, *quiet * 4]:
        watch.see(HEALTHY | row, None)
    assert watch.row(None) == {"warnings": ["text-truncated text"]}
    watch.see(HEALTHY, None)
    assert watch.row(None) == {"warnings": []}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_warns_as_an_uninterrupted_one(name: str) -> None:
    """Cut anywhere: what the watch knows goes through JSON and comes back."""
    rows = [*CASES[name][0], *[CASES[name][0][-1]] * 2, *[{}] * 6, *CASES[name][0]]
    whole = _watch({})
    wanted = [(whole.see(HEALTHY | row, None), whole.row(None)) for row in rows]
    for cut in range(1, len(rows), 3):
        watch = _watch({})
        found = [(watch.see(HEALTHY | row, None), watch.row(None)) for row in rows[:cut]]
        watch = _watch(json.loads(json.dumps(watch.facts, allow_nan=False)))
        found += [(watch.see(HEALTHY | row, None), watch.row(None)) for row in rows[cut:]]
        assert found == wanted


def test_a_reward_that_is_gone_is_forgotten() -> None:
    watch = _watch({})
    for row in _after(0, 3, reward__a__spread=0.0):
        watch.see(HEALTHY | row, None)
    assert watch.row(None) == {"warnings": ["constant-reward a"]}
    resumed = Watch(watch.facts, load_config(), {"b": 1.0}, {"b": 1})
    resumed.see(HEALTHY, None)
    assert resumed.row(None) == {"warnings": []}


def test_numbers_that_are_none_trigger_nothing() -> None:
    assert _names([dict.fromkeys(HEALTHY, math.nan)] * 25) == []
    watch = _watch({})
    assert [watch.see({}, None) for _ in range(25)] == [[]] * 25


def test_what_lasts_is_shown_live() -> None:
    view = TrainingView(Display(quiet=True), 10, 0, ["a"])
    view.update(1, HEALTHY, {"text-truncated text": "90% of texts are cut off"})
    shown = [str(part) for part in view.render().renderables]
    assert "text-truncated text: 90% of texts are cut off" in shown
    view.update(2, HEALTHY, {})
    assert not any("truncated" in str(part) for part in view.render().renderables)


# ----- rules on real steps of a tiny model

SETTINGS = [
    "sampling.max_new_tokens=6",
    "sampling.height=16",
    "sampling.width=16",
    "sampling.steps=4",
    "sampling.window_range=[0, 3]",
    "sampling.window_size=2",
    "train.prompts_per_step=2",
    "train.group_size=4",
    "train.minibatches=2",
    "train.micro_batch_size=3",  # of 4 episodes: statistics have to add up
    "train.lora_rank=2",
    "monitor.truncated=1",  # an untrained model seldom stops
]
PROMPTS = [Prompt("a", "a red circle"), Prompt("b", "two blue stars")]


@reward("bright", range=(0, 255))
def bright(pixels):
    """Mean brightness, which differs from picture to picture."""
    return [float(p.mean()) for p in pixels]


@reward("same", range=(0, 1))
def same(pixels):
    """A judge that does not look."""
    return [0.2] * len(pixels)


def _lasting(
    steps: int, *settings: str, of: str = "bright", spoil: Callable[[TrainState], object] = lambda state: None
) -> tuple[set[str], list[Row]]:
    """What the watch says of a few real steps, the machine's own affairs left out, and their metrics."""
    config = load_config(overrides=[*SETTINGS, *settings])
    policy = prepare_policy(build_model(seed=3, width=32, layers=2), config)
    state = TrainState(policy, make_optimizer(policy, config))
    spoil(state)
    plugins, seen, rows = Plugins(), set(), []
    plugins.rewards.add("bright", bright)
    plugins.rewards.add("same", same)
    with RewardSet(parse_rewards([of]), plugins, RewardContext("cpu", 0, True, True)) as rewards:
        watch = Watch(state.facts.setdefault("watch", {}), config, rewards.weights, {of: 1})
        for state.step in range(steps):
            done = training_step(state, PROMPTS, rewards, config)
            assert done.skipped is None
            watch.see(done.metrics, done.skipped)
            rows.append(done.metrics)
            seen |= {key for key in watch.lasting if not key.startswith(("phase-slower", "memory-growing"))}
    return seen, rows


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_sound_step_says_nothing(finetune: str) -> None:
    seen, rows = _lasting(5, f"train.finetune={finetune}")
    assert seen == set()
    last = rows[-1]
    assert last["text/log_ratio_std"] > 0
    assert last["image/log_ratio_std"] > 0
    assert last["image/duplicates"] == 0
    for name in ("image/kl_old", "image/velocity-mse", "image/drift_mean"):
        steps = [last[f"{name}/step_{k}"] for k in range(2)]
        assert sum(steps) / 2 == pytest.approx(last[name], rel=1e-5)


def test_a_stale_old_policy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*given, **named):
        shares = score_old_and_reference(*given, **named)
        return [[replace(m, old=replace(m.old, log_prob_BL=m.old.log_prob_BL + 1e-6)) for m in s] for s in shares]

    score_old_and_reference = train_module.score_old_and_reference
    monkeypatch.setattr(train_module, "score_old_and_reference", stale)
    assert _lasting(1)[0] == {"stale-old-policy text"}


def test_a_reference_that_moves_with_the_policy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters left on: the penalty of every first update is 0, that of the second is not."""

    @contextmanager
    def left_on(policy: MoTPolicy) -> Iterator[MoTPolicy]:
        yield policy

    monkeypatch.setattr(MoTPolicy, "reference", left_on)
    seen, rows = _lasting(3, "train.finetune=lora")
    assert "penalty-stuck image" in seen
    assert all(row["image/velocity-mse"] > 0 == row["image/first_velocity-mse"] for row in rows)


def test_one_noise_for_a_whole_group_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(seed: int, *key: object) -> int:
        return derive(seed, *(key[:1] if len(key) == 2 else key))  # (prompt, member): without the member

    monkeypatch.setattr(rollout_module, "derive", shared)
    seen, rows = _lasting(3)
    assert "identical-images image" in seen
    assert rows[0]["image/duplicates"] == rows[0]["text/duplicates"] == 1


def test_a_judge_that_does_not_look_is_told() -> None:
    assert {"constant-reward same", "zero-spread"} <= _lasting(3, of="same")[0]


def test_a_gradient_lost_in_one_expert_is_told() -> None:
    def freeze(state: TrainState) -> None:
        for parameter in state.policy.trainable()["text"]:
            parameter.requires_grad_(False)

    seen, _ = _lasting(3, spoil=freeze)
    assert seen == {"gradient-lost text"}


def test_watching_moves_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights to the bit with the statistics of ratios and KL taken out."""

    def weights() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        _lasting(2, spoil=lambda state: kept.extend(state.policy.network.parameters()))
        return [p.detach().clone() for p in kept]

    from unigrpo_cli.algo import objective

    watched = weights()
    monkeypatch.setattr(objective, "_ratio_statistics", lambda *_: {})
    monkeypatch.setattr(objective, "_by_step", lambda *_: {})
    monkeypatch.setattr(objective, "step_kls", lambda *_: torch.zeros(1, 1))
    monkeypatch.setattr(train_module.standing, "rollout_metrics", lambda *_: {})
    monkeypatch.setattr(train_module.standing, "memory", dict)
    unwatched = weights()
    assert all(torch.equal(a, b) for a, b in zip(watched, unwatched, strict=True))
