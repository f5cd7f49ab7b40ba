"""The monitor: statistics in closed form, every rule on rows that must and must not trigger it, and on real steps."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from tests import small
from tests.small import terminal_loss
from unigrpo_cli import RewardContext, reward
from unigrpo_cli import rollout as rollout_module
from unigrpo_cli import train as train_module
from unigrpo_cli.algo import objective
from unigrpo_cli.algo.objective import Actions, Objective, Scores, text_term
from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Episode, Group, Prompt, TextActions
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_cli.run.console import Display, TrainingView
from unigrpo_cli.run.first_ratio import ratio_limits
from unigrpo_cli.run.monitor import RULES, Monitor, reward_hacking, trend
from unigrpo_cli.train import training_step
from unigrpo_cli.training import metrics
from unigrpo_cli.training.metrics import memory, over_updates, rollout_metrics
from unigrpo_cli.training.state import MonitorRecord, TrainState

Row = dict[str, float]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 1.0, 1.0, 2.0], 0.6 / math.sqrt(0.1 / 5)),  # by hand: slope .6, residuals -.1 .3 -.3 .1
        ([2.0, 1.0, 1.0, 0.0], -0.6 / math.sqrt(0.1 / 5)),
        ([0.0, math.nan, 1.0, 2.0], math.sqrt(27)),  # x = 0 2 3: slope 9/14, residuals' squares 1/14
        ([1.0, 2.0, 3.0], math.inf),
        ([3.0, 2.0, 1.0], -math.inf),
        ([1.0, 1.0, 1.0], 0.0),
        ([1.0, 2.0], 0.0),
    ],
)
def test_a_trend_by_hand(values: list[float], wanted: float) -> None:
    assert trend(values) == pytest.approx(wanted)


def test_noise_alone_is_seldom_clear() -> None:
    draw = random.Random(0)
    clear = sum(abs(trend([draw.gauss(0, 1) for _ in range(20)])) > 3 for _ in range(2000))
    assert clear / 2000 < 0.015


UP, DOWN, FLAT = [0.1, 0.2, 0.4, 0.5, 0.6], [0.9, 0.8, 0.6, 0.5, 0.4], [0.5, 0.4, 0.6, 0.5, 0.4]


@pytest.mark.parametrize(
    ("trained", "held_out", "wanted"),
    [(UP, DOWN, ["b"]), (UP, UP, []), (DOWN, DOWN, []), (UP, FLAT, [])],
)
def test_reward_hacking_needs_opposite_clear_trends(
    trained: list[float], held_out: list[float], wanted: list[str]
) -> None:
    rows = [{"a": x, "b": y} for x, y in zip(trained, held_out, strict=True)]
    assert reward_hacking(rows, ["a"], ["b"]) == wanted
    assert reward_hacking(rows, ["a"], []) == []


# ----- statistics


def test_moments_of_the_ratio_and_sides_of_the_clip_by_hand() -> None:
    """Two episodes: log-ratios .3 -.3 with A = 1, and .3 (one token) with A = -1; clip .2.

    Above binds where A > 0, below where A < 0: of the three only the first is clipped.
    """
    log_prob = torch.tensor([[0.3, -0.3], [0.3, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    advantage = torch.tensor([1.0, -1.0])
    _, found = text_term(log_prob, torch.zeros(2, 2), mask, advantage[:, None], clip=0.2, episodes=2)
    assert found["text/log_ratio_mean"].item() == pytest.approx((0.0 + 0.3) / 2)
    assert found["text/log_ratio_square"].item() == pytest.approx(0.09)
    assert found["text/clip_fraction_above"].item() == pytest.approx((0.5 + 0) / 2)
    assert found["text/clip_fraction_below"] == 0
    _, flipped = text_term(log_prob, torch.zeros(2, 2), mask, -advantage[:, None], clip=0.2, episodes=2)
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
        return terminal_loss(
            Actions(mask[rows], torch.zeros(mask[rows].shape, dtype=torch.long), ()),
            *scores,
            None,
            advantage[rows],
            objective,
            episodes=6,
        ).means

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
    found = rollout_metrics([group([1, 1, 2, 3]), group([4, 4, 4, 1])], scored, advantage[:, None], torch.ones(8, 1))
    assert found["text/duplicates"] == 5 / 8
    assert "image/duplicates" not in found
    assert found["advantage/zero"] == 6 / 8
    assert found["advantage/zero_groups"] == 1 / 2
    assert found["reward/r/spread"] == 1.0


def test_memory_is_of_this_process() -> None:
    before = memory(torch.device("cpu"))
    held = torch.ones(2**26)  # a quarter of a GiB
    after = memory(torch.device("cpu"))
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
    **{"text/clip_fraction": 0.1, "image/clip_fraction": 0.1, "image/first_velocity-mse": 1e-4},
    **{"text/first_max_abs_log_ratio": 0.0, "image/first_max_abs_log_ratio": 0.0},
    **{"text/grad_norm": 0.05, "image/grad_norm": 1e-4},
}


def _after(healthy: int, steps: int, **changed: float) -> list[Row]:
    """Healthy rows, then some in which something is otherwise; `__` stands for `/` in names."""
    return [{}] * healthy + [{k.replace("__", "/"): v for k, v in changed.items()}] * steps


def _columns(name: str, values: Sequence[float], **and_: Sequence[float]) -> list[Row]:
    """One key's values, step by step, and others'."""
    columns = {name: values} | {k.replace("__", "/"): v for k, v in and_.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


WAVE = [0.01 * (-1) ** k for k in range(22)]
CASES: dict[str, tuple[list[Row], list[Row]]] = {
    "first-ratio": (_after(0, 1, image__first_max_abs_log_ratio=1e-9), _after(0, 3)),
    "rollout-drift": (_after(1, 2, text__drift_mean=0.03), _after(1, 9, text__drift_mean=0.01)),
    "clip-high": (_after(0, 3, text__clip_fraction=0.6), _after(0, 9, text__clip_fraction=0.4)),
    "kl-large": (_after(0, 3, text__approx_kl=0.1), _after(0, 2, text__approx_kl=0.1)),
    "entropy-collapse": (_after(5, 3, text__entropy=0.05), _after(5, 9, text__entropy=0.1)),
    "entropy-explosion": (_after(5, 3, text__entropy=2.5), _after(5, 9, text__entropy=2.0)),
    "text-truncated": (_after(0, 3, text__truncated=0.9), _after(0, 9, text__truncated=0.4)),
    "text-shrinking": (_after(5, 3, text__length=3.0), _after(5, 9, text__length=5.0)),
    "identical-images": (_after(0, 3, image__duplicates=1.0), _after(0, 9, image__duplicates=0.05)),
    "zero-spread": (_after(0, 3, advantage__zero_groups=0.7), _after(0, 9, advantage__zero_groups=0.4)),
    "constant-reward": (_after(0, 3, reward__a__spread=0.0), _after(0, 9, reward__b__spread=0.0)),
    "reward-falling": (
        _columns("reward/a", [0.5 - 0.01 * k + w for k, w in enumerate(WAVE)]),
        _columns("reward/a", [0.5 + w for w in WAVE]),
    ),
    "held-out-falling": (
        _columns("reward/a", [0.1 * k for k in range(20)], reward__b=[-0.1 * k for k in range(20)]),
        _columns("reward/a", WAVE, reward__b=[-0.1 * k for k in range(22)]),
    ),
    "abstentions": (_after(5, 3, reward__b__abstained=0.2), _after(0, 12, reward__b__abstained=0.2)),
}


def _monitor(record: MonitorRecord | None = None, *settings: str, limit: float = 0.0) -> Monitor:
    limits = {"text": limit, "image": limit}
    config = load_config(overrides=list(settings))
    return Monitor(record or MonitorRecord(), config, {"a": 1.0, "b": 0.0}, {"a": 1, "b": 1}, limits)


def _names(rows: Sequence[Row], *settings: str, limit: float = 0.0) -> list[str]:
    """Rules that begin to warn, in order; one warning each."""
    monitor, begun = _monitor(None, *settings, limit=limit), []
    for row in rows:
        before = set(monitor.lasting)
        warnings = monitor.check(HEALTHY | row, None)
        new = [key.split()[0] for key in monitor.lasting if key not in before]
        assert len(warnings) == len(new)
        begun += new
    return begun


def test_every_rule_has_a_case() -> None:
    assert [rule.name for rule in RULES] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_warns_once_when_it_must_and_not_when_it_must_not(name: str) -> None:
    bad, good = CASES[name]
    assert _names(bad[:-1]).count(name) == 0, "one step earlier"
    assert _names(bad) == [name], "that rule and no other"
    assert _names([*bad, *[bad[-1]] * 3]).count(name) == 1
    assert name not in _names(good)


@pytest.mark.parametrize("rows", [[{}] * 60, [dict.fromkeys(HEALTHY, math.nan)] * 25], ids=["healthy", "not measured"])
def test_no_warning_without_a_reason(rows: list[Row]) -> None:
    assert _names(rows) == []


@pytest.mark.parametrize(
    ("rows", "setting"),
    [
        (_after(0, 3, text__truncated=0.9), "monitor.truncated=0.95"),
        (_after(0, 3, text__drift_mean=0.03), "train.drift_limit=0.1"),
    ],
)
def test_limits_come_from_the_settings(rows: list[Row], setting: str) -> None:
    assert len(_names(rows)) == 1
    assert _names(rows, setting) == []


def test_the_first_ratio_may_round_off_the_cpu() -> None:
    rows = [{"text/first_max_abs_log_ratio": 1e-6}]
    assert _names(rows, limit=0.0) == ["first-ratio"]
    assert _names(rows, limit=1e-5) == []


@pytest.mark.parametrize(("sign", "slope"), [(1, -0.01), (-1, 0.01)])
def test_a_reward_where_lower_is_better_falls_when_it_rises(sign: int, slope: float) -> None:
    for direction, warned in ((1, True), (-1, False)):
        monitor = Monitor(MonitorRecord(), load_config(), {"a": float(sign)}, {"a": sign}, {"text": 0.0, "image": 0.0})
        rows = [{"reward/a": 0.5 + direction * slope * k + w} for k, w in enumerate(WAVE)]
        lines = [line for row in rows for line in monitor.check(HEALTHY | row, None)]
        assert any("getting worse" in line for line in lines) == warned


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("text-truncated", _after(0, 3, text__truncated=0.9)),
        ("first-ratio", _after(0, 1, text__first_max_abs_log_ratio=0.1)),
    ],
)
def test_a_warning_repeats_only_after_five_quiet_steps(name: str, bad: list[Row]) -> None:
    quiet = [{"text/first_max_abs_log_ratio": 0.0}]
    assert _names([*bad, *quiet * 4, *bad]) == [name]
    assert _names([*bad, *quiet * 5, *bad]) == [name] * 2
    monitor = _monitor()
    for row in [*bad, *quiet * 4]:
        monitor.check(HEALTHY | row, None)
    assert monitor.row(None) == {"warnings": [f"{name} text"]}
    monitor.check(HEALTHY, None)
    assert monitor.row(None) == {"warnings": []}


def test_steps_without_a_first_ratio_do_not_end_its_warning() -> None:
    """Only a run's first step measures it."""
    bad, silent, good = ([{"text/first_max_abs_log_ratio": value}] for value in (0.1, math.nan, 0.0))
    assert _names([*bad, *silent * 15, *bad]) == ["first-ratio"]
    assert _names([*bad, *silent * 6, *good, *silent * 6, *bad]) == ["first-ratio"] * 2


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_warns_as_an_uninterrupted_one(name: str) -> None:
    """Interrupted anywhere: the monitor's memory survives JSON."""
    rows = [*CASES[name][0], *[CASES[name][0][-1]] * 2, *[{}] * 6, *CASES[name][0]]
    whole = _monitor()
    wanted = [(whole.check(HEALTHY | row, None), whole.row(None)) for row in rows]
    for cut in range(1, len(rows), 3):
        monitor = _monitor()
        found = [(monitor.check(HEALTHY | row, None), monitor.row(None)) for row in rows[:cut]]
        monitor = _monitor(MonitorRecord(**json.loads(json.dumps(asdict(monitor.record), allow_nan=False))))
        found += [(monitor.check(HEALTHY | row, None), monitor.row(None)) for row in rows[cut:]]
        assert found == wanted


