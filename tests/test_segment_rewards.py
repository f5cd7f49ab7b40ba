"""Rewards of several rounds: every picture scored, segments scored by themselves, locally, early, served, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_remote import CONTEXT, LENIENT, _plugins, _remote, _served
from unigrpo_cli import RewardOutput, Sample, reward
from unigrpo_cli.errors import RewardError
from unigrpo_cli.evaluate import rounds_of
from unigrpo_cli.parallel.ranks import Ranks
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.conformance import check_reward, several_round_samples
from unigrpo_cli.rewards.gather import _arrays, _joined, _unpack
from unigrpo_cli.rewards.loaded import RewardLimits
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards


def _grey(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, np.uint8)


def _episode(name: str, *segments: str | int) -> Sample:
    """Texts, and pictures of one grey value."""
    acted = tuple(part if isinstance(part, str) else _grey(part) for part in segments)
    texts = [part for part in acted if isinstance(part, str)]
    last = next(part for part in acted[::-1] if not isinstance(part, str))
    return Sample("p", last, "\n\n".join(texts) or None, {}, name, "0/p", _grey(7), acted)


TWO = _episode("p/0", "plan", 10, "wrong", 20)
STOPPED = _episode("p/1", "plan", 30, "correct")
ONE = Sample("p", _grey(40), "plan", {}, "p/2", "0/p")
EPISODES = [TWO, STOPPED, ONE]


@reward("grey", range=(0, 255))
def grey(pixels, reasoning):
    """The grey value, and how many words were read."""
    lengths = [len(text.split()) for text in reasoning]
    return RewardOutput([float(p.mean()) for p in pixels], components={"words": lengths})


def _scored(text: str, samples: Sequence[Sample], *factories: object, **how: Any) -> RewardResult:
    with Scorer(parse_rewards([text]), _plugins(*factories), CONTEXT, LENIENT) as rewards:
        (result,) = rewards.score(samples, **how).values()
        return result


# ----- episodes as rewards see them


def test_an_episode_is_seen_as_it_was_at_each_picture() -> None:
    first, last = TWO.by_round()
    assert last is TWO
    assert (first.texts, first.reasoning, first.preceding_text) == (("plan",), "plan", "plan")
    assert (TWO.texts, TWO.preceding_text) == (("plan", "wrong"), "wrong")
    assert [int(p[0, 0, 0]) for p in TWO.pictures] == [10, 20]
    assert first.pixels[0, 0, 0] == 10
    assert {first.id, first.group_id} == {"p/0/round_1", "0/p/round_1"}
    assert TWO.names == ("text_1", "image_1", "text_2", "image_2")
    assert STOPPED.names == ("text_1", "image_1", "text_2")
    assert STOPPED.by_round() == (STOPPED,)
    assert STOPPED.preceding_text == "plan", "the words after a picture were not read by it"
    assert ONE.names == ("text_1", "image_1")
    assert Sample("p", _grey(1)).names == ("image_1",)
    assert Sample("p", _grey(1)).preceding_text is None


@pytest.mark.parametrize("attributes", [{}, {"batch_size": 2}, {"batch_size": 1, "concurrency": 4}])
@pytest.mark.parametrize("overlap", ["all", "none"])
def test_every_picture_is_scored_in_any_order_of_arrival(attributes: dict, overlap: str) -> None:
    kind = type("Grey", (grey.__unigrpo_reward__,), attributes)
    with Scorer(parse_rewards(["grey"]), _plugins(kind), CONTEXT, LENIENT) as rewards:
        scoring = rewards.start(overlap=overlap, every_picture=True)
        scoring.add([ONE, TWO])
        scoring.add([STOPPED])
        scoring.submit([s.id for s in EPISODES])
        found = scoring.finish()["grey"]
    assert found.scores.tolist() == [20, 30, 40]
    assert found.segments == [{"image_1": 10, "image_2": 20}, {"image_1": 30}, {"image_1": 40}]
    assert found.components["words"].tolist() == [2, 2, 1], "the last picture's own parts"
    plain = _scored("grey", EPISODES, grey)
    assert plain.scores.tolist() == [20, 30, 40]
    assert plain.segments == []


def test_the_picture_that_stands_after_a_round() -> None:
    """An episode that stopped keeps its last picture; with one round there is nothing to say."""
    found = rounds_of([{"image_1": 1.0, "image_2": 2.0, "image_3": 3.0}, {"image_1": 5.0}])
    assert {name: values.tolist() for name, values in found.items()} == {
        "round_1": [1, 5],
        "round_2": [2, 5],
        "round_3": [3, 5],
    }
    assert rounds_of([{"image_1": 1.0}, {"image_1": 2.0}]) == {}
    assert rounds_of([]) == {}
    words = rounds_of([{"text_2": 1.0}, {}])["text_2"]
    assert words[0] == 1.0
    assert math.isnan(words[1])


# ----- rewards that score segments


@reward("truth", range=(0, 1), segments=("text",))
def truth(texts, gain=1.0):
    """Words after a look: 1 for `correct`, one half for others; an abstention on the empty text."""
    known = [
        {f"text_{k}": None if not t else gain * (1.0 if t == "correct" else 0.5) for k, t in enumerate(own, 1) if k > 1}
        for own in texts
    ]
    means = [np.mean([v or 0 for v in row.values()]) if row else None for row in known]
    return RewardOutput(means, segments=known)


@pytest.mark.parametrize("every_picture", [False, True])
def test_a_segment_reward_is_asked_once_for_an_episode(every_picture: bool) -> None:
    silent = _episode("p/3", "plan", 1, "", 2)
    found = _scored("truth", [*EPISODES, silent], truth, every_picture=every_picture)
    assert found.segments[:3] == [{"text_2": 0.5}, {"text_2": 1.0}, {}]
    assert math.isnan(found.segments[3]["text_2"])
    assert found.select([1, 0]).segments == [{"text_2": 1.0}, {"text_2": 0.5}]
    parts = RewardResult.join([found.select([0]), found.select([1, 2])])
    assert parts.segments == found.segments[:3]


@pytest.mark.parametrize(
    ("segments", "answer", "says"),
    [
        (("text",), [0.5], "declares segments = .'text'., but gave none"),
        (("text",), RewardOutput([0.5], segments=[{"image_1": 1.0}]), "scored the segment 'image_1'; accepted: text_1"),
        (
            ("text",),
            RewardOutput([0.5], segments=[{"text_3": 1.0}]),
            "scored the segment 'text_3'; accepted: text_1, t",
        ),
        ((), RewardOutput([0.5], segments=[{"text_1": 1.0}]), "scored the segment 'text_1'; accepted: none"),
        (("text",), RewardOutput([0.5], segments=[]), "segments of 0 samples for 1"),
        (("text",), RewardOutput([0.5], segments=[{"text_1": "yes"}]), "the text 'yes'"),
        (("words",), [0.5], "kinds: text, image"),
    ],
)
def test_scores_of_segments_are_checked(segments: tuple, answer: Any, says: str) -> None:
    odd = reward("odd", range=(0, 1), segments=segments)(lambda texts: answer)
    with pytest.raises(RewardError, match=says):
        _scored("odd", [TWO], odd)


def test_scores_of_segments_outside_the_range_are_named() -> None:
    wide = reward("wide", range=(0, 1), segments=("text",))(
        lambda texts: RewardOutput([0.5] * len(texts), segments=[{"text_1": 2.0}] * len(texts))
    )
    with pytest.warns(UserWarning, match="gave 2, outside its declared range"):
        _scored("wide", [TWO], wide)


def test_a_failed_call_abstains_on_every_segment_it_would_have_scored() -> None:
    @reward("broken", range=(0, 1), segments=("text",))
    def broken(texts):
        raise OSError("no answer")

    abstain = type(LENIENT)(on_error="abstain", max_abstain=1.0)
    with Scorer(parse_rewards(["broken"]), _plugins(broken), CONTEXT, abstain) as rewards:
        (found,) = rewards.score([TWO]).values()
    assert not found.valid.any()
    assert list(found.segments[0]) == ["text_1", "text_2"]
    assert all(math.isnan(v) for v in found.segments[0].values())


# ----- elsewhere


@reward("all_of_it", range=(-1e9, 1e9), segments=("text", "image"))
def all_of_it(pixels, reasoning, texts, pictures, sources):
    """Depends on every text and picture of an episode and on its source."""
    scores, segments = [], []
    for k, parts in enumerate(pictures):
        source = -1.0 if sources[k] is None else float(sources[k].mean())
        scores.append(float(pixels[k].mean()) + len(reasoning[k]) / 7 + source)
        row = {f"text_{i}": float(len(t)) for i, t in enumerate(texts[k], 1)}
        segments.append(row | {f"image_{i}": float(p.mean()) / 3 for i, p in enumerate(parts, 1)})
    return RewardOutput(scores, segments=segments)


@pytest.mark.parametrize(("text", "factory"), [("grey", grey), ("truth", truth), ("all_of_it", all_of_it)])
def test_served_scores_of_segments_are_those_of_here(text: str, factory: object) -> None:
    samples = [*EPISODES, *several_round_samples()]
    here = _scored(text, samples, factory, every_picture=True)
    with _served(text, factory) as server, _remote(server.url) as rewards:
        (there,) = rewards.score(samples, every_picture=True).values()
    assert np.array_equal(here.scores, there.scores, equal_nan=True)
    assert there.segments == here.segments


def test_ranks_exchange_every_picture_and_every_score() -> None:
    rows = [
        {"prompt": s.prompt, "reasoning": s.reasoning, "metadata": {}, "id": s.id, "group_id": s.group_id}
        | {"segments": [t if isinstance(t, str) else None for t in s.segments], "has_source": s.source is not None}
        | {"shapes": [list(p.shape) for p in _arrays(s)]}
        for s in EPISODES
    ]
    data = torch.from_numpy(np.concatenate([p.reshape(-1) for s in EPISODES for p in _arrays(s)]))
    for sent, own in zip(_unpack(rows, data), EPISODES, strict=True):
        assert sent.names == own.names
        assert sent.texts == own.texts
        assert all(np.array_equal(a, b) for a, b in zip(sent.pictures, own.pictures, strict=True))
        assert (sent.source is None) == (own.source is None)
    parts = [_scored("truth", own, truth) for own in ([TWO, ONE], [STOPPED, ONE])]
    whole = _joined([part.to_json() for part in parts], Ranks(0, 2), 2)
    assert whole.segments == [{"text_2": 0.5}, {"text_2": 1.0}, {}, {}]


# ----- the contract


def test_the_contract_of_a_segment_reward() -> None:
    @reward("vowels", range=(0, 1), segments=("text",))
    def vowels(texts):
        share = [[sum(t.count(v) for v in "aeiou") / len(t) for t in own] for own in texts]
        named = [{f"text_{k}": x for k, x in enumerate(own, 1)} for own in share]
        return RewardOutput([own[-1] for own in share], segments=named)

    assert [c.name for c in check_reward(vowels) if not c.ok] == []
    assert "scores the segments that it declares" in {c.name for c in check_reward(vowels)}

    @reward("mute", range=(0, 1), segments=("image",))
    def mute(texts):
        return RewardOutput([len(own[0]) / 1e4 for own in texts], segments=[{}] * len(texts))

    assert [c.name for c in check_reward(mute) if not c.ok] == ["scores the segments that it declares"]

    calls = iter(range(1000))

    @reward("restless", range=(0, 1e4), segments=("text",))
    def restless(texts):
        shift = next(calls)
        return RewardOutput([len(own[-1]) for own in texts], segments=[{"text_1": float(shift)}] * len(texts))

    assert "gives the same twice" in {c.name for c in check_reward(restless) if not c.ok}


def test_an_abstention_on_an_earlier_picture_counts() -> None:
    """A judge without an opinion on first drafts must not leave them untrained in silence."""

    @reward("drafts", range=(0, 255))
    def drafts(pixels):
        return [None if own[0, 0, 0] == 10 else float(own[0, 0, 0]) for own in pixels]

    samples = [replace(TWO, id=f"p/{k}") for k in range(16)]
    limits = RewardLimits(max_abstain=0.4)
    with Scorer(parse_rewards(["drafts"]), _plugins(drafts), CONTEXT, limits) as rewards:
        pending = rewards.start(step=0, overlap="none", every_picture=True)
        pending.add(samples)
        pending.submit()
        with pytest.raises(RewardError, match="abstain"):
            pending.finish()


def test_a_server_that_declares_segments_must_give_them() -> None:
    with _served("truth", truth) as server, _remote(server.url) as rewards:
        remote = rewards.rewards[0].reward
        ask = remote._ask
        remote._ask = lambda *given: {k: v for k, v in ask(*given).items() if k != "segments"}
        with pytest.raises(RewardError, match="one score, component and info row"):
            rewards.score(EPISODES, split="train")
