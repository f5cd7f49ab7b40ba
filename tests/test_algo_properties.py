"""What must hold of the algorithm's functions for any parameters: laws and closed forms, drawn by hypothesis.

Examples are derived from the tests' own code, so every run sees the same ones. Tensors come from a drawn seed.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from tests.small import terminal_loss
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.advantage import COMBINATIONS, EPS, NORMALIZERS, combined_advantage, group_advantage
from unigrpo_cli.algo.guidance import RENORMS, Guidance, guided
from unigrpo_cli.algo.objective import Actions, ImageSteps, Objective, Scores, step_log_ratios
from unigrpo_cli.algo.surrogate import clipped_surrogate, k3
from unigrpo_cli.algo.text import token

EXAMPLES = 100 if os.environ.get("UNIGRPO_LONG_TESTS") else 15
PROPERTY = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31)
SDES = st.sampled_from(flow.SDES)
TIMES = st.tuples(st.floats(0.01, 0.999), st.floats(0.05, 0.95)).map(lambda p: (p[0], p[0] * p[1]))
"""t, and t_next somewhere between 0 and it. Between .999 and 1 the tests' own differences cancel."""


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----- rewards to advantages


@st.composite
def _rewards(draw: st.DrawFn, ties: bool = True) -> Tensor:
    """Rewards [P, G] of any scale around any mean; often with ties, as verdicts have."""
    seed, prompts, members = draw(SEEDS), draw(st.integers(1, 4)), draw(st.integers(2, 9))
    raw = _normal(seed, prompts, members)
    if ties and draw(st.booleans()):
        raw = raw.round()
    return raw * 10.0 ** draw(st.integers(-3, 4)) + draw(st.floats(-100, 100))