def test_a_removed_reward_is_forgotten() -> None:
    monitor = _monitor()
    for row in _after(0, 3, reward__a__spread=0.0):
        monitor.check(HEALTHY | row, None)
    assert monitor.row(None) == {"warnings": ["constant-reward a"]}
    resumed = Monitor(monitor.record, load_config(), {"b": 1.0}, {"b": 1}, {"text": 0.0, "image": 0.0})
    resumed.check(HEALTHY, None)
    assert resumed.row(None) == {"warnings": []}


def test_current_warnings_are_shown_live() -> None:
    view = TrainingView(Display(quiet=True), 10, 0, ["a"])
    view.update(1, HEALTHY, {"text-truncated text": "90% of texts are truncated"})
    shown = [str(part) for part in view.render().renderables]
    assert "text-truncated text: 90% of texts are truncated" in shown
    view.update(2, HEALTHY, {})
    assert not any("truncated" in str(part) for part in view.render().renderables)


# ----- rules on real steps of a tiny model

SETTINGS = [
    *small.SETTINGS,
    "train.group_size=4",
    "train.minibatches=2",
    "train.micro_batch_size=3",  # of 4 episodes: statistics have to add up
    "train.lora_rank=2",
    "monitor.truncated=1",  # an untrained model seldom stops
]
PROMPTS = small.PROMPTS


