"""What must hold of everything around the algorithm for any input: seeds, orders, files, and the accepted settings.

What the configuration accepts must give finite numbers: one test here looks for values that it should refuse.
"""

from __future__ import annotations

import math
import os
import tempfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import Guidance, guided
from unigrpo_cli.algo.objective import ImageSteps, step_densities
from unigrpo_cli.algo.rng import derive, normal, uniform
from unigrpo_cli.algo.text import token
from unigrpo_cli.config import Config, Section, load_config, to_toml
from unigrpo_cli.episode import Episode, GivenImage, GivenText, Group, ImageActions, Prompt, TextActions
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.run.episode_files import load_episodes, save_episodes
from unigrpo_cli.training.schedule import objective_of, prompts_for, window_of

EXAMPLES = 100 if os.environ.get("UNIGRPO_LONG_TESTS") else 15
PROPERTY = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


# ----- the configuration


def _limit(field: FieldInfo | Any, name: str, default: Any) -> Any:
    found = [getattr(m, name) for m in field if getattr(m, name, None) is not None]
    return found[0] if found else default


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
"""Any text but NUL, which no file of ours needs to hold."""
PLAIN = st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), WORDS)


def _values(annotation: Any, metadata: tuple = ()) -> st.SearchStrategy:
    """Values that a field may take, extremes often; from its annotation."""
    if hasattr(annotation, "__metadata__"):
        inside = [m for part in annotation.__metadata__ for m in getattr(part, "metadata", [part])]
        return _values(annotation.__origin__, (*metadata, *inside))
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple:
        parts = get_args(annotation)
        if parts[-1] is Ellipsis:
            return st.lists(_values(parts[0]), max_size=3).map(tuple)
        return st.tuples(*map(_values, parts))
    if get_origin(annotation) is dict:
        return st.dictionaries(WORDS, st.one_of(PLAIN, st.lists(PLAIN, max_size=2)), max_size=3)
    if get_origin(annotation) is UnionType:
        return st.one_of(*map(_values, get_args(annotation)))
    if annotation is int:
        low, high = (
            _limit(metadata, "ge", -(2**62)),
            min(_limit(metadata, "le", 2**62), _limit(metadata, "lt", 2**62) - 1),
        )
        return st.one_of(st.integers(low, min(low + 40, high)), st.integers(low, high))
    if annotation is float:
        return st.one_of(st.floats(0.01, 10.0), st.floats(0, 1e300), st.floats(allow_nan=True, allow_infinity=True))
    return {bool: st.booleans(), str: WORDS, NoneType: st.none()}[annotation]


def _fields(section: type[Section], only: tuple[str, ...] = ()) -> dict[str, st.SearchStrategy]:
    return {
        name: _values(field.annotation, tuple(field.metadata))
        for name, field in section.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
        and (not only or name in only)
    }


@st.composite
def _configs(draw: st.DrawFn) -> Config:
    """Accepted configurations that differ from the defaults in a few fields of a few sections."""
    values: dict[str, Any] = {}
    inner = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    for section, own in [("", Config), *inner.items()]:
        fields = _fields(own)
        names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True))
        chosen = {name: draw(fields[name]) for name in names}
        more = values | (chosen if not section else {section: chosen})
        with suppress(ValidationError):  # what does not go together is left out, section by section
            Config.model_validate(more)
            values = more
    return Config.model_validate(values)


@PROPERTY
@given(_configs())
def test_any_configuration_survives_its_file(config: Config) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        assert load_config(file=file) == config


@st.composite
def _samplings(draw: st.DrawFn) -> Config:
    """Accepted settings of the sampler, numbers anywhere from 1e-40 to 1e40, steps few enough to walk."""
    wild = st.one_of(st.floats(0.2, 4.0), st.floats(-40, 40).map(lambda e: 10.0**e))
    steps = draw(st.integers(1, 40))
    lo = draw(st.integers(0, steps - 1))
    hi = draw(st.integers(lo + 1, steps))
    sampling = {
        "steps": steps,
        "window": draw(st.sampled_from(flow.WINDOWS)),
        "window_range": (lo, hi),
        "window_size": draw(st.integers(1, hi - lo)),
        "sde": draw(st.sampled_from(flow.SDES)),
        "noise_level": draw(wild),
        "shift": draw(wild),
        "temperature": draw(st.one_of(wild, st.just(0.0))),
    }
    guidance = {"guidance_text": draw(wild), "guidance_image": draw(wild)}
    try:
        return Config.model_validate({"sampling": sampling, "eval": {"temperature": draw(wild)} | guidance})
    except ValidationError:
        assume(False)
        raise