@st.composite
def _opinions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rewards and where there are any."""
    reward = draw(_rewards())
    share = draw(st.sampled_from((0.0, 0.3, 0.7)))
    return reward, _normal(draw(SEEDS), *reward.shape) > Normal(0.0, 1.0).icdf(torch.tensor(max(share, 1e-6)))


@PROPERTY
@given(_opinions(), st.sampled_from(NORMALIZERS))
def test_advantages_are_about_the_rest_of_the_group(case: tuple[Tensor, Tensor], std: str) -> None:
    """They sum to zero, keep the order, are exactly 0 where there is no opinion or only one, and no NaN gets in."""
    reward, valid = case
    advantage = group_advantage(reward.masked_fill(~valid, math.nan), valid, normalize=std)
    assert advantage.isfinite().all()
    assert (advantage[~valid] == 0).all()
    assert advantage.sum(dim=1).abs().max() <= 1e-9 * (1 + advantage.abs().max()) * (1 + reward.abs().max())
    for own, known, a in zip(reward, valid, advantage, strict=True):
        if len(set(own[known].tolist())) < 2:
            assert (a == 0).all()
        order = own[known].argsort(stable=True)
        assert (a[known][order].diff() >= 0).all()


@PROPERTY
@given(_opinions(), st.sampled_from(NORMALIZERS), st.floats(0.01, 100), st.floats(-100, 100))
def test_advantages_do_not_know_the_rewards_units(
    case: tuple[Tensor, Tensor], std: str, scale: float, shift: float
) -> None:
    """Divided by a deviation, a r + b has the advantages of r; undivided, a times them (with eps as good as 0)."""
    reward, valid = case
    spread = (reward.amax(dim=1) - reward.amin(dim=1)).max()
    assume(spread == 0 or spread > 1e-3)
    own = group_advantage(reward, valid, normalize=std, eps=1e-30)
    other = group_advantage(scale * reward + shift, valid, normalize=std, eps=1e-30)
    same = torch.tensor([len(set(r[v].tolist())) > 1 for r, v in zip(reward, valid, strict=True)])
    factor = scale if std == "none" else 1.0
    torch.testing.assert_close(other[same], factor * own[same], rtol=1e-6, atol=1e-6 * factor * (1 + float(spread)))


@PROPERTY
@given(_opinions())
def test_advantages_have_deviation_1_where_their_name_says(case: tuple[Tensor, Tensor]) -> None:
    """ "group": over the opinions of each group that differ; "batch": over all opinions; abstentions are none."""
    reward, valid = case
    group, batch = (group_advantage(reward, valid, normalize=std, eps=1e-30) for std in ("group", "batch"))
    live = [k for k, (r, v) in enumerate(zip(reward, valid, strict=True)) if len(set(r[v].tolist())) > 1]
    for k in live:
        assert group[k][valid[k]].square().mean().item() == pytest.approx(1.0)
    if live:
        assert batch[valid].square().mean().item() == pytest.approx(1.0)


@PROPERTY
@given(_opinions(), SEEDS, st.sampled_from(NORMALIZERS), st.sampled_from(COMBINATIONS))
def test_the_order_of_members_and_of_groups_is_nothing(
    case: tuple[Tensor, Tensor], seed: int, std: str, how: str
) -> None:
    reward, valid = case
    generator = torch.Generator().manual_seed(seed)
    groups, members = (torch.randperm(n, generator=generator) for n in reward.shape)

    def shuffled(x: Tensor) -> Tensor:
        return x[groups][:, members]

    other = _normal(seed, *reward.shape)
    known = torch.ones_like(valid)

    def combine(change) -> Tensor:
        rewards = {"a": change(reward), "b": change(other)}
        return combined_advantage(
            rewards, {"a": 1.0, "b": 2.0}, {"a": change(valid), "b": change(known)}, how=how, normalize=std
        )

    torch.testing.assert_close(combine(shuffled), shuffled(combine(lambda x: x)), rtol=1e-9, atol=1e-9)


@PROPERTY
@given(_rewards(), st.sampled_from(COMBINATIONS), st.sampled_from(NORMALIZERS), st.floats(0.1, 3))
def test_combinations_centre_clamp_and_leave_constant_groups_alone(
    reward: Tensor, how: str, std: str, clamp: float
) -> None:
    """Every way to combine: sums of zero, exactly zero for a group that all rewards find alike, and clamped."""
    flat = torch.cat([reward, reward[:1, :1].expand(1, reward.shape[1])])
    rewards = {"a": flat, "b": flat.sin() * (flat != flat[-1, 0])}
    rewards["b"][-1] = 0.1
    known = {n: torch.ones_like(flat, dtype=torch.bool) for n in rewards}
    free = combined_advantage(rewards, {"a": 0.7, "b": 1.3}, known, how=how, normalize=std)
    assert free.isfinite().all()
    assert (free[-1] == 0).all()
    assert free.sum(dim=1).abs().max() <= 1e-9 * (1 + reward.abs().max())
    held = combined_advantage(rewards, {"a": 0.7, "b": 1.3}, known, how=how, normalize=std, clamp=clamp)
    assert torch.equal(held, free.clamp(-clamp, clamp))


WEIGHT = st.floats(-2, 2).filter(lambda w: abs(w) > 0.1)


@PROPERTY
@given(_opinions(), SEEDS, WEIGHT, WEIGHT, st.sampled_from(NORMALIZERS))
def test_combinations_are_what_they_say(case: tuple[Tensor, Tensor], seed: int, a: float, b: float, std: str) -> None:
    """ "sum" adds rewards, "gdpo" advantages, and divides by what they then are: weights of either sign, by hand.

    What a reward gave where it has no opinion is nothing to any of them.
    """
    reward, valid = case
    other = _normal(seed, *reward.shape)
    rewards, opinions = {"a": reward, "b": other}, {"a": valid, "b": torch.ones_like(valid)}
    weights = {"a": a, "b": b}
    everyone = group_advantage(a * reward + b * other, valid, normalize=std)
    added = combined_advantage(rewards, weights, opinions, how="sum", normalize=std)
    torch.testing.assert_close(added, everyone, rtol=1e-9, atol=1e-9)
    own = "batch" if std == "none" else std
    terms = a * group_advantage(reward, valid, normalize=own) + b * group_advantage(other, normalize=own)
    gdpo = combined_advantage(rewards, weights, opinions, how="gdpo", normalize=std)
    torch.testing.assert_close(gdpo, terms / (terms.square().mean().sqrt() + EPS), rtol=1e-9, atol=1e-9)
    for how in COMBINATIONS:
        spoilt = {"a": reward.masked_fill(~valid, 1e6), "b": other}
        found, wanted = (combined_advantage(r, weights, opinions, how=how, normalize=std) for r in (spoilt, rewards))
        assert torch.equal(found, wanted)


@PROPERTY
@given(_rewards())
def test_ranks_see_order_alone(reward: Tensor) -> None:
    """Any rising function of a reward has the same ranks, so the same advantages, to the bit."""
    known = {"a": torch.ones_like(reward, dtype=torch.bool)}
    own, risen = (
        combined_advantage({"a": r}, {"a": 1.0}, known, how="rank") for r in (reward, reward.sign() * reward**2)
    )
    assert torch.equal(own, risen)


# ----- the time grid and the window


@PROPERTY
@given(st.integers(1, 200), st.floats(0.02, 50))
def test_time_runs_from_1_to_0(steps: int, shift: float) -> None:
    """Strictly falling in fp32; and a shift of 1/s is the grid of s from the other end."""
    times = flow.time_grid(steps, shift)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    wide, mirrored = (flow.time_grid(steps, s, torch.float64) for s in (shift, 1 / shift))
    torch.testing.assert_close(mirrored, 1 - wide.flip(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        flow.time_grid(steps, 1.0, torch.float64), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    )


@PROPERTY
@given(
    st.sampled_from(flow.WINDOWS),
    st.integers(2, 60),
    st.data(),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 10**6),
)
def test_windows_stay_where_they_may_be(kind: str, steps: int, data: st.DataObject, u: float, turn: int) -> None:
    lo = data.draw(st.integers(0, steps - 1))
    hi = data.draw(st.integers(lo + 1, steps))
    size = data.draw(st.integers(1, hi - lo))
    window = flow.sde_window(kind, steps=steps, size=size, within=(lo, hi), uniform=u, turn=turn)
    if kind == "all":
        assert list(window.steps) == list(range(steps - 1))
        return
    assert len(window.steps) == size
    assert lo <= window.steps[0]
    assert window.steps[-1] < hi
    if kind == "sliding":
        later = flow.sde_window(kind, steps=steps, size=size, within=(lo, hi), turn=turn + 1)
        assert later.start in (window.start + 1, lo)


# ----- transitions

Common = dict[str, Tensor | float]


@st.composite
def _steps(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[str, Tensor, Tensor, Tensor, Common]:
    """A kernel, x, v, noise [2, 3, 4], and when and how noisy the step is; one in four begins at t = 1."""
    sde, seed, noise_level = draw(SDES), draw(SEEDS), draw(st.floats(0.05, 0.99))
    t, t_next = draw(TIMES)
    if draw(st.integers(0, 3)) == 0:
        t, t_next = 1.0, t_next / t
    x, v, noise = _normal(seed, 3, 2, 3, 4, dtype=dtype)
    at = {"t": torch.tensor(t, dtype=dtype), "t_next": torch.tensor(t_next, dtype=dtype)}
    second = at["t_next"] if t == 1 else torch.tensor(0.97, dtype=dtype)
    return sde, x, v, noise, {**at, "noise_level": noise_level, "t_second": second}


@PROPERTY
@given(_steps())
def test_scores_are_the_densitys(case: tuple) -> None:
    """torch's normal log-density, mean over elements; of cps its exponent without the scale."""
    sde, x, v, noise, common = case
    drawn = flow.step(sde, x, v, **common, noise=noise)
    assert (drawn.p.std > 0).all()
    expected = Normal(drawn.p.mean, drawn.p.std.expand_as(x)).log_prob(drawn.x_next)
    if sde == "cps":
        constant = -drawn.p.std.log() - math.log(2 * math.pi) / 2
        expected = (expected - constant) * 2 * drawn.p.std**2
    torch.testing.assert_close(drawn.log_prob, expected.mean(dim=(-2, -1)), rtol=1e-9, atol=1e-12)
    scored = flow.step(sde, x, v, **common, x_next=drawn.x_next)
    assert torch.equal(scored.log_prob, drawn.log_prob)


