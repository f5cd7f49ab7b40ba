"""Rewards: the grammar, the columns of a function, the contract, and that no failure becomes a number."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput, Sample, hookimpl, reward
from unigrpo_cli.errors import RewardError, UsageError
from unigrpo_cli.rewards.conformance import check_reward, example_samples
from unigrpo_cli.rewards.loaded import RewardLimits
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import RewardSpec, parse_rewards

CONTEXT = RewardContext(device="cpu", seed=0, embedded=True, offline=True)


def _plugins(*factories: object) -> Plugins:
    """Plugins with these rewards added under their own names."""
    plugins = Plugins()
    plugins.load()
    for factory in factories:
        made = getattr(factory, "__unigrpo_reward__", factory)
        plugins.rewards.add(made.name, factory)
    return plugins


def _score(factory: object, text: str | None = None, count: int = 4, policy: RewardLimits | None = None):
    made = getattr(factory, "__unigrpo_reward__", factory)
    choices = parse_rewards([text or made.name])
    with Scorer(choices, _plugins(factory), CONTEXT, policy or RewardLimits()) as rewards:
        return rewards.score(example_samples(count))[choices[0].alias]


# ----- grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clip", RewardSpec("clip", "clip")),
        ("clip:0.5", RewardSpec("clip", "clip", 0.5)),
        ("clip:-1", RewardSpec("clip", "clip", -1.0)),
        ("clip:0", RewardSpec("clip", "clip", 0.0)),
        ("big=clip:1e-2@model=ViT-H-14", RewardSpec("big", "clip", 0.01, {"model": "ViT-H-14"})),
        ("mine/red@n=3@on=true", RewardSpec("red", "mine/red", 1.0, {"n": 3, "on": True})),
        (
            "vlm@url=http://localhost:8000/v1@mode=yes_no",
            RewardSpec("vlm", "vlm", 1.0, {"url": "http://localhost:8000/v1", "mode": "yes_no"}),
        ),
    ],
)
def test_grammar(text: str, expected: RewardSpec) -> None:
    assert parse_rewards([text]) == [expected]


def test_commas_and_repetition_are_the_same() -> None:
    assert parse_rewards(["a,b:2"]) == parse_rewards(["a", "b:2"])
    assert [c.alias for c in parse_rewards(["a, b"])] == ["a", "b"]


def test_extra_options_reach_their_alias() -> None:
    (choice,) = parse_rewards(["x=clip@model=a"], {"x.model": "b,c@d", "x.n": 1})
    assert choice.options == {"model": "b,c@d", "n": 1}
    (same,) = parse_rewards(["x=clip:1E0@model=a"], {"x": {"model": "b,c@d", "n": 1}})  # as a TOML table
    assert same == choice


@pytest.mark.parametrize(
    ("texts", "extra", "says"),
    [
        (["clip:"], None, "cannot read reward"),
        (["clip:heavy"], None, "cannot read reward"),
        (["clip:1e999"], None, "not a number up to"),
        (["clip:1e200"], None, "not a number up to"),
        ([""], None, "cannot read reward"),
        (["clip@model"], None, "@key=value"),
        (["clip,clip"], None, "given twice"),
        (["clip"], {"geneval.mode": "x"}, "ALIAS.KEY=VALUE"),
        (["clip"], {"model": "x"}, "ALIAS.KEY=VALUE"),
    ],
)
def test_what_the_grammar_refuses(texts: list[str], extra: dict | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_rewards(texts, extra)


# ----- functions


def test_a_functions_parameters_are_its_columns_and_options() -> None:
    @reward("probe", range=(0, 100))
    def probe(prompts, reasoning, metadata, images, pixels, tensors, ids, group_ids, step, split, batch, gain=2):
        assert isinstance(batch, RewardBatch)
        assert (step, split) == (0, "train")
        assert tensors.shape == (4, 3, 48, 48)
        assert images[0].size == (48, 48)
        assert pixels[0].shape == (48, 48, 3)
        assert ids == ["0", "1", "2", "3"]
        assert group_ids == ["0", "0", "1", "1"]
        assert all(r.startswith("<think>") for r in reasoning)
        assert all("include" in m for m in metadata)
        return [gain * len(p) for p in prompts]

    lengths = [len(s.prompt) for s in example_samples(4)]
    assert _score(probe).scores.tolist() == [2 * n for n in lengths]
    assert _score(probe, "probe@gain=3").scores.tolist() == [3 * n for n in lengths]


def test_an_async_function() -> None:
    @reward("later")
    async def later(prompts):
        return [1.0 for _ in prompts]

    assert _score(later).scores.tolist() == [1.0] * 4


def test_a_parameter_that_is_no_column() -> None:
    with pytest.raises(RewardError, match="did you mean images"):

        @reward("typo")
        def typo(imags):
            return []


@pytest.mark.parametrize(
    "answer",
    [
        [0.5] * 4,
        (0.5,) * 4,
        np.full(4, 0.5),
        torch.full((4,), 0.5),
        torch.full((4,), 0.5, requires_grad=True),
        RewardOutput([0.5] * 4),
        [True, 1, 0.5, 0.5],
        [np.float32(0.5), np.int64(1), np.array(0.5), torch.tensor(0.5, dtype=torch.bfloat16)],
        torch.full((4,), 0.5, dtype=torch.bfloat16),
        [Fraction(1, 2), Decimal("0.5"), 1e30, -1e30],
    ],
)
def test_what_counts_as_scores(answer) -> None:
    @reward("fine")
    def fine(prompts):
        return answer

    assert _score(fine).scores.shape == (4,)


def test_batch_size_cuts_the_calls() -> None:
    sizes = []

    @reward("counted", batch_size=3)
    def counted(prompts):
        sizes.append(len(prompts))
        return [float(len(p)) for p in prompts]

    scored = _score(counted, count=8)
    assert sizes == [3, 3, 2]
    assert scored.scores.tolist() == [len(s.prompt) for s in example_samples(8)]


# ----- faults


class Settings(Options):
    gain: float = Field(1.0, gt=0)
    mode: str = "plain"


class Gained:
    name = "gained"
    range = (0.0, 10.0)
    needs = frozenset({"metadata:secret"})
    Options = Settings

    def __init__(self, options: Settings):
        self.options = options

    def score(self, batch: RewardBatch) -> list[float]:
        return [self.options.gain] * len(batch)


def _faulty(answer):
    @reward("faulty")
    def faulty(prompts):
        return answer(prompts) if callable(answer) else answer

    return faulty


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1.0, 2.0], "2 scores for 4 samples"),
        ([], "0 scores for 4 samples"),
        (np.zeros((4, 1)), r"shape \[4, 1\]"),
        (0.5, "float; it must give a list"),
        ("good", "str; it must give a list"),
        (None, "NoneType; it must give a list"),
        ([[1.0], [1.0, 2.0], [1.0], [1.0]], "it must give a list of 4 numbers"),
        (["a", "b", "c", "d"], "the text 'a'"),
        (["0.5", "0.5", "0.5", "0.5"], "the text '0.5'"),
        (torch.tensor(0.5), "one Tensor"),
        (torch.ones(4, 1), r"shape \[4, 1\]"),
        ({0.1, 0.2, 0.3, 0.4}, "one set"),
        (RewardOutput([1, 1, 1, 1], components=[1, 2]), "cannot be read"),
        (RewardOutput([1, 1, 1, 1], info=[{"x": object()}] * 4), "cannot be read"),
        (RewardOutput([1.0] * 4, components={"part": [1.0]}), "component 'part'"),
        (RewardOutput([1.0] * 4, info=[{}]), "1 info rows"),
        ([1 + 2j] * 4, "not a number: a complex"),
        (np.full(4, 1 + 2j), "not a number: a complex128"),
        (torch.full((4,), 1 + 2j), "not a number: a complex number"),
        (np.full(4, 5, "timedelta64[ns]"), r"not a number: a timedelta64\[ns\]"),
        (list(np.full(4, "2026-01-01", "datetime64[ns]")), "not a number: a datetime64"),
        ([timedelta(seconds=1)] * 4, "not a number: a timedelta"),
        ([1.0, 2.0, 3.0, 1e160], r"gave 1e\+160; scores must lie between"),
        (torch.tensor([1.0, 2.0, -1e31, 3.0]), r"gave -1e\+31; scores must lie between"),
        ([1.0, 2.0, 3.0, 10**400], "not a number"),
        (RewardOutput([1.0] * 4, components={"part": [1e308] * 4}), "component 'part' has 1e"),
        (RewardOutput([1.0] * 4, components={"spread": [1.0] * 4}), "reward/faulty/spread is the metric of all"),
        (RewardOutput([1.0] * 4, components={"abstained": [1.0] * 4}), "choose another name"),
        (RewardOutput([1.0] * 4, components={"round_2": [1.0] * 4}), "reward/faulty/round_2 is the metric of all"),
        (RewardOutput([1.0] * 4, components={"text_1": [1.0] * 4}), "choose another name"),
        (RewardOutput([1.0] * 4, components={"\x1b[2J": [1.0] * 4}), "printable text"),
        (RewardOutput([1.0] * 4, components={3: [1.0] * 4}), "printable text"),
    ],
)
def test_a_wrong_shape_stops_even_when_errors_may_abstain(answer, says: str) -> None:
    for policy in (RewardLimits(), RewardLimits(on_error="abstain", max_abstain=1.0)):
        with pytest.raises(RewardError, match=says):
            _score(_faulty(answer), policy=policy)


def _raise(error: BaseException):
    def answer(_prompts):
        raise error

    return answer


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("boom"), SystemExit(4), KeyError("k"), ConnectionResetError("gone")]
)
def test_an_exception_stops_naming_reward_and_remedy(error: BaseException) -> None:
    with pytest.raises(RewardError, match=r"'faulty'.*failed in score.*rewards test faulty.*on_error=abstain"):
        _score(_faulty(_raise(error)))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("higher_is_better", "false"),
        ("higher_is_better", 0),
        ("scope", "batch"),
        ("concurrency", "4"),
        ("concurrency", -1),
        ("needs", "image"),
        ("needs", {1}),
        ("range", "01"),
        ("range", (1, 0)),
        ("range", None),
        ("batch_size", -1),
    ],
)
def test_a_declaration_of_another_type_is_refused(attribute: str, value: object) -> None:
    odd = type("Odd", (Gained,), {"name": "odd", attribute: value})
    with pytest.raises(RewardError, match=rf"'odd'.*(declares|has) {attribute} = .*; give"):
        _score(odd)


def test_an_exception_may_abstain_but_is_never_zero() -> None:
    scored = _score(_faulty(_raise(ValueError("x"))), policy=RewardLimits(on_error="abstain", max_abstain=1.0))
    assert not scored.valid.any()
    assert np.isnan(scored.scores).all()
    assert scored.mean is None


def test_the_message_of_a_failure_is_one_plain_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    error = ValueError("\x1b[31mred\x1b[0m\nkey sk-very-secret at https://me:pass@host/")
    with pytest.raises(RewardError) as failed:
        _score(_faulty(_raise(error)))
    text = str(failed.value)
    assert text.isprintable()
    assert "sk-very-secret" not in text
    assert "me:pass" not in text


def test_a_variable_given_as_a_secret_is_one_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyed(Gained):
        name = "keyed"
        needs = frozenset()

        class Options(Options):
            api_key: str

        def score(self, batch: RewardBatch) -> list[float]:
            raise ValueError(f"refused: {self.options.api_key}")

    monkeypatch.setenv("MY_JUDGE", "hunter2-hunter2")
    with pytest.raises(RewardError, match=r"refused: \[MY_JUDGE\]"):
        _score(Keyed, "keyed@api_key=env:MY_JUDGE")


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_no_opinion_is_masked(nothing) -> None:
    scored = _score(_faulty([1.0, nothing, 2.0, 3.0]))
    assert scored.valid.tolist() == [True, False, True, True]
    assert scored.mean == 2.0


def test_too_many_abstentions_stop() -> None:
    with pytest.raises(RewardError, match=r"abstained \(NaN\) on 50% .*max_abstain=0.25"):
        _score(_faulty([1.0, None, None, 3.0]))


def test_a_reward_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when it returns after all, the working directory of the process stays."""
    wake, threads = threading.Event(), []

    class Hanging(Gained):
        name = "hanging"
        needs = frozenset()

        def score(self, batch: RewardBatch) -> list[float]:
            threads.append(threading.current_thread())
            wake.wait(60)
            return []

        def teardown(self) -> None:
            wake.wait(60)

    began = time.perf_counter()
    with pytest.raises(RewardError, match=r"no answer in score within 0.2 s.*reward.timeout_s"):
        _score(Hanging, policy=RewardLimits(timeout_s=0.2))
    assert time.perf_counter() - began < 5
    monkeypatch.chdir(tmp_path)
    wake.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert threads and Path.cwd() == tmp_path


