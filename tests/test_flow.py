"""The flow's transition: densities, limits, exact marginals, windows. Time: t = 1 is noise."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal

from unigrpo_cli.algo import flow

SDES = ["flow", "dance", "cps"]


def _latents(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, v, noise = torch.randn(3, 5, 7, 4, generator=generator, dtype=torch.float64)
    return x, v, noise


def _at(t: float, t_next: float) -> dict[str, torch.Tensor]:
    return {"t": torch.tensor(t, dtype=torch.float64), "t_next": torch.tensor(t_next, dtype=torch.float64)}


SECOND = torch.tensor(0.96, dtype=torch.float64)


def test_grid_of_the_paper() -> None:
    """25 points at shift 3; values of the specification's table."""
    t = flow.time_grid(24, shift=3.0)
    assert t.dtype == torch.float32
    expected = torch.tensor([1.0, 0.985714, 0.970588, 0.954545, 0.937500, 0.919355])
    torch.testing.assert_close(t[:6], expected, atol=1e-6, rtol=0)
    assert t[-1] == 0
    assert len(t) == 25
    assert (t.diff() < 0).all()


def test_coefficients_of_the_papers_first_steps() -> None:
    """sigma, deviation and both coefficients at noise level 0.8, as tabulated from the official formula."""
    t = flow.time_grid(24, shift=3.0, dtype=torch.float64)
    table = [
        (0.800000, 0.680000, -0.014286),
        (0.817292, 0.661176, -0.019966),
        (0.582086, 0.825455, -0.021176),
        (0.478634, 0.880000, -0.022500),
        (0.417365, 0.907097, -0.023952),
    ]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for k, (std, on_x, on_v) in enumerate(table):
        at = {"noise_level": 0.8, "t_second": t[1]}
        assert flow.transition("flow", one, zero, t[k], t[k + 1], **at).std.item() == pytest.approx(std, abs=1e-6)
        assert flow.transition("flow", one, zero, t[k], t[k + 1], **at).mean.item() == pytest.approx(on_x, abs=1e-6)
        assert flow.transition("flow", zero, one, t[k], t[k + 1], **at).mean.item() == pytest.approx(on_v, abs=1e-6)