@PROPERTY
@given(_steps())
def test_deviations_are_the_kernels_own(case: tuple) -> None:
    """In plain numbers: marginals alone would let any deviation pass whose drift goes with it."""
    sde, x, v, _, common = case
    t, t_next, second, a = (float(common[n]) for n in ("t", "t_next", "t_second", "noise_level"))
    expected = {
        "flow": a * math.sqrt(t / (1 - (second if t == 1 else t))) * math.sqrt(t - t_next),
        "dance": a * math.sqrt(t - t_next),
        "cps": t_next * math.sin(a * math.pi / 2),
    }[sde]
    assert flow.transition(sde, x, v, **common).std.item() == pytest.approx(expected, rel=1e-12)


@PROPERTY
@given(_steps(), st.floats(0.3, 1.0))
def test_less_noise_is_nearer_to_euler(case: tuple, level: float) -> None:
    """The distance to Euler's step is of second order in the noise level: a tenth of it, a hundredth of that."""
    sde, x, v, _, common = case
    at = {"t": common["t"], "t_next": common["t_next"]}
    straight = flow.euler(x, v, **at)
    apart = []
    for a in (0.1 * level, 0.01 * level, 0.0):
        p = flow.transition(sde, x, v, **at, noise_level=a, t_second=common["t_second"])
        apart.append(((p.mean - straight).norm().item(), p.std.max().item()))
    assert apart[2] == (pytest.approx(0.0, abs=1e-12), 0.0)
    assert apart[1][1] == pytest.approx(0.1 * apart[0][1], rel=0.02)
    assert apart[1][0] <= 0.0103 * apart[0][0] + 1e-12