def test_a_failing_teardown_does_not_hide_what_failed_before() -> None:
    class Twice(Gained):
        name = "twice"
        needs = frozenset()

        def score(self, batch: RewardBatch) -> list[float]:
            raise ValueError("first")

        def teardown(self) -> None:
            raise ValueError("second")

    with pytest.warns(UserWarning, match="second"), pytest.raises(RewardError, match="first"):
        _score(Twice)


def test_outside_its_range_warns_once_or_stops() -> None:
    @reward("loud", range=(0, 1))
    def loud(prompts):
        return [0.5, 3.0, 0.5, 0.5]

    with Scorer(parse_rewards(["loud"]), _plugins(loud), CONTEXT) as rewards:
        with pytest.warns(UserWarning, match=r"gave 3, outside its declared range \[0, 1\]"):
            rewards.score(example_samples(4))
        rewards.score(example_samples(4))
    with pytest.raises(RewardError, match="outside its declared range"):
        _score(loud, policy=RewardLimits(strict=True))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gained@gian=2", "no option 'gian': did you mean gain"),
        ("gained@gain=-1", "option gain=-1: input should be greater than 0"),
        ("gained@gain=lots", "option gain='lots'"),
    ],
)
def test_wrong_options_are_named(text: str, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        Scorer(parse_rewards([text]), _plugins(Gained), CONTEXT)


def test_missing_metadata_is_found_before_sampling() -> None:
    with Scorer(parse_rewards(["gained"]), _plugins(Gained), CONTEXT) as rewards:
        with pytest.raises(RewardError, match="needs metadata 'secret', which 1 of 2 prompts lack"):
            rewards.check_needs([{"secret": 1}, {}], has_reasoning=True, has_source=False, split="train")


def test_reasoning_is_needed_by_whoever_reads_it() -> None:
    @reward("words")
    def words(reasoning):
        return [float(len(r)) for r in reasoning]

    with Scorer(parse_rewards(["words"]), _plugins(words), CONTEXT) as rewards:
        rewards.check_needs([{}], has_reasoning=True, has_source=False, split="train")
        with pytest.raises(RewardError, match="does not think"):
            rewards.check_needs([{}], has_reasoning=False, has_source=False, split="train")


def test_lower_is_better_flips_the_weight() -> None:
    class Cost(Gained):
        name = "cost"
        higher_is_better = False

    with Scorer(parse_rewards(["cost:2"]), _plugins(Cost), CONTEXT) as rewards:
        assert rewards.weights == {"cost": -2.0}


def test_eval_only_rewards_are_asked_in_evaluation_alone() -> None:
    choices = [*parse_rewards(["geneval"]), RewardSpec("plan", "plan", 0.0, {}, eval_only=True)]
    with Scorer(choices, _plugins(), CONTEXT) as rewards:
        assert set(rewards.score(example_samples(4))) == {"geneval"}
        assert set(rewards.score(example_samples(4), split="eval")) == {"geneval", "plan"}
        assert set(rewards.weights) == {"geneval"}


# ----- the door


def test_built_ins_come_in_by_entry_point() -> None:
    plugins = Plugins()
    plugins.load()
    ours = {e.name: e for e in plugins.rewards.entries}
    assert {"clip", "geneval", "plan", "fidelity", "clean"} <= set(ours)
    assert all(e.origin == "unigrpo-cli" for e in ours.values())
    assert ours["clip"]._factory is None, "listing imports nothing"


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


FILE = """from unigrpo_cli import reward

@reward("{name}")
def {name}(prompts):
    return [{value}] * len(prompts)
"""


def test_a_file_and_what_it_leaves_alone(tmp_path: Path) -> None:
    plugins = Plugins()
    before = list(sys.path)
    plugins.load([_write(tmp_path / "json.py", FILE.format(name="mine", value=7.0))])
    assert sys.path == before
    import json

    assert hasattr(json, "dumps"), "a plugin's file name must not shadow a real module"
    entry = plugins.rewards.find("mine")
    assert entry.address == "json/mine"


def test_two_of_a_name_must_be_told_apart(tmp_path: Path) -> None:
    plugins = Plugins()
    plugins.load(
        [_write(tmp_path / f"{n}.py", FILE.format(name="same", value=v)) for n, v in (("one", 1.0), ("two", 2.0))]
    )
    with pytest.raises(RewardError, match="one/same or two/same"):
        plugins.rewards.find("same")
    assert plugins.rewards.find("two/same").origin == "two"
    plugins.rewards._origin = ("three", "-")
    plugins.rewards.add("same", Gained, override=True)
    assert plugins.rewards.find("same").address == "three/same"


def test_no_name_leaves_a_reward_out() -> None:
    plugins = Plugins()
    plugins.load(["no:clip"])
    with pytest.raises(RewardError, match="unknown reward 'clip'"):
        plugins.rewards.find("clip")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("x = 1", "no reward and no hook"),
    ],
)
def test_a_plugin_asked_for_must_load(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        Plugins().load([_write(tmp_path / "bad.py", text)])


def test_a_missing_plugin_file() -> None:
    with pytest.raises(RewardError, match="no file"):
        Plugins().load(["nowhere.py"])


class _Point:
    """An installed entry point whose module raises at import."""

    name, group = "bad", "unigrpo.rewards"

    class dist:  # noqa: N801 - stands for importlib.metadata's object
        name, version = "someone-else", "1.0"

    def load(self):
        raise RuntimeError("torch too old")


def test_a_broken_installed_plugin_is_fatal_only_to_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from unigrpo_cli.rewards import registry

    real = registry.entry_points
    monkeypatch.delenv("UNIGRPO_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), _Point()])
    plugins = Plugins()
    plugins.load()
    assert plugins.rewards.find("geneval").factory()
    with pytest.raises(RewardError, match="torch too old"):
        plugins.rewards.find("bad").factory()
    assert any("torch too old" in p for p in plugins.rewards.problems)  # it is in the hook group here, too


def test_directory_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "extra.py", FILE.format(name="extra", value=1.0))
    monkeypatch.chdir(tmp_path)
    plain = Plugins()
    plain.load()
    assert not [e for e in plain.rewards.entries if e.name == "extra"]
    asked = Plugins()
    asked.load(directory=tmp_path)
    assert asked.rewards.find("extra")
    monkeypatch.setenv("UNIGRPO_PLUGINS_DIR", str(tmp_path))
    by_environment = Plugins()
    by_environment.load()
    assert by_environment.rewards.find("extra")


# ----- hooks


class Observer:
    """Implements every hook that a score passes through; some with fewer arguments than offered."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @hookimpl
    def unigrpo_register_rewards(self, registry):
        registry.add("observed", Gained)

    @hookimpl
    def unigrpo_reward_setup(self, name):
        self.seen.append(f"setup {name}")

    @hookimpl
    def unigrpo_before_score(self, batch):
        self.seen.append("before")
        return batch

    @hookimpl
    def unigrpo_after_score(self, batch, scored):
        self.seen.append(f"after {scored.scores.tolist()}")
        raise RuntimeError("an observer's fault")

    @hookimpl
    def unigrpo_reward_teardown(self, name, reward):
        self.seen.append(f"teardown {name}")


def test_hooks_are_called_in_order_and_observers_cannot_stop_a_run() -> None:
    plugins, observer = Plugins(), Observer()
    plugins._register(observer, "observer", "tests", "-")
    assert plugins.rewards.find("observed").origin == "tests"
    with pytest.warns(UserWarning, match="an observer's fault"):
        with Scorer(parse_rewards(["observed@gain=3"]), plugins, CONTEXT) as rewards:
            rewards.score(example_samples(2))
    assert observer.seen == ["setup observed", "before", "after [3.0, 3.0]", "teardown observed"]


def test_a_hook_that_does_not_exist() -> None:
    class Typo:
        @hookimpl
        def unigrpo_after_scoring(self, batch):
            pass

    with pytest.raises(RewardError, match="did you mean unigrpo_after_score"):
        Plugins()._register(Typo(), "typo", "tests", "-")


def test_before_score_may_change_pictures_but_not_their_number() -> None:
    class Cutter:
        @hookimpl
        def unigrpo_before_score(self, batch):
            return batch[:1]

    plugins = _plugins(Gained)
    plugins._register(Cutter(), "cutter", "tests", "-")
    with Scorer(parse_rewards(["gained"]), plugins, CONTEXT) as rewards:
        with pytest.raises(RewardError, match="the same 4 samples"):
            rewards.score(example_samples(4))


def test_a_failing_hook_is_named() -> None:
    class Boom:
        @hookimpl
        def unigrpo_before_score(self, batch):
            raise RuntimeError("boom")

    plugins = _plugins(Gained)
    plugins._register(Boom(), "boomer", "tests", "-")
    with Scorer(parse_rewards(["gained"]), plugins, CONTEXT) as rewards:
        with pytest.raises(RewardError, match=r"boomer failed in unigrpo_before_score: RuntimeError: boom"):
            rewards.score(example_samples(4))


def test_what_a_reward_writes_into_its_input_nobody_else_sees() -> None:
    @reward("vandal")
    def vandal(metadata):
        for row in metadata:
            row.clear()
        return [0.0] * len(metadata)

    given = [Sample("p", np.ones((2, 2, 3), np.uint8), metadata={"a": [1]})]
    with Scorer(parse_rewards(["vandal"]), _plugins(vandal), CONTEXT) as rewards:
        rewards.score(given)
    assert given[0].metadata == {"a": [1]}


def _paint(image: Any) -> None:
    image[:] = 0


def _paint_after_asking(image: Any) -> None:
    image.flags.writeable = True
    image[:] = 0


def _paint_beneath(image: Any) -> None:
    while image.base is not None and hasattr(image.base, "flags"):
        image = image.base
    image.setflags(write=True)
    image[:] = 0


@pytest.mark.parametrize("paint", [_paint, _paint_after_asking, _paint_beneath])
@pytest.mark.parametrize("hooked", [False, True])
def test_no_plugin_can_paint_over_what_others_see(paint: Callable, hooked: bool) -> None:
    """Neither a reward nor a hook; the pictures of the episodes stay, too."""

    @reward("painter")
    def painter(pixels):
        for image in () if hooked else pixels:
            paint(image)
        return [0.0] * len(pixels)

    class Hook:
        @hookimpl
        def unigrpo_before_score(self, batch: RewardBatch) -> RewardBatch | None:
            for image in batch.pixels if hooked else ():
                paint(image)
            return None

    given = [Sample("p", np.ones((2, 2, 3), np.uint8))]
    plugins = _plugins(painter)
    plugins.manager.register(Hook())
    with Scorer(parse_rewards(["painter"]), plugins, CONTEXT) as rewards:
        with pytest.raises(RewardError, match=r"read-only|cannot set WRITEABLE"):
            rewards.score(given)
    assert given[0].pixels.all()


def test_an_observer_cannot_change_scores() -> None:
    class Observer:
        @hookimpl
        def unigrpo_after_score(self, scored: Any) -> None:
            scored.scores[:] = 100
            scored.info.clear()

    plugins = _plugins(_faulty([1.0, 2.0, 3.0, 4.0]))
    plugins.manager.register(Observer())
    with Scorer(parse_rewards(["faulty"]), plugins, CONTEXT) as rewards:
        found = rewards.score(example_samples(4))["faulty"]
    assert found.scores.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert len(found.info) == 4


def test_setup_has_a_deadline_and_what_is_up_is_torn_down() -> None:
    down = []

    class First(Gained):
        name = "first"

        def teardown(self) -> None:
            down.append("first")

    class Slow(Gained):
        name = "slow"

        def setup(self, context: RewardContext) -> None:
            time.sleep(60)

    with pytest.raises(RewardError, match=r"'slow'.*in setup within 0.2 s.*reward.setup_timeout_s"):
        Scorer(parse_rewards(["first,slow"]), _plugins(First, Slow), CONTEXT, RewardLimits(setup_timeout_s=0.2))
    assert down == ["first"]


def test_one_file_cannot_offer_a_name_twice(tmp_path: Path) -> None:
    one = "from unigrpo_cli import reward\n\n\n@reward('r')\ndef {}(prompts):\n    return [0] * len(prompts)\n"
    path = _write(tmp_path / "twice.py", one.format("a") + one.format("b"))
    with pytest.raises(RewardError, match="two rewards named 'r'"):
        Plugins().load([path])
    plugins = Plugins()
    plugins.load(["no:genval"])
    assert any("did you mean" in p and "geneval" in p for p in plugins.rewards.problems)


def test_a_plugins_directory_may_hold_tests(tmp_path: Path) -> None:
    _write(tmp_path / "r.py", "from unigrpo_cli import reward\n\n\n@reward('r')\ndef r(prompts):\n    return [0]\n")
    _write(tmp_path / "test_r.py", "raise RuntimeError('no plugin')\n")
    _write(tmp_path / "notes.py", "X = 1\n")
    plugins = Plugins()
    plugins.load(directory=tmp_path)
    assert plugins.rewards.find("r").origin == "r"


# ----- the contract


@pytest.mark.parametrize("name", ["clip", "geneval", "plan", "fidelity", "clean"])
def test_built_ins_keep_the_contract(name: str) -> None:
    checks = check_reward(name)
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]
    assert len(checks) >= 7


@pytest.mark.parametrize(
    ("body", "broken"),
    [
        ("return [random.random() for _ in prompts]", "gives the same twice"),
        ("return [float(k) for k in range(len(prompts))]", "does not depend on the order"),
        ("return [float(len(prompts))] * len(prompts)", "does not depend on the batch"),
        ("return [5.0] * len(prompts)", "stays in its declared range"),
        ("return [None] * len(prompts)", "has an opinion"),
        ("return 1 / 0", "answers with one number per sample"),
    ],
)
def test_the_contract_finds_each_fault(tmp_path: Path, body: str, broken: str) -> None:
    high = 1 if "5.0" in body else 10
    head = f"import random\nfrom unigrpo_cli import reward\n\n@reward('x', range=(0, {high}))\n"
    text = f"{head}def x(prompts):\n    {body}\n"
    checks = check_reward("x", plugin=_write(tmp_path / "x.py", text))
    assert not next(c for c in checks if c.name == broken).ok


def test_example_samples_are_judged_right() -> None:
    """The pictures are painted from true plans, so every judge of the shapes world agrees with them."""
    choices = parse_rewards(["geneval@mode=strict,plan,fidelity,clean"])
    with Scorer(choices, _plugins(), CONTEXT) as rewards:
        scored = rewards.score([*example_samples(24)])
    for name in ("geneval", "plan", "fidelity"):
        assert scored[name].scores.mean() == 1.0, name
    assert scored["clean"].scores.min() > 0.85


def test_a_sample_is_frozen() -> None:
    sample = example_samples(1)[0]
    assert isinstance(sample, Sample)
    with pytest.raises(AttributeError):
        sample.prompt = "another"
