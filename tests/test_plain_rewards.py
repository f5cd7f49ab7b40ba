"""Rewards without a model: JPEG size, length and form of the reasoning, and the example in the documentation."""

from __future__ import annotations

import importlib
import io
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from unigrpo_cli import RewardContext, Sample
from unigrpo_cli.errors import RewardError
from unigrpo_cli.rewards.conformance import check_reward, example_samples
from unigrpo_cli.rewards.loaded import RewardLimits
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_plugins.jpeg import JpegReward
from unigrpo_plugins.reasoning import FormatReward, LengthReward

ROOT = Path(__file__).parents[1]
PIXELS = np.zeros((8, 8, 3), np.uint8)


def plugins() -> Plugins:
    made = Plugins()
    for factory in (JpegReward, LengthReward, FormatReward):
        made.rewards.add(factory.name, factory)
    return made


def scores_of(text: str, samples: list[Sample], extra: dict | None = None, embedded: bool = True) -> list[float]:
    context = RewardContext("cpu", 0, embedded, True)
    with Scorer(parse_rewards([text], extra), plugins(), context, RewardLimits(max_abstain=1)) as rewards:
        (scored,) = rewards.score(samples).values()
    return scored.scores.tolist()


def said(*texts: str | None) -> list[Sample]:
    return [Sample("p", PIXELS, text) for text in texts]


@pytest.mark.parametrize(
    "text", ["jpeg", "jpeg@sign=incompressibility", "length", "length@unit=tokens@high=4", "format"]
)
def test_they_keep_the_contract(text: str) -> None:
    checks = check_reward(text, plugins=plugins())
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]


# ----- jpeg


def test_jpeg_is_the_size_of_the_file_in_kilobytes() -> None:
    samples = example_samples(3)
    for quality in (95, 30):
        sizes = []
        for sample in samples:
            file = io.BytesIO()
            Image.fromarray(sample.pixels).save(file, format="JPEG", quality=quality)
            sizes.append(len(file.getvalue()) / 1000)
        assert scores_of(f"jpeg@quality={quality}", samples) == [-s for s in sizes]
        assert scores_of(f"jpeg@quality={quality}@sign=incompressibility", samples) == sizes


def test_a_flat_picture_is_smaller_than_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    flat, busy = scores_of("jpeg", [Sample("p", np.full_like(noise, 128)), Sample("p", noise)])
    assert busy < flat < 0


def test_the_range_goes_with_the_sign() -> None:
    assert JpegReward(JpegReward.Options()).range == (-np.inf, 0)
    assert JpegReward(JpegReward.Options(sign="incompressibility")).range == (0, np.inf)


# ----- length


def test_length_falls_evenly_outside_its_range() -> None:
    words = [0, 2, 3, 4, 6, 7, 8, 10, 11, 50]
    texts = [f"<think> {'word ' * n}</think>" for n in words]
    found = scores_of("length@low=4@high=6@slack=4", said(*texts))
    assert found == [0, 0.5, 0.75, 1, 1, 0.75, 0.5, 0, 0, 0]
    assert scores_of("length@low=4@high=6@slack=0", said(*texts)) == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_what_is_counted() -> None:
    text = "<think>two words</think>"
    assert scores_of("length@low=2@high=2@slack=0", said(text, "two words", "")) == [1, 1, 0]
    assert scores_of("length@low=9@high=9@slack=0@unit=characters", said(text)) == [1]
    assert np.isnan(scores_of("length", said(None))).all()


def test_tokens_are_those_of_the_tokenizer() -> None:
    directory = ROOT / "unigrpo_cli" / "toy" / "weights" / "model"
    plan = example_samples(1)[0].reasoning
    assert plan is not None
    inner = plan.removeprefix("<think>").removesuffix("</think>")
    count = len(Tokenizer.from_file(str(directory / "tokenizer.json")).encode(inner, add_special_tokens=False).ids)
    assert count > 0
    for given in (
        {},
        {"length.tokenizer": str(directory)},
        {"length.tokenizer": str(directory / "tokenizer.json")},
    ):
        text = f"length@unit=tokens@low={count}@high={count}@slack=0"
        assert scores_of(text, said(plan), given) == [1]


@pytest.mark.parametrize(
    ("text", "extra", "embedded", "says"),
    [
        ("length@low=5@high=4", None, True, r"low=5 is above high=4"),
        ("length@unit=tokens", None, False, r"set @tokenizer=DIR"),
        ("length@unit=tokens", {"length.tokenizer": "nowhere"}, True, r"cannot read a tokenizer from nowhere"),
        ("format", {"format.pattern": "("}, True, r"not a regular expression: missing \)"),
        ("jpeg@quality=0", None, True, r"option quality=0"),
        ("jpeg@sign=small", None, True, r"option sign='small'"),
    ],
)
def test_wrong_options(text: str, extra: dict | None, embedded: bool, says: str) -> None:
    with pytest.raises(RewardError, match=says) as caught:
        scores_of(text, said("x"), extra, embedded)
    assert "\n" not in str(caught.value)


# ----- format


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>a plan</think>", 1),
        (" <think>\na\nplan</think>\n", 1),
        ("<think></think>", 0),
        ("<think> \n </think>", 0),
        ("a plan", 0),
        ("<think>a plan", 0),
        ("a plan</think>", 0),
        ("<think>a</think><think>b</think>", 0),
        ("<think>a<think>b</think>", 0),
        ("<think>a plan</think> and more", 0),
        ("", 0),
    ],
)
def test_think_tags(text: str, fits: float) -> None:
    assert scores_of("format", said(text)) == [fits]


def test_patterns() -> None:
    texts = said("a: 1\nb: 2", "a: 1", "x a: 1", None)
    found = scores_of("format", texts, {"format.pattern": r"a: \d.*"})
    assert found[:3] == [1, 1, 0] and np.isnan(found[3])
    assert scores_of("format@match=search", texts, {"format.pattern": r"a: \d"})[:3] == [1, 1, 1]


# ----- documentation


def test_the_example_in_the_documentation_works(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "rewards" / "brightness.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "brightness.py"
    file.write_text(code)
    checks = check_reward("brightness", plugin=str(file))
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]


ENTRIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["unigrpo.rewards"]


@pytest.mark.parametrize("name", ["aesthetic", "pickscore", "hpsv2", "ocr", "jpeg", "length", "format"])
def test_each_has_an_entry_point_and_a_page_with_all_its_options(name: str) -> None:
    module, _, attribute = ENTRIES[name].partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    page = (ROOT / "docs" / "rewards" / f"{name}.md").read_text()
    assert factory.name == name
    assert factory.licence and factory.summary and factory.__doc__
    for option, field in factory.Options.model_fields.items():
        assert field.description, f"{name}@{option}"
        assert f"`@{option}`" in page, f"docs/rewards/{name}.md does not mention @{option}"