@PROPERTY
@given(_steps(), st.floats(0.001, 1.0))
def test_ratios_are_differences_of_scores(case: tuple, moved: float) -> None:
    """log r two ways, RatioNorm as the paper prints it, and both exactly 0 for one and the same policy, in fp32."""
    sde, x, v, noise, common = case
    new_v = v + moved * noise.flip(0)
    old = flow.step(sde, x, v, **common, noise=noise)
    new = flow.transition(sde, x, new_v, **common)
    log_r = flow.log_ratio(sde, old.x_next, new, old.p).mean(dim=(-2, -1))
    plain = flow.log_prob(sde, old.x_next, new) - old.log_prob
    torch.testing.assert_close(log_r, plain, rtol=1e-6, atol=1e-8 * (1 + plain.abs().max().item()))
    if sde != "cps":
        distance = (new.mean - old.p.mean).square().mean(dim=(-2, -1))
        printed = old.p.std * (log_r + distance / (2 * old.p.std**2))
        normed = flow.ratio_norm(old.x_next, new, old.p).mean(dim=(-2, -1))
        torch.testing.assert_close(normed, printed, rtol=1e-6, atol=1e-9 * (1 + printed.abs().max().item()))
    narrow = flow.Transition(old.p.mean.float(), old.p.std.float())
    assert (flow.log_ratio(sde, old.x_next.float(), narrow, narrow) == 0).all()
    assert (flow.ratio_norm(old.x_next.float(), narrow, narrow) == 0).all()


@PROPERTY
@given(_steps())
def test_the_first_gradient_is_the_noise(case: tuple) -> None:
    """At equal velocities d log r~ / dv = e c dt / (N D) and d log r / dv is that over the deviation: REINFORCE's.

    With e the noise that was drawn and c dt the step's own derivative by v. Of cps, whose score has no scale,
    2 e std^2 instead of e / std.
    """
    sde, x, v, noise, common = case
    old = flow.step(sde, x, v, **common, noise=noise)
    by_v = flow.transition(sde, x, v + 1, **common).mean - old.p.mean
    for ratio, factor in (
        ("norm", torch.ones(())),
        ("plain", 2 * old.p.std if sde == "cps" else 1 / old.p.std),
    ):
        leaf = v.clone().requires_grad_()
        new = flow.transition(sde, x, leaf, **common)
        if ratio == "norm":
            flow.ratio_norm(old.x_next, new, old.p).mean(dim=(-2, -1)).sum().backward()
        else:
            flow.log_ratio(sde, old.x_next, new, old.p).mean(dim=(-2, -1)).sum().backward()
        torch.testing.assert_close(leaf.grad, noise * by_v * factor / 12, rtol=1e-6, atol=1e-9)


@PROPERTY
@given(_steps(), st.floats(-3, 3))
def test_penalties_are_squared_distances(case: tuple, scale: float) -> None:
    """0 with gradient 0 at the reference, c^2 times as large c times as far, whatever the state.

    The latent KL is the velocity's square times w_t = (|dt| / 2) (1 / s + s (1 - t) / (2 t))^2 (Flow-GRPO), with s
    the deviation rate: that is what makes it vanish at high noise.
    """
    sde, x, v, noise, common = case
    assume(abs(scale) > 0.01)

    def both(own: Tensor) -> dict[str, Tensor]:
        p, p_ref = (flow.transition(sde, x, w, **common) for w in (own, v))
        return {"mse": flow.velocity_mse(own, v), "kl": flow.latent_kl(p, p_ref)}

    near, far, there = both(v + noise), both(v + scale * noise), both(leaf := v.clone().requires_grad_())
    for name in near:
        assert (near[name] > 0).all()
        torch.testing.assert_close(far[name], scale**2 * near[name], rtol=1e-6, atol=1e-12)
        assert (there[name] == 0).all()
        (gradient,) = torch.autograd.grad(there[name].sum(), leaf, retain_graph=True)
        assert (gradient == 0).all()
    if sde != "cps":
        t, dt = common["t"], common["t_next"] - common["t"]
        s = flow.transition(sde, x, v, **common).std / (-dt).sqrt()
        weight = -dt / 2 * (1 / s + s * (1 - t) / (2 * t)) ** 2
        torch.testing.assert_close(near["kl"], weight * near["mse"], rtol=1e-9, atol=1e-12)


@PROPERTY
@given(SEEDS, st.floats(0.05, 0.99), SDES)
def test_steps_of_one_pass_do_not_know_of_each_other(seed: int, noise_level: float, sde: str) -> None:
    """K steps side by side are the same K steps one by one, to the bit, in the fp32 that rollout draws in."""
    times = flow.time_grid(6, 3.0)
    x, v, noise = _normal(seed, 3, 2, 5, 3, 4, dtype=torch.float32)
    common = {"noise_level": noise_level, "t_second": times[1]}
    at = {"t": times[:5].expand(2, 5)[..., None, None], "t_next": times[1:6].expand(2, 5)[..., None, None]}
    together = flow.step(sde, x[:, :5], v[:, :5], **{n: w.clone() for n, w in at.items()}, **common, noise=noise)
    for k in range(5):
        alone = flow.step(sde, x[:, k], v[:, k], times[k], times[k + 1], **common, noise=noise[:, k])
        assert torch.equal(alone.x_next, together.x_next[:, k])
        torch.testing.assert_close(alone.log_prob, together.log_prob[:, k], rtol=1e-6, atol=1e-7)