@reward("same", range=(0, 1))
def same(pixels):
    """A judge that ignores the picture."""
    return [0.2] * len(pixels)


def _warned(
    steps: int, *settings: str, of: str = "bright", spoil: Callable[[TrainState], object] = lambda state: None
) -> tuple[set[str], list[Row]]:
    """The warnings of a few real steps, and their metrics."""
    config = load_config(overrides=[*SETTINGS, *settings])
    state = small.state_of(config)
    spoil(state)
    plugins, seen, rows = Plugins(), set(), []
    plugins.rewards.add("bright", small.bright)
    plugins.rewards.add("same", same)
    with Scorer(parse_rewards([of]), plugins, RewardContext("cpu", 0, True, True)) as rewards:
        limits = ratio_limits(state.policy, config.objective)
        monitor = Monitor(state.record.monitor, config, rewards.weights, {of: 1}, limits)
        for state.step in range(steps):
            done = training_step(state, PROMPTS, rewards, config, rescore=True)
            assert done.skipped is None
            monitor.check(done.metrics, done.skipped)
            rows.append(done.metrics)
            seen |= set(monitor.lasting)
    return seen, rows


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_sound_steps_give_no_warning(finetune: str) -> None:
    seen, rows = _warned(5, f"train.finetune={finetune}")
    assert seen == set()
    last = rows[-1]
    assert last["text/log_ratio_std"] > 0
    assert last["image/log_ratio_std"] > 0
    assert last["image/duplicates"] == 0
    for name in ("image/kl_old", "image/velocity-mse", "image/drift_mean"):
        steps = [last[f"{name}/step_{k}"] for k in range(2)]
        assert sum(steps) / 2 == pytest.approx(last[name], rel=1e-5)