def test_the_path_that_is_learnt_is_the_one_that_is_sampled() -> None:
    """Noise at t = 1, data at t = 0; Euler steps with its velocity stay on it, and each sees the same data."""
    x_0, _, noise = _latents()
    v = flow.path_velocity(x_0, noise)
    for t, t_next in pairwise(flow.time_grid(6, shift=3.0, dtype=torch.float64)):
        x = flow.noised(x_0, noise, t)
        torch.testing.assert_close(flow.euler(x, v, t, t_next), flow.noised(x_0, noise, t_next))
        torch.testing.assert_close(flow.data_estimate(x, v, t), x_0)
    assert torch.equal(flow.noised(x_0, noise, torch.ones(())), noise)
    assert torch.equal(flow.noised(x_0, noise, torch.zeros(())), x_0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_times_to_learn_are_logit_normal_on_the_samplers_grid(shift: float) -> None:
    """The grid's shift of a time is the time of the shifted number: ln(t / (1 - t)) = z + ln shift."""
    z = _latents()[0]
    t, u = flow.logit_normal_times(z, shift), torch.sigmoid(z)
    torch.testing.assert_close(t, shift * u / (1 + (shift - 1) * u))
    torch.testing.assert_close(torch.logit(t) - z, torch.full_like(z, math.log(shift)))
    with pytest.raises(ValueError, match="shift > 0"):
        flow.logit_normal_times(z, 0.0)


@pytest.mark.parametrize("sde", ["flow", "dance"])
def test_log_prob_is_torchs_normal(sde: str) -> None:
    x, v, noise = _latents()
    action = flow.step(sde, x, v, **_at(0.8, 0.7), noise_level=0.7, t_second=SECOND, noise=noise)
    density = Normal(action.p.mean, action.p.std).log_prob(action.x_next).mean(dim=(-2, -1))
    torch.testing.assert_close(action.log_prob, density, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("t", [1.0, 0.6])
def test_what_is_drawn_is_what_is_scored(sde: str, t: float) -> None:
    """Drawing with noise and scoring the result are the same call: equal to the bit."""
    x, v, noise = _latents()
    common = {**_at(t, t - 0.1), "noise_level": 0.7, "t_second": SECOND}
    drawn = flow.step(sde, x, v, **common, noise=noise)
    scored = flow.step(sde, x, v, **common, x_next=drawn.x_next)
    assert torch.equal(drawn.log_prob, scored.log_prob)
    torch.testing.assert_close((drawn.x_next - scored.p.mean) / scored.p.std, noise, rtol=1e-9, atol=1e-9)


def test_a_step_needs_noise_or_an_action() -> None:
    x, v, noise = _latents()
    for given in ({}, {"noise": noise, "x_next": x}):
        with pytest.raises(ValueError, match="either noise"):
            flow.step("flow", x, v, **_at(0.8, 0.7), noise_level=0.7, t_second=SECOND, **given)


@pytest.mark.parametrize("sde", SDES)
def test_without_noise_it_is_the_euler_step(sde: str) -> None:
    x, v, _ = _latents()
    common = _at(0.8, 0.7)
    p = flow.transition(sde, x, v, **common, noise_level=0.0, t_second=SECOND)
    torch.testing.assert_close(p.mean, flow.euler(x, v, **common), rtol=1e-12, atol=1e-12)
    assert p.std == 0


def test_euler_arrives_at_the_data() -> None:
    """With the exact velocity of a straight path, any grid ends at x_0."""
    x_0, noise, _ = _latents()
    x = noise
    for t, t_next in pairwise(flow.time_grid(7, 3.0)):
        x = flow.euler(x, noise - x_0, t.double(), t_next.double())
    torch.testing.assert_close(x, x_0, atol=1e-6, rtol=0)


MEAN, SPREAD, END = 1.5, 0.6, 0.02


def _marginal(t: float) -> tuple[float, float]:
    """Mean and variance of x_t for data N(1.5, 0.6^2)."""
    return (1 - t) * MEAN, (1 - t) ** 2 * SPREAD**2 + t * t


def _variance_error(sde: str, steps: int, noise_level: float, start: float, flip: bool = False) -> tuple[float, float]:
    """Push mean and variance through the kernel in closed form; how far from the exact marginal at the end.

    For Gaussian data the exact velocity is affine in x, so each step is affine too: its gain and offset are
    the kernel's answers at two points. No sample is drawn.
    """
    mean, variance = _marginal(start)
    grid = torch.linspace(start, END, steps + 1, dtype=torch.float64)
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, t_next in pairwise(grid):
        now = float(t)
        slope = (now - (1 - now) * SPREAD**2) / _marginal(now)[1]
        v = slope * points - slope * (1 - now) * MEAN - MEAN
        p = flow.transition(sde, points, v, t, t_next, noise_level=noise_level, t_second=grid[1])
        if flip:  # the drift correction with the wrong sign
            p = flow.Transition(2 * flow.euler(points, v, t, t_next) - p.mean, p.std)
        offset, gain = float(p.mean[0]), float(p.mean[1] - p.mean[0])
        mean, variance = gain * mean + offset, gain**2 * variance + float(p.std) ** 2
    return mean - _marginal(END)[0], variance - _marginal(END)[1]


@pytest.mark.parametrize("sde", ["flow", "dance"])
@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_stochastic_steps_keep_the_flows_marginals(sde: str, noise_level: float) -> None:
    """Mean exact, variance error of first order: four times the steps, a quarter of the error."""
    coarse, fine = (_variance_error(sde, n, noise_level, 0.95) for n in (640, 2560))
    assert abs(coarse[0]) < 1e-10
    assert abs(fine[0]) < 1e-10
    assert 3.4 < coarse[1] / fine[1] < 4.6


def test_marginals_break_when_the_drift_correction_is_flipped() -> None:
    """The check above can fail: with the sign wrong the error stays, however many steps."""
    errors = [_variance_error("flow", n, 0.7, 0.95, flip=True)[1] for n in (640, 2560)]
    assert min(map(abs, errors)) > 1.0


def test_the_substitution_at_t_1_costs_an_order() -> None:
    """Flow-GRPO replaces the infinite sigma at t = 1 by that of the second point; the error then falls slower."""
    coarse, fine = (abs(_variance_error("flow", n, 0.7, 1.0)[1]) for n in (160, 640))
    assert coarse / fine < 3.0


def test_cps_leaves_no_excess_noise() -> None:
    """From x_t = (1 - t) x_0 + t e, the coefficient of all noise after a step is t_next exactly."""
    at = _at(0.9, 0.7)
    unit, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    common = {**at, "noise_level": 0.8, "t_second": SECOND}
    # x_0 = 0, e = 1: x_t = t, v = 1.
    kept = flow.transition("cps", 0.9 * unit, unit, **common)
    assert math.hypot(kept.mean.item(), kept.std.item()) == pytest.approx(0.7, abs=1e-12)
    # x_0 = 1, e = 0: x_t = 1 - t, v = -1.
    data = flow.transition("cps", 0.1 * unit, zero - 1, **common)
    assert data.mean.item() == pytest.approx(0.3, abs=1e-12)


def _two_policies(sde: str = "flow") -> tuple[torch.Tensor, flow.Transition, flow.Transition]:
    x, v, noise = _latents()
    shift = 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    common = {**_at(0.9, 0.8), "noise_level": 0.8, "t_second": SECOND}
    old = flow.step(sde, x, v, **common, noise=noise)
    new = flow.transition(sde, x, v + shift, **common)
    return old.x_next, new, old.p


@pytest.mark.parametrize("sde", SDES)
def test_log_ratio_is_the_difference_of_log_probs(sde: str) -> None:
    x_next, new, old = _two_policies(sde)
    difference = flow.log_prob(sde, x_next, new) - flow.log_prob(sde, x_next, old)
    ours = flow.log_ratio(sde, x_next, new, old).mean(dim=(-2, -1))
    torch.testing.assert_close(ours, difference, rtol=1e-9, atol=1e-12)


def test_ratio_norm_is_the_papers_formula() -> None:
    """Eq 5 as printed: std * (log r + |mu_old - mu_new|^2 / (2 std^2)), means over elements."""
    x_next, new, old = _two_policies()
    log_r = flow.log_prob("flow", x_next, new) - flow.log_prob("flow", x_next, old)
    distance = ((old.mean - new.mean) ** 2).mean(dim=(-2, -1))
    printed = old.std * (log_r + distance / (2 * old.std**2))
    ours = flow.ratio_norm(x_next, new, old).mean(dim=(-2, -1))
    torch.testing.assert_close(ours, printed, rtol=1e-9, atol=1e-12)


def test_ratio_norm_is_exactly_zero_before_the_first_update() -> None:
    x_next, _, old = _two_policies()
    assert (flow.ratio_norm(x_next.float(), old, old) == 0).all()


def test_ratio_norm_is_centred_where_the_raw_ratio_is_not() -> None:
    """Over the noise, its expectation is 0; the raw log-ratio's is minus the KL. In closed form, e = +1 and -1."""
    x, v, _ = _latents()
    common = {**_at(0.9, 0.8), "noise_level": 0.8, "t_second": SECOND}
    old, new = (flow.transition("flow", x, w, **common) for w in (v, v + 0.3))
    both = [old.mean + sign * old.std for sign in (1, -1)]
    centred = sum(flow.ratio_norm(y, new, old).mean() for y in both) / 2
    raw = sum(flow.log_ratio("flow", y, new, old).mean() for y in both) / 2
    assert abs(centred) < 1e-12
    torch.testing.assert_close(raw, -flow.latent_kl(new, old).mean(), rtol=1e-9, atol=0)


def test_latent_kl_is_torchs() -> None:
    _, new, old = _two_policies()
    exact = torch.distributions.kl_divergence(Normal(new.mean, new.std), Normal(old.mean, old.std))
    torch.testing.assert_close(flow.latent_kl(new, old), exact.mean(dim=(-2, -1)), rtol=1e-9, atol=1e-12)


def test_velocity_mse_has_no_weight_in_t() -> None:
    _, v, _ = _latents()
    assert flow.velocity_mse(v, v + 0.5).tolist() == pytest.approx([0.25] * len(v))


def test_windows() -> None:
    def make(kind: str, **kwargs) -> flow.Window:
        return flow.sde_window(kind, **({"steps": 10, "size": 3, "within": (0, 5)} | kwargs))

    assert list(make("all").steps) == list(range(9))
    assert list(make("fixed").steps) == [0, 1, 2]
    assert list(make("fixed", within=(4, 9)).steps) == [4, 5, 6]
    assert [make("random", uniform=u).start for u in (0.0, 0.34, 0.67, 0.9999)] == [0, 1, 2, 2]
    assert [make("sliding", turn=k).start for k in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "wrong", [{"size": 6}, {"within": (3, 5)}, {"within": (0, 11), "size": 11}, {"size": 0}, {"kind": "some"}]
)
def test_windows_that_do_not_fit(wrong: dict) -> None:
    kind = wrong.pop("kind", "random")
    with pytest.raises(ValueError, match="window"):
        flow.sde_window(kind, **({"steps": 10, "size": 3, "within": (0, 5)} | wrong))


def test_all_starts_of_a_random_window_are_equally_likely() -> None:
    draws = torch.linspace(0, 1, 3001, dtype=torch.float64)[:-1]
    starts = [flow.sde_window("random", steps=10, size=3, within=(0, 5), uniform=float(u)).start for u in draws]
    assert [starts.count(k) for k in range(3)] == [1000, 1000, 1000]
