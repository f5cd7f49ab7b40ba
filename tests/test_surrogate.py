"""The clipped surrogate: four quadrants by hand, value and gradient, and a clip of 1e-6 that acts at 1e-6."""

from __future__ import annotations

import math

import pytest
import torch

from unigrpo_cli.algo.surrogate import clipped_surrogate, k3

CLIP = 0.2


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient", "clipped"),
    [
        # min(r A, clip(r) A); d/d log r of r A is r A, of a bound it is 0
        (1.1, 2.0, 2.2, 2.2, False),  # A > 0, inside
        (1.5, 2.0, 2.4, 0.0, True),  # A > 0, above: held at 1.2 A
        (0.5, 2.0, 1.0, 1.0, False),  # A > 0, below: free to come back up
        (0.9, -2.0, -1.8, -1.8, False),  # A < 0, inside
        (0.5, -2.0, -1.6, 0.0, True),  # A < 0, below: held at 0.8 A
        (1.5, -2.0, -3.0, -3.0, False),  # A < 0, above: free to come back down
        (1.0, 2.0, 2.0, 2.0, False),  # the first update: REINFORCE's gradient
    ],
)
def test_quadrants(ratio: float, advantage: float, objective: float, gradient: float, clipped: bool) -> None:
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    result = clipped_surrogate(log_ratio, torch.tensor(advantage, dtype=torch.float64), CLIP)
    result.gain.backward()
    assert result.gain.item() + advantage == pytest.approx(objective, abs=1e-9)
    assert log_ratio.grad.item() == pytest.approx(gradient, abs=1e-9)
    assert bool(result.clipped) is clipped


@pytest.mark.parametrize("clip", [1e-6, 1e-5])
def test_small_clips_act_where_they_say_in_fp32(clip: float) -> None:
    """In fp32, exp(x) near 1 moves in steps of 1.2e-7; the clip must not."""
    log_ratio = torch.tensor([0.999 * clip, 1.001 * clip], dtype=torch.float32, requires_grad=True)
    result = clipped_surrogate(log_ratio, torch.ones(2), clip)
    result.gain.sum().backward()
    assert result.clipped.tolist() == [False, True]
    assert log_ratio.grad[0].item() == pytest.approx(math.exp(0.999 * clip), rel=1e-6)
    assert log_ratio.grad[1].item() == 0.0
    assert result.gain[0].item() == pytest.approx(math.expm1(0.999 * clip), rel=1e-6)
    assert result.gain[1].item() == pytest.approx(clip, rel=1e-6)


def test_agrees_with_the_textbook_form_in_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(1000, generator=generator, dtype=torch.float64) * 0.4
    advantage = torch.randn(1000, generator=generator, dtype=torch.float64)
    ratio = log_ratio.exp()
    textbook = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    ours = clipped_surrogate(log_ratio, advantage, CLIP)
    torch.testing.assert_close(ours.gain + advantage, textbook, rtol=1e-12, atol=1e-12)


def test_huge_ratios_stay_finite() -> None:
    log_ratio = torch.tensor([500.0, -500.0], requires_grad=True)
    gain = clipped_surrogate(log_ratio, torch.tensor([-1.0, 1.0]), CLIP).gain
    gain.sum().backward()
    assert torch.isfinite(gain).all()
    assert torch.isfinite(log_ratio.grad).all()


def test_k3_is_an_unbiased_kl() -> None:
    """For two categorical distributions its expectation is the closed-form KL, and no sample is negative."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    each = k3(p.log(), q.log())
    assert (each >= 0).all()
    assert (p * each).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)
    assert k3(p.log(), p.log()).abs().max() == 0


def test_k3_stays_finite_where_a_token_became_impossible() -> None:
    new = torch.tensor([-120.0, -1.0], requires_grad=True)
    kl = k3(new, torch.tensor([-1.0, -120.0]))
    kl.sum().backward()
    assert torch.isfinite(kl).all()
    assert torch.isfinite(new.grad).all()