# ----- marginals in closed form: data N(MEAN, SPREAD^2), the exact velocity, no sample drawn

MEAN, SPREAD = 1.5, 0.6


def _marginal(t: float) -> tuple[float, float]:
    return (1 - t) * MEAN, (1 - t) ** 2 * SPREAD**2 + t * t


def _pushed(sde: str, times: Tensor, noise_level: float) -> tuple[float, float]:
    """Errors of mean and variance after walking `times` from the exact marginal at their start."""
    mean, variance = _marginal(float(times[0]))
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, t_next in pairwise(times):
        now = float(t)
        slope = (now - (1 - now) * SPREAD**2) / _marginal(now)[1]
        v = slope * points - slope * (1 - now) * MEAN - MEAN
        p = flow.transition(sde, points, v, t, t_next, noise_level=noise_level, t_second=times[1])
        offset, gain = float(p.mean[0]), float(p.mean[1] - p.mean[0])
        mean, variance = gain * mean + offset, gain**2 * variance + float(p.std) ** 2
    exact = _marginal(float(times[-1]))
    return mean - exact[0], variance - exact[1]


def _from(start: float, steps: int) -> Tensor:
    return torch.linspace(start, 0.02, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("start", [1.0, 0.95])
@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_dance_and_euler_keep_the_marginals_from_any_start(start: float, noise_level: float) -> None:
    """First order also from t = 1: sigma is finite there, nothing is substituted."""
    coarse, fine = (_pushed("dance", _from(start, n), noise_level) for n in (320, 1280))
    assert abs(coarse[0]) < 1e-10
    assert 3.4 < coarse[1] / fine[1] < 4.6


@pytest.mark.parametrize("noise_level", [pytest.param(0.3, marks=pytest.mark.long), 0.7])
def test_flow_at_t_1_adds_more_noise_than_it_takes(noise_level: float) -> None:
    """With the second point's sigma, the first step keeps (1 - a^2/2)^2 of a variance of 1 and adds a^2: a^4/4 up.

    However fine the grid: its first step alone has a deviation of a. The mean is exact as ever.
    """
    for steps in (50, 5000):
        times = _from(1.0, steps)
        mean, _ = _pushed("flow", times, noise_level)
        assert abs(mean) < 1e-10
        _, variance = _pushed("flow", times[:2], noise_level)
        assert variance == pytest.approx(noise_level**4 / 4, abs=5 / steps)


@PROPERTY
@given(TIMES, st.floats(0.05, 0.99))
def test_cps_keeps_the_mean_and_loses_what_the_guess_of_the_data_lost(at: tuple[float, float], a: float) -> None:
    """One step from the exact marginal: mean exact; variance short of it by what posterior means have less.

    With V the variance at t, the guesses of data and noise have variances (1-t)^2 s^4 / V and t^2 / V and
    covariance (1-t) t s^2 / V; the step adds them with 1-t' and c = sqrt(t'^2 - std^2), and std^2.
    """
    t, t_next = at
    mean, variance = _pushed("cps", torch.tensor([t, t_next], dtype=torch.float64), a)
    s2, v = SPREAD**2, _marginal(t)[1]
    std = t_next * math.sin(a * math.pi / 2)
    d, c = 1 - t_next, math.sqrt(t_next**2 - std**2)
    guessed = (d * (1 - t) * s2 + c * t) ** 2 / v + std**2
    assert mean == pytest.approx(0.0, abs=1e-12)
    assert variance == pytest.approx(guessed - _marginal(t_next)[1], abs=1e-12)
    assert variance <= 1e-12


# ----- the surrogate


@PROPERTY
@given(SEEDS, st.floats(1e-6, 0.9), st.floats(0.1, 5.0))
def test_the_surrogate_is_the_textbooks(seed: int, clip: float, spread: float) -> None:
    """min(r A, clip(r) A): value, gradient and where it binds, for ratios on all sides of the clip."""
    log_ratio = (_normal(seed, 200) * spread * clip).requires_grad_()
    advantage = _normal(seed + 1, 200)
    ours = clipped_surrogate(log_ratio, advantage, clip)
    (gradient,) = torch.autograd.grad(ours.gain.sum(), log_ratio)
    ratio = log_ratio.detach().exp()
    textbook = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    binds = ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
    torch.testing.assert_close(ours.gain + advantage, textbook, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.clipped, binds)
    torch.testing.assert_close(gradient, torch.where(binds, 0.0, ratio * advantage), rtol=1e-9, atol=0)


@PROPERTY
@given(SEEDS, st.floats(1e-4, 30.0))
def test_k3_is_never_negative_and_flat_at_the_reference(seed: int, spread: float) -> None:
    """Its gradient by the policy's log-probability is 1 - p_ref / p, and 0 at equality."""
    there = -_normal(seed, 100).abs() * spread
    here = (there + 0.5 * spread * _normal(seed + 1, 100)).requires_grad_()
    kl = k3(here, there)
    assert (kl >= 0).all()
    (gradient,) = torch.autograd.grad(kl.sum(), here)
    d = there - here.detach()
    inside = d.abs() < 20
    torch.testing.assert_close(gradient[inside], (1 - d.exp())[inside], rtol=1e-9, atol=1e-12)
    same = there.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(k3(same, there).sum(), same)
    assert (gradient == 0).all()


# ----- words


@st.composite
def _logits(draw: st.DrawFn) -> Tensor:
    """fp32 logits [V] of any spread, some impossible, never all."""
    width, spread = draw(st.integers(1, 60)), draw(st.sampled_from((0.0, 0.5, 3.0, 30.0, 3e4)))
    logits = _normal(draw(SEEDS), width, dtype=torch.float32) * spread
    gone = _normal(draw(SEEDS), width) > draw(st.sampled_from((0.0, 9.0)))
    gone[draw(st.integers(0, width - 1))] = False
    return logits.masked_fill(gone, -torch.inf)


TEMPERATURES = st.sampled_from((0.01, 0.3, 1.0, 2.0, 100.0))
NUMBERS = (0.0, 1e-300, 0.1, 0.25, 0.5, 0.75, 0.999999, 1 - 2**-30, 1 - 2**-53)


@PROPERTY
@given(_logits(), TEMPERATURES)
def test_words_are_drawn_by_the_scored_distribution(logits: Tensor, temperature: float) -> None:
    """log-softmax at the temperature; larger numbers draw later words, down to the last bit of [0, 1)."""
    uniform = torch.tensor(NUMBERS, dtype=torch.float64)
    drawn = token(logits.expand(len(uniform), -1), temperature=temperature, uniform=uniform)
    assert (drawn.id.diff() >= 0).all()
    assert logits[drawn.id].isfinite().all(), "an impossible word"
    assert drawn.log_prob.isfinite().all()
    assert drawn.entropy.isfinite().all()
    assert (drawn.entropy >= 0).all()
    assert (drawn.entropy <= math.log(len(logits)) + 1e-5).all()
    exact = torch.log_softmax(logits.double() / temperature, dim=-1)
    spread = 1 + (logits[logits.isfinite()].abs().max() / temperature).item()
    torch.testing.assert_close(drawn.log_prob.double(), exact[drawn.id], rtol=1e-5, atol=1e-6 * spread)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), exact.exp().cumsum(0)])
    assert (below[drawn.id] <= uniform + 1e-6 * spread).all()
    assert (below[drawn.id + 1] >= uniform - 1e-6 * spread).all()