def _stale_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*given, **named):
        shares = score_old_and_reference(*given, **named)
        return [[replace(m, old=replace(m.old, log_prob_BL=m.old.log_prob_BL + 1e-6)) for m in s] for s in shares]

    score_old_and_reference = train_module.score_old_and_reference
    monkeypatch.setattr(train_module, "score_old_and_reference", stale)


def _one_seed_for_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(seed: int, *key: object) -> int:
        return derive(seed, *(key[:1] if len(key) == 2 else key))  # (prompt, member): without the member

    monkeypatch.setattr(rollout_module, "derive", shared)


def _nothing(_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("steps", "setting", "of", "plant", "wanted"),
    [
        (1, "train.minibatches=1", "bright", _stale_scores, {"first-ratio text"}),
        (3, "seed=0", "bright", _one_seed_for_a_group, {"identical-images image"}),
        (3, "seed=0", "same", _nothing, {"constant-reward same", "zero-spread"}),
    ],
)
def test_a_planted_fault_gives_its_warning(
    monkeypatch: pytest.MonkeyPatch, steps: int, setting: str, of: str, plant: Callable, wanted: set
) -> None:
    plant(monkeypatch)
    assert wanted <= _warned(steps, setting, of=of)[0]


def test_statistics_change_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights to the bit without the statistics of ratios and KL."""

    def weights() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        _warned(2, spoil=lambda state: kept.extend(state.policy.network.parameters()))
        return [p.detach().clone() for p in kept]

    with_statistics = weights()
    for module, name, value in (
        (objective, "_ratio_statistics", lambda *_: {}),
        (objective, "_by_step", lambda *_: {}),
        (objective, "step_kls", lambda *_: torch.zeros(1, 1)),
        (metrics, "rollout_metrics", lambda *_: {}),
        (metrics, "memory", lambda device: {}),
    ):
        monkeypatch.setattr(module, name, value)
    assert all(torch.equal(a, b) for a, b in zip(with_statistics, weights(), strict=True))