@settings(PROPERTY, max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(_samplings())
def test_accepted_settings_give_finite_numbers(config: Config) -> None:
    """Walk the whole schedule in fp32, as rollout does, and score every stochastic step as replay does.

    Most wild numbers are refused; which are drawn depends on the modules that are loaded.
    """
    s, window = config.sampling, window_of(config, 3)
    times = flow.time_grid(s.steps, s.shift)
    assert (times.diff() < 0).all()
    x, v, noise, other = torch.randn(4, 1, 6, 2, generator=torch.Generator().manual_seed(0))
    before, after, leaf = [], [], (v + 0.01 * other).requires_grad_()
    for k in range(s.steps):
        t, t_next = times[k], times[k + 1]
        if k not in window.steps:
            x = flow.euler(x, v, t, t_next)
            continue
        drawn = flow.step(s.sde, x, v, t, t_next, noise_level=s.noise_level, t_second=times[1], noise=noise)
        assert drawn.p.std > 0
        assert drawn.p.std.isfinite()
        assert drawn.log_prob.isfinite().all()
        before.append(x)
        after.append(drawn.x_next)
        x = drawn.x_next
    assert x.isfinite().all()
    steps = list(window.steps)
    recorded = ImageSteps(
        torch.stack(before, 1),
        torch.stack(after, 1),
        times[None, steps],
        times[None, [k + 1 for k in steps]],
        times[1],
        s.sde,
        s.noise_level,
        0,
    )
    old, new = (step_densities(recorded, w[:, None].expand_as(recorded.x_BKND)) for w in (v, leaf))
    for ratio in (
        flow.ratio_norm(recorded.x_next_BKND, new, old),
        flow.log_ratio(s.sde, recorded.x_next_BKND, new, old),
        flow.latent_kl(new, old),
    ):
        assert ratio.isfinite().all()
        (gradient,) = torch.autograd.grad(ratio.sum(), leaf, retain_graph=True)
        assert gradient.isfinite().all()

    logits = torch.tensor([30.0, -30.0, 0.0, -torch.inf, 29.0])
    for temperature in (s.temperature, config.eval.temperature):
        for u in (0.0, 0.5, 0.999999):
            word = token(logits, temperature=temperature, uniform=torch.tensor(u, dtype=torch.float64))
            assert word.id != 3
            assert word.log_prob.isfinite()
            assert word.entropy.isfinite()
    guidance = Guidance(text=config.eval.guidance_text, image=config.eval.guidance_image)
    assert guided(v, other, noise, guidance).isfinite().all()
    assert math.isfinite(objective_of(config).image_clip)
    assert train_sampling(config).steps == s.steps


# ----- seeds and orders


def test_keys_do_not_collide() -> None:
    """Every seed that a long run derives is one of its own; neighbours differ in half their bits."""
    prompts = [f"prompt {k}" for k in range(60)] + ["1", "11", "text", "steps", ""]
    seeds = [derive(derive(0, "step", step), p, member) for step in range(40) for p in prompts for member in range(8)]
    seeds += [derive(s, key) for s in seeds[:5000] for key in ("text", "start", "steps", "shuffle")]
    seeds += [derive(seed, "order", k) for seed in range(20) for k in range(50)]
    seeds += [derive(k, "window", 1) for k in range(-50, 50)]
    assert len(set(seeds)) == len(seeds) > 40_000
    assert all(0 <= s < 2**63 for s in seeds)
    flips = [(a ^ b).bit_count() for a, b in pairwise(seeds[:2001])]
    assert abs(sum(flips) / len(flips) - 31.5) < 5 * 0.5 * 63**0.5 / 2000**0.5  # five standard errors


@PROPERTY
@given(st.integers(0, 2**63 - 1), st.integers(1, 50), st.integers(1, 50))
def test_a_longer_stream_begins_as_the_shorter(seed: int, short: int, more: int) -> None:
    """The budget of a text may change without changing its first words; uniform numbers are in [0, 1)."""
    few, many = uniform(seed, short), uniform(seed, short + more)
    assert torch.equal(many[:short], few)
    assert ((many >= 0) & (many < 1)).all()
    assert torch.equal(normal(seed, 3, 16), normal(seed, 3, 16))


NAMES = st.lists(st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=12, unique=True)


@PROPERTY
@given(NAMES, st.integers(1, 20), st.integers(0, 30), st.integers(0, 5))
def test_every_pass_over_the_prompts_is_a_permutation(names: list[str], count: int, step: int, seed: int) -> None:
    """Whatever divides what: passes join end to end, a step depends on nothing but its number, names are unique."""
    prompts = [Prompt(n, n) for n in names]
    config = Config.model_validate({"seed": seed, "train": {"prompts_per_step": count, "minibatches": 1}})
    steps = [prompts_for(prompts, config, k) for k in range(step + 1)]
    assert all(len({p.id for p in own}) == count for own in steps)
    drawn = [p.text for own in steps for p in own]
    for at in range(0, len(drawn) - len(names) + 1, len(names)):
        assert sorted(drawn[at : at + len(names)]) == sorted(names)
    assert prompts_for(prompts, config, step) == steps[-1]


# ----- episodes on disk

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


def _tensor(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    """fp32 numbers, with a few that are easily lost: -0, the smallest, the largest."""
    out = normal(draw(st.integers(0, 99)), *shape)
    if out.numel():
        out.view(-1)[0] = draw(st.sampled_from((0.0, -0.0, 1e-45, 3.4e38)))
    return out


def _pixels(draw: st.DrawFn) -> torch.Tensor:
    seed = draw(st.integers(0, 99))
    return torch.randint(256, (8, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@st.composite
def _segments(draw: st.DrawFn) -> GivenText | GivenImage | TextActions:
    ids = torch.arange(draw(st.integers(0, 5))) * 7
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return GivenText(draw(WORDS), draw(WORDS), ids)
    if kind == 1:
        view = _pixels(draw) if draw(st.booleans()) else None
        latent = _tensor(draw, draw(st.sampled_from((0, 2))), 3)
        return GivenImage(draw(WORDS), (1, 2), latent, _pixels(draw), view)
    closing = draw(st.sampled_from(((), (3,), (3, 4))))
    log_prob = -_tensor(draw, len(ids)).abs()
    return TextActions(ids, log_prob, draw(st.booleans()), draw(st.floats(0.01, 9)), (1,), closing, draw(WORDS))


@st.composite
def _images(draw: st.DrawFn) -> ImageActions:
    steps = draw(st.integers(0, 2))
    return ImageActions(
        grid=(1, 2),
        times=flow.time_grid(4, draw(st.floats(0.5, 5))),
        window=flow.Window(draw(st.integers(0, 2)), steps),
        sde=draw(st.sampled_from(flow.SDES)),
        noise_level=draw(st.floats(0.01, 1)),
        before=_tensor(draw, steps, 2, 3),
        after=_tensor(draw, steps, 2, 3),
        log_prob=_tensor(draw, steps),
        latent=_tensor(draw, 2, 3),
        pixels=_pixels(draw),
    )


@st.composite
def _groups(draw: st.DrawFn) -> list[Group]:
    """Groups of episodes of any segments, each with a picture in the end."""
    groups = []
    for _ in range(draw(st.integers(1, 2))):
        metadata = draw(st.dictionaries(WORDS, JSON, max_size=2))
        prompt = Prompt(draw(WORDS), draw(WORDS), metadata, draw(st.none() | WORDS))
        episodes = []
        for member in range(draw(st.integers(1, 2))):
            segments = (*draw(st.lists(_segments(), max_size=3)), draw(_images()))
            episodes.append(Episode(prompt, member, draw(st.integers(0, 2**63 - 1)), segments))
        groups.append(Group(prompt, tuple(episodes)))
    return groups


def _bits(value: Any) -> Any:
    """A form to compare that tells -0 from 0, and a list from a tuple."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if hasattr(value, "__dataclass_fields__"):
        return type(value), {n: _bits(v) for n, v in vars(value).items()}
    if isinstance(value, tuple | list):
        return type(value), [_bits(v) for v in value]
    return value


@PROPERTY
@given(_groups())
def test_any_episodes_survive_their_files_to_the_bit(groups: list[Group]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        save_episodes(groups, Path(directory) / "own")
        assert _bits(load_episodes(Path(directory) / "own")) == _bits(groups)
