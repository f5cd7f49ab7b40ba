"""The joint objective: one advantage for both kinds of action, denominators, padding, penalties, limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.small import terminal_loss
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.credit import IMAGE, TEXT, terminal
from unigrpo_cli.algo.objective import (
    Actions,
    ImageSteps,
    Objective,
    Scores,
    image_term,
    per_action,
    per_episode_mean,
    step_log_ratios,
    text_term,
    unigrpo_loss,
)

B, L, K, N, D = 6, 5, 3, 4, 2
PAPER = Objective(1.0, 1.0, 0.2, 1e-6, 0.0, "ratio-norm", "velocity-mse", 1.5e-5)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _case(images: int = 1) -> tuple[Actions, Scores, Scores, torch.Tensor]:
    """Recorded actions, their old scores, new scores a little away, and advantages."""
    lengths = torch.tensor([5, 3, 1, 4, 2, 5])
    mask = torch.arange(L) < lengths[:, None]
    t = torch.tensor([0.95, 0.9, 0.8], dtype=torch.float64).expand(B, K)
    t_next = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64).expand(B, K)
    steps, old_v = [], []
    for k in range(images):
        x, v, noise = (_random(B, K, N, D, seed=10 * k + s) for s in range(3))
        second = torch.tensor(0.95, dtype=torch.float64)
        drawn = flow.step(
            "flow", x, v, t[..., None, None], t_next[..., None, None], noise_level=0.8, t_second=second, noise=noise
        )
        steps.append(ImageSteps(x, drawn.x_next, t, t_next, second, "flow", 0.8, 1 + k))
        old_v.append(v)
    old = Scores(_random(B, L, seed=5) - 2, _random(B, L, seed=6).abs(), tuple(old_v))
    new = Scores(
        old.log_prob_BL + 0.1 * _random(B, L, seed=7),
        old.entropy_BL,
        tuple(v + 1e-3 * _random(B, K, N, D, seed=8) for v in old_v),
    )
    return Actions(mask, torch.zeros(B, L, dtype=torch.long), tuple(steps)), new, old, _random(B, seed=9)


def _leaf(scores: Scores) -> Scores:
    """The same scores as leaves that collect gradients."""
    return Scores(
        scores.log_prob_BL.detach().clone().requires_grad_(),
        scores.entropy_BL,
        tuple(v.detach().clone().requires_grad_() for v in scores.velocities),
    )


def _rows(actions: Actions, rows: slice) -> Actions:
    images = tuple(
        replace(s, **{n: getattr(s, n)[rows] for n in ("x_BKND", "x_next_BKND", "t_BK", "t_next_BK")})
        for s in actions.images
    )
    return Actions(actions.mask_BL[rows], actions.segment_BL[rows], images)


def _scores(scores: Scores, rows: slice) -> Scores:
    return Scores(scores.log_prob_BL[rows], scores.entropy_BL[rows], tuple(v[rows] for v in scores.velocities))


def test_text_term_is_the_mean_over_sequences_of_token_means() -> None:
    """Not the mean over all tokens: a long answer counts as much as a short one."""
    actions, new, old, advantage = _case()
    loss = terminal_loss(actions, new, old, None, advantage, replace(PAPER, image_weight=0.0), episodes=B)
    ratio = (new.log_prob_BL - old.log_prob_BL).exp()
    expected = 0.0
    for row in range(B):
        own = ratio[row][actions.mask_BL[row]]
        expected += torch.minimum(own * advantage[row], own.clamp(0.8, 1.2) * advantage[row]).mean() / B
    torch.testing.assert_close(-loss.total + advantage.mean(), expected)


def test_image_term_is_the_mean_over_episodes_of_step_means() -> None:
    actions, new, old, advantage = _case()
    only = replace(PAPER, text_weight=0.0, penalty="none", image_clip=1e-3)
    loss = terminal_loss(actions, new, old, None, advantage, only, episodes=B)
    steps = actions.images[0]
    at = {"noise_level": 0.8, "t_second": steps.t_second}
    times = (steps.t_BK[..., None, None], steps.t_next_BK[..., None, None])
    p, q = (flow.transition("flow", steps.x_BKND, v, *times, **at) for v in (new.velocities[0], old.velocities[0]))
    r = flow.ratio_norm(steps.x_next_BKND, p, q).mean(dim=(-2, -1)).exp()
    a = advantage[:, None]
    expected = torch.minimum(r * a, r.clamp(1 - 1e-3, 1 + 1e-3) * a).mean()
    torch.testing.assert_close(-loss.total + advantage.mean(), expected, rtol=1e-9, atol=1e-12)


def test_at_the_old_policy_the_gradient_is_reinforces() -> None:
    """Ratio 1: d loss / d log p = -A / (tokens of the episode * episodes); nothing is clipped."""
    actions, _, old, advantage = _case()
    new = _leaf(old)
    loss = terminal_loss(actions, new, old, old, advantage, PAPER, episodes=B)
    loss.total.backward()
    tokens = actions.mask_BL.sum(dim=1, keepdim=True)
    expected = torch.where(actions.mask_BL, -advantage[:, None] / tokens / B, 0.0)
    torch.testing.assert_close(new.log_prob_BL.grad, expected)
    steps = actions.images[0]
    dt = (steps.t_next_BK - steps.t_BK)[..., None, None]
    p = flow.transition(
        "flow",
        steps.x_BKND,
        old.velocities[0],
        steps.t_BK[..., None, None],
        steps.t_next_BK[..., None, None],
        noise_level=0.8,
        t_second=steps.t_second,
    )
    e = (steps.x_next_BKND - p.mean) / p.std
    factor = 1 + 0.8**2 / 2  # d mean / d v = factor * dt for t < 1
    expected = -advantage[:, None, None, None] * e * factor * dt / (N * D) / K / B
    torch.testing.assert_close(new.velocities[0].grad, expected, rtol=1e-6, atol=1e-12)
    for name in ("text/max_abs_log_ratio", "image/max_abs_log_ratio"):
        assert loss.maxima[name] == 0
    assert loss.means["text/clip_fraction"] == loss.means["image/clip_fraction"] == 0


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)])
def test_micro_batches_add_up(sizes: tuple[int, ...]) -> None:
    actions, new, old, advantage = _case()
    whole = _leaf(new)
    terminal_loss(actions, whole, old, old, advantage, PAPER, episodes=B).total.backward()
    parts = _leaf(new)
    total, start = 0.0, 0
    for size in sizes:
        rows = slice(start, start + size)
        part = terminal_loss(
            _rows(actions, rows),
            _scores(parts, rows),
            _scores(old, rows),
            _scores(old, rows),
            advantage[rows],
            PAPER,
            episodes=B,
        )
        part.total.backward()
        total, start = total + part.total.item(), start + size
    torch.testing.assert_close(parts.log_prob_BL.grad, whole.log_prob_BL.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(parts.velocities[0].grad, whole.velocities[0].grad, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("text_kl", [0.0, 0.1])
def test_poison_in_the_padding_changes_nothing(text_kl: float) -> None:
    actions, new, old, advantage = _case()
    objective = replace(PAPER, text_kl=text_kl)
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        spoilt = [replace(s, log_prob_BL=torch.where(actions.mask_BL, s.log_prob_BL, poison)) for s in (new, old, old)]
        leaf = _leaf(spoilt[0])
        loss = terminal_loss(actions, leaf, spoilt[1], spoilt[2], advantage, objective, episodes=B)
        loss.total.backward()
        results.append((loss.total.detach(), leaf.log_prob_BL.grad))
    for total, gradient in results[1:]:
        assert torch.equal(total, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("penalty", ["velocity-mse", "latent-kl"])
def test_penalty_and_its_gradient_vanish_at_the_reference_and_nowhere_else(penalty: str) -> None:
    actions, new, old, advantage = _case()
    only = replace(PAPER, text_weight=0.0, penalty=penalty, penalty_weight=1.0)
    for scores, zero in ((old, True), (new, False)):
        leaf = _leaf(scores)
        loss = terminal_loss(actions, leaf, old, old, 0 * advantage, only, episodes=B)
        loss.total.backward()
        assert (loss.means[f"image/{penalty}"] == 0) == zero
        assert (leaf.velocities[0].grad.abs().max() == 0) == zero


def test_velocity_penalty_by_hand() -> None:
    actions, _, old, advantage = _case()
    moved = replace(old, velocities=(old.velocities[0] + 0.1,))
    loss = terminal_loss(actions, moved, old, old, 0 * advantage, replace(PAPER, text_weight=0.0), episodes=B)
    assert loss.means["image/velocity-mse"].item() == pytest.approx(0.01)
    assert loss.total.item() == pytest.approx(1.5e-5 * 0.01)


def test_lambda_zero_is_pure_text_and_conversely() -> None:
    actions, new, old, advantage = _case()
    text, image = _leaf(new), _leaf(new)
    terminal_loss(actions, text, old, old, advantage, replace(PAPER, image_weight=0.0), episodes=B).total.backward()
    terminal_loss(actions, image, old, old, advantage, replace(PAPER, text_weight=0.0), episodes=B).total.backward()
    assert text.velocities[0].grad is None
    assert text.log_prob_BL.grad.abs().max() > 0
    assert image.log_prob_BL.grad is None
    assert image.velocities[0].grad.abs().max() > 0


def test_lambda_scales_the_image_term_and_its_penalty() -> None:
    actions, new, old, advantage = _case()
    terms = [
        terminal_loss(
            actions, new, old, old, advantage, replace(PAPER, text_weight=0.0, image_weight=w), episodes=B
        ).total
        for w in (1.0, 3.0)
    ]
    torch.testing.assert_close(terms[1], 3 * terms[0])


def test_two_images_count_as_the_mean_over_all_their_steps() -> None:
    """An episode of several rounds: K runs over the steps of both images."""
    actions, new, old, advantage = _case(images=2)
    only = replace(PAPER, text_weight=0.0, image_clip=1.0)
    both = terminal_loss(actions, new, old, old, advantage, only, episodes=B).total
    each = [
        terminal_loss(
            replace(actions, images=(actions.images[k],)),
            replace(new, velocities=(new.velocities[k],)),
            *[replace(old, velocities=(old.velocities[k],))] * 2,
            advantage,
            only,
            episodes=B,
        ).total
        for k in range(2)
    ]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_a_row_without_text_counts_zero() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    values = torch.tensor([[1.0, 3.0], [float("nan"), 7.0]])
    assert per_episode_mean(values, mask).tolist() == [2.0, 0.0]


def test_text_kl_is_added_with_its_weight() -> None:
    """The loss with KL minus the loss without is weight * mean k3(reference - new), by hand."""
    actions, new, old, advantage = _case()
    only = replace(PAPER, image_weight=0.0)
    without = terminal_loss(actions, new, old, None, advantage, only, episodes=B).total
    held = terminal_loss(actions, new, old, old, advantage, replace(only, text_kl=0.3), episodes=B).total
    d = old.log_prob_BL - new.log_prob_BL
    by_hand = per_episode_mean(d.exp() - 1 - d, actions.mask_BL).mean()
    torch.testing.assert_close(held - without, 0.3 * by_hand)
    assert held > without


def test_trust_regions_differ_as_their_names_say() -> None:
    """One step moved by a constant: the plain log-ratio sees drift against the noise, RatioNorm rescales it."""
    actions, new, old, advantage = _case()
    steps = actions.images[0]
    at = (steps.t_BK[..., None, None], steps.t_next_BK[..., None, None])
    p, q = (
        flow.transition("flow", steps.x_BKND, s.velocities[0], *at, noise_level=0.8, t_second=steps.t_second)
        for s in (new, old)
    )
    plain = flow.log_prob("flow", steps.x_next_BKND, p) - flow.log_prob("flow", steps.x_next_BKND, q)
    normed = flow.ratio_norm(steps.x_next_BKND, p, q).mean(dim=(-2, -1))
    for trust_region, expected in (("ratio", plain), ("ratio-norm", normed)):
        only = replace(PAPER, text_weight=0.0, penalty="none", image_clip=10.0, trust_region=trust_region)
        loss = terminal_loss(actions, new, old, None, advantage, only, episodes=B)
        assert loss.maxima["image/max_abs_log_ratio"] == pytest.approx(expected.abs().max().item())
        torch.testing.assert_close(loss.total, -(torch.expm1(expected) * advantage[:, None]).mean())
    assert (plain - normed).abs().max() > 1e-3 * normed.abs().max()


@pytest.mark.parametrize("penalty", ["velocity-mse", "latent-kl"])
def test_penalties_are_added_with_their_weight(penalty: str) -> None:
    actions, new, old, advantage = _case()
    steps = actions.images[0]
    only = replace(PAPER, text_weight=0.0, penalty=penalty, penalty_weight=0.7, image_weight=2.0)
    free = terminal_loss(actions, new, old, None, advantage, replace(only, penalty="none"), episodes=B).total
    held = terminal_loss(actions, new, old, old, advantage, only, episodes=B)
    v, v_ref = new.velocities[0], old.velocities[0]
    if penalty == "velocity-mse":
        by_hand = (v - v_ref).square().mean()
    else:  # Gaussians of one deviation: KL = (difference of means)^2 / (2 variance), mean over elements
        at = (steps.t_BK[..., None, None], steps.t_next_BK[..., None, None])
        p, q = (
            flow.transition("flow", steps.x_BKND, u, *at, noise_level=0.8, t_second=steps.t_second) for u in (v, v_ref)
        )
        by_hand = ((p.mean - q.mean).square() / (2 * p.std**2)).mean()
    torch.testing.assert_close(held.total - free, 2.0 * 0.7 * by_hand)
    assert held.means[f"image/{penalty}"] == pytest.approx(by_hand.item())


def test_an_image_without_stochastic_steps_has_no_say() -> None:
    actions, new, old, advantage = _case()
    none = torch.zeros(B, 0, dtype=torch.float64)
    empty = replace(
        actions.images[0],
        x_BKND=torch.zeros(B, 0, N, D),
        x_next_BKND=torch.zeros(B, 0, N, D),
        t_BK=none,
        t_next_BK=none,
    )
    still = replace(actions, images=(empty,))
    blank = (torch.zeros(B, 0, N, D, dtype=torch.float64),)
    loss = terminal_loss(
        still, replace(new, velocities=blank), replace(old, velocities=blank), None, advantage, PAPER, episodes=B
    )
    only = terminal_loss(actions, new, old, None, advantage, replace(PAPER, image_weight=0.0), episodes=B)
    assert loss.total == only.total


# ----- an advantage for each segment


def test_terminal_credit_is_the_old_objective_to_the_bit() -> None:
    """Before there were segments, one advantage_B multiplied every term: the same loss and gradients, bit by bit."""
    actions, new, old, advantage = _case(images=2)
    for dtype in (torch.float64, torch.float32):
        old_leaf, leaf = (_leaf(_as(new, dtype)) for _ in range(2))
        log_ratio_BK = step_log_ratios(actions, old_leaf, _as(old, dtype), PAPER)
        a = advantage.to(dtype)[:, None]
        at = {"episodes": B}
        text, _ = text_term(old_leaf.log_prob_BL, _as(old, dtype).log_prob_BL, actions.mask_BL, a, clip=0.2, **at)
        image, _ = image_term(log_ratio_BK, a, clip=1e-6, **at)
        total = log_ratio_BK.new_zeros(()) - 1.0 * text - 1.0 * image
        total.backward()
        kind_BS = torch.tensor([[TEXT, IMAGE, IMAGE]] * B)
        shared = per_action(terminal(advantage, kind_BS), actions)
        loss = unigrpo_loss(
            actions, leaf, _as(old, dtype), None, shared, replace(PAPER, penalty="none"), episodes=B
        ).total
        loss.backward()
        assert torch.equal(loss, total)
        assert torch.equal(leaf.log_prob_BL.grad, old_leaf.log_prob_BL.grad)
        assert all(torch.equal(x.grad, y.grad) for x, y in zip(leaf.velocities, old_leaf.velocities, strict=True))


def _as(scores: Scores, dtype: torch.dtype) -> Scores:
    return Scores(
        scores.log_prob_BL.to(dtype), scores.entropy_BL.to(dtype), tuple(v.to(dtype) for v in scores.velocities)
    )


def test_each_action_has_the_advantage_of_its_segment() -> None:
    """Two texts with an image after each: at the old policy d loss / d log p is minus the segment's advantage."""
    actions, _, old, _ = _case(images=2)
    second = torch.arange(L) >= 2
    segment_BL = torch.where(second, 2, 0).expand(B, L)
    images = tuple(replace(s, segment=k) for s, k in zip(actions.images, (1, 3), strict=True))
    actions = replace(actions, segment_BL=segment_BL, images=images)
    advantage_BS = _random(B, 4, seed=11)
    given, new = per_action(advantage_BS, actions), _leaf(old)
    unigrpo_loss(actions, new, old, old, given, PAPER, episodes=B).total.backward()
    tokens = actions.mask_BL.sum(dim=1, keepdim=True)
    own_BL = torch.where(second, advantage_BS[:, 2:3], advantage_BS[:, 0:1])
    torch.testing.assert_close(new.log_prob_BL.grad, torch.where(actions.mask_BL, -own_BL / tokens / B, 0.0))
    for k, s in ((0, 1), (1, 3)):
        one = _leaf(old)
        everything = replace(given, images=tuple(torch.ones_like(a) for a in given.images))
        unigrpo_loss(actions, one, old, old, everything, PAPER, episodes=B).total.backward()
        expected = one.velocities[k].grad * advantage_BS[:, s, None, None, None]
        torch.testing.assert_close(new.velocities[k].grad, expected)