@PROPERTY
@given(_logits(), TEMPERATURES, st.integers(0, 59))
def test_the_scores_gradient_is_the_policys(logits: Tensor, temperature: float, at: int) -> None:
    """d log p(id) / d logits = (onehot - p) / T, finite at any logits; 0 for what is impossible."""
    possible = logits.isfinite().nonzero().flatten()
    id = possible[at % len(possible)]
    leaf = logits.clone().requires_grad_()
    token(leaf, temperature=temperature, id=id).log_prob.backward()
    p = torch.softmax(logits.double() / temperature, dim=-1)
    onehot = torch.nn.functional.one_hot(id, len(logits))
    torch.testing.assert_close(leaf.grad.double(), (onehot - p) / temperature, rtol=1e-3, atol=1e-3 / temperature)


# ----- guidance


@PROPERTY
@given(SEEDS, st.floats(1.0, 20.0), st.floats(1.0, 20.0), st.sampled_from(RENORMS), st.floats(0, 1))
def test_guidance_of_equal_contexts_is_none(seed: int, text: float, image: float, renorm: str, least: float) -> None:
    """If a poorer context says the same, there is nowhere to go; and no renormalisation lengthens the result."""
    v, unconditional, poorest = _normal(seed, 3, 2, 3, 4)
    how = Guidance(text=text, image=image, renorm=renorm, renorm_least=least)
    torch.testing.assert_close(guided(v, v, v, how), v, rtol=1e-6, atol=1e-6)
    raw = guided(v, unconditional, poorest, replace(how, renorm="global", renorm_least=1.0))
    if renorm != "text_channel":
        found = guided(v, unconditional, poorest, how)
        assert (found.norm(dim=2) <= raw.norm(dim=2) * (1 + 1e-9)).all()
        assert (found.norm(dim=2) >= least * raw.norm(dim=2) * (1 - 1e-9)).all()


@PROPERTY
@given(SEEDS, st.floats(0, 20), st.floats(0, 3))
def test_guidance_goes_from_the_poorer_to_the_richer(seed: int, text: float, image: float) -> None:
    """By hand where nothing is renormalised; up to an image scale of 1 the third context is not even looked at."""
    v, unconditional, poorest = _normal(seed, 3, 2, 3, 4)
    expected = unconditional + text * (v - unconditional)
    if image > 1:
        expected = poorest + image * (expected - poorest)
    how = Guidance(text=text, image=image, renorm_least=1.0)
    found = guided(v, unconditional, poorest if image > 1 else None, how)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


# ----- the objective

B, L, K, N, D = 5, 4, 3, 2, 3


@st.composite
def _objectives(draw: st.DrawFn) -> Objective:
    return Objective(
        text_weight=draw(st.sampled_from((0.0, 0.5, 1.0))),
        image_weight=draw(st.sampled_from((0.5, 1.0, 2.0))),
        text_clip=draw(st.floats(1e-3, 0.5)),
        image_clip=draw(st.floats(1e-6, 0.1)),
        text_kl=draw(st.sampled_from((0.0, 0.1))),
        trust_region=draw(st.sampled_from(("ratio-norm", "ratio"))),
        penalty=draw(st.sampled_from(("velocity-mse", "latent-kl", "none"))),
        penalty_weight=draw(st.floats(0.0, 1.0)),
    )


def _recorded(seed: int, sde: str) -> tuple[Actions, Scores, Scores, Scores, Tensor]:
    """Actions, new, old and reference scores, advantages; rows of unequal length, one without any word."""
    mask = torch.arange(L) < torch.tensor([4, 0, 1, 3, 2])[:, None]
    times = flow.time_grid(K + 1, 3.0, torch.float64)
    t, t_next = times[:K].expand(B, K), times[1 : K + 1].expand(B, K)
    x, v, noise, a, b = _normal(seed, 5, B, K, N, D)
    at = {"t": t[..., None, None], "t_next": t_next[..., None, None], "noise_level": 0.7, "t_second": times[1]}
    drawn = flow.step(sde, x, v, **at, noise=noise)
    steps = ImageSteps(x, drawn.x_next, t, t_next, times[1], sde, 0.7, 1)
    words, there, here = _normal(seed + 1, 3, B, L)
    entropy = words.abs()
    old = Scores(words - 2, entropy, (v,))
    reference = Scores(words - 2 + 0.1 * there, entropy, (v + 0.1 * a,))
    new = Scores(words - 2 + 0.1 * here, entropy + 1, (v + 0.05 * b,))
    return Actions(mask, torch.zeros(B, L, dtype=torch.long), (steps,)), new, old, reference, _normal(seed + 2, B)


def _rows(actions: Actions, rows: list[int]) -> Actions:
    names = ("x_BKND", "x_next_BKND", "t_BK", "t_next_BK")
    own = tuple(replace(s, **{n: getattr(s, n)[rows] for n in names}) for s in actions.images)
    return Actions(actions.mask_BL[rows], actions.segment_BL[rows], own)


def _of(scores: Scores, rows: list[int]) -> Scores:
    return Scores(scores.log_prob_BL[rows], scores.entropy_BL[rows], tuple(v[rows] for v in scores.velocities))


def _leaf(scores: Scores) -> Scores:
    v = tuple(v.clone().requires_grad_() for v in scores.velocities)
    return Scores(scores.log_prob_BL.clone().requires_grad_(), scores.entropy_BL, v)


def _gradients(leaf: Scores) -> list[Tensor]:
    parts = (leaf.log_prob_BL, *leaf.velocities)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]


@PROPERTY
@given(SEEDS, SDES, _objectives(), st.permutations(range(B)), st.sets(st.integers(1, B - 1)))
def test_any_split_of_a_step_is_the_whole(
    seed: int, sde: str, objective: Objective, order: list[int], cuts: set[int]
) -> None:
    """Loss, means and gradients of parts add up to those of all rows at once, whatever parts in whatever order."""
    actions, new, old, reference, advantage = _recorded(seed, sde)
    whole, parts = _leaf(new), _leaf(new)
    loss = terminal_loss(actions, whole, old, reference, advantage, objective, episodes=B)
    loss.total.backward()
    total, means, maxima = 0.0, dict.fromkeys(loss.means, 0.0), dict.fromkeys(loss.maxima, 0.0)
    for start, end in pairwise([0, *sorted(cuts), B]):
        own = order[start:end]
        part = terminal_loss(
            _rows(actions, own),
            _of(parts, own),
            _of(old, own),
            _of(reference, own),
            advantage[own],
            objective,
            episodes=B,
        )
        part.total.backward()
        total += part.total.item()
        means = {n: v + part.means[n].item() for n, v in means.items()}
        maxima = {n: max(v, part.maxima[n].item()) for n, v in maxima.items()}
    assert total == pytest.approx(loss.total.item(), rel=1e-9, abs=1e-12)
    assert means == pytest.approx({n: v.item() for n, v in loss.means.items()}, rel=1e-6, abs=1e-9)
    assert maxima == {n: v.item() for n, v in loss.maxima.items()}
    for one, other in zip(_gradients(parts), _gradients(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


@PROPERTY
@given(SEEDS, SDES, _objectives(), st.sampled_from((math.nan, math.inf, -math.inf, 1e30)))
def test_what_stands_in_the_padding_is_nothing(seed: int, sde: str, objective: Objective, poison: float) -> None:
    actions, new, old, reference, advantage = _recorded(seed, sde)
    found = []
    for spoilt in (False, True):
        own = [
            replace(s, log_prob_BL=torch.where(actions.mask_BL, s.log_prob_BL, poison)) if spoilt else s
            for s in (new, old, reference)
        ]
        own[0] = replace(own[0], entropy_BL=torch.where(actions.mask_BL, own[0].entropy_BL, poison))
        leaf = _leaf(own[0])
        loss = terminal_loss(actions, leaf, own[1], own[2], advantage, objective, episodes=B)
        loss.total.backward()
        found.append([loss.total.detach(), *loss.means.values(), *loss.maxima.values(), *_gradients(leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@PROPERTY
@given(SEEDS, SDES, _objectives())
def test_the_terms_add_up(seed: int, sde: str, objective: Objective) -> None:
    """total = text_weight (text + text_kl kl) + image_weight (image + penalty_weight penalty), of the means."""
    actions, new, old, reference, advantage = _recorded(seed, sde)
    loss = terminal_loss(actions, new, old, reference, advantage, objective, episodes=B)
    m = {n: v.item() for n, v in loss.means.items()}
    text = m.get("text/loss", 0.0) + objective.text_kl * m.get("text/kl", 0.0)
    held = objective.penalty_weight * m.get(f"image/{objective.penalty}", 0.0)
    image = m["image/loss"] + held
    expected = objective.text_weight * text + objective.image_weight * image
    assert loss.total.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert 0 <= m["image/clip_fraction"] <= 1
    assert 0 <= m.get("text/clip_fraction", 0.0) <= 1
    rotated = terminal_loss(actions, new, old, reference, advantage, objective, episodes=2 * B)
    assert rotated.total.item() == pytest.approx(expected / 2, rel=1e-9, abs=1e-12)


@PROPERTY
@given(SEEDS, SDES, _objectives())
def test_the_statistics_are_what_their_names_say(seed: int, sde: str, objective: Objective) -> None:
    """Means over an episode's own actions, then over episodes; largest magnitudes, not largest values."""
    actions, new, old, reference, advantage = _recorded(seed, sde)
    loss = terminal_loss(actions, new, old, reference, advantage, objective, episodes=B)
    found = {n: v.item() for n, v in (loss.means | loss.maxima).items()}

    def binds(d: Tensor, a: Tensor, clip: float) -> Tensor:
        return ((a > 0) & (d.expm1() > clip)) | ((a < 0) & (d.expm1() < -clip))

    d_BK = step_log_ratios(actions, new, old, objective)
    by_hand = {
        "image/clip_fraction": binds(d_BK, advantage[:, None], objective.image_clip).double().mean(),
        "image/abs_log_ratio": d_BK.abs().mean(),
        "image/max_abs_log_ratio": d_BK.abs().max(),
    }
    if objective.text_weight:
        rows = [
            (new.log_prob_BL[k, own] - old.log_prob_BL[k, own], advantage[k], new.entropy_BL[k, own])
            for k, own in enumerate(actions.mask_BL)
            if own.any()
        ]
        by_hand |= {
            "text/clip_fraction": sum(binds(d, a, objective.text_clip).double().mean() for d, a, _ in rows) / B,
            # r - 1 - log r: the KL from the old policy, whose samples these are
            "text/approx_kl": sum((d.expm1() - d).mean() for d, _, _ in rows) / B,
            "text/entropy": sum(entropy.mean() for _, _, entropy in rows) / B,
            "text/max_abs_log_ratio": torch.cat([d for d, _, _ in rows]).abs().max(),
        }
    for name, value in by_hand.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6), name
