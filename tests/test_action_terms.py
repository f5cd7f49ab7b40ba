"""The objective action by action: shares add up to the loss, sides and moves by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests import small
from tests.test_objective import PAPER, B, K, L, N, _case, _random
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.action_terms import image_terms, moves, text_terms
from unigrpo_cli.algo.objective import Advantages, unigrpo_loss


@pytest.mark.parametrize("trust_region", ["ratio-norm", "ratio"])
@pytest.mark.parametrize("map_ratio", ["none", "step", "position"])
@pytest.mark.parametrize(("penalty", "text_kl"), [("velocity-mse", 0.3), ("latent-kl", 0.0), ("none", 0.0)])
def test_shares_add_up_to_the_loss(trust_region: str, penalty: str, text_kl: float, map_ratio: str) -> None:
    """Two images, an advantage per action, a mean over four episodes more than are here, weights that are not 1."""
    actions, new, old, _ = _case(images=2)
    own = Advantages(_random(B, L, seed=1), (_random(B, K, seed=2), _random(B, K, seed=3)))
    if map_ratio != "none":
        own = replace(own, maps=(_random(B, N, seed=4).abs(), _random(B, N, seed=5).abs()))
    reference = replace(old, velocities=tuple(v + 0.1 for v in old.velocities))
    wanted = replace(PAPER, text_weight=0.7, image_weight=1.3, penalty_weight=0.2)
    wanted = replace(wanted, trust_region=trust_region, penalty=penalty, text_kl=text_kl)
    wanted = replace(wanted, map_ratio=map_ratio, image_clip=1e-4)
    total = unigrpo_loss(actions, new, old, reference, own, wanted, episodes=B + 4).total
    text = text_terms(actions, new, old, reference, own.text_BL, wanted, episodes=B + 4)
    image = image_terms(actions, new, old, reference, own, wanted, episodes=B + 4)
    torch.testing.assert_close(text.loss.sum() + image.loss.sum(), total)
    assert text.loss.shape == actions.mask_BL.shape and image.loss.shape == (B, 2 * K)
    assert (text.loss[~actions.mask_BL] == 0).all()
    assert (image.penalty is None) == (penalty == "none")


def test_sides_are_those_on_which_the_gradient_is_cut() -> None:
    """The clip binds where the ratio has left the range in the direction that the advantage pushes."""
    actions, new, old, advantage_B = _case()
    advantage_B = advantage_B.roll(1)  # so that both sides occur
    wanted = replace(PAPER, text_clip=0.02, image_clip=1e-4)
    leaf = replace(new, log_prob_BL=new.log_prob_BL.clone().requires_grad_())
    loss = small.terminal_loss(actions, leaf, old, None, advantage_B, replace(wanted, penalty="none"), episodes=B)
    loss.total.backward()
    text = text_terms(actions, new, old, None, advantage_B[:, None].expand(B, L), wanted, episodes=B)
    mask = actions.mask_BL
    assert ((leaf.log_prob_BL.grad[mask] == 0) == (text.clipped[mask] != 0)).all()
    assert (text.clipped[~mask] == 0).all() and set(text.clipped.unique().tolist()) == {-1, 0, 1}
    own = Advantages(torch.zeros(B, L), (advantage_B[:, None].expand(B, K),))
    image = image_terms(actions, new, old, None, own, wanted, episodes=B)
    for terms, clip in ((text, 0.02), (image, 1e-4)):
        ratio = terms.log_ratio.exp()
        side = (ratio > 1 + clip).int() - (ratio < 1 - clip).int()
        assert torch.equal(terms.clipped, torch.where(side * advantage_B[:, None] > 0, side, 0).to(torch.int8))


def test_a_move_is_a_distance() -> None:
    """Velocities moved by a constant c: change c everywhere; means move by what the step makes of v; maps average."""
    actions, _, old, _ = _case()
    c = -3e-3
    new = replace(old, velocities=tuple(v + c for v in old.velocities))
    (found,) = moves(actions, new, old, PAPER)
    torch.testing.assert_close(found.velocity_change_BKN, torch.full((B, K, N), -c, dtype=torch.float64))
    torch.testing.assert_close(found.velocity_change_BK, torch.full((B, K), -c, dtype=torch.float64))
    t = actions.images[0].t_BK
    dt = actions.images[0].t_next_BK - t
    variance = 0.8**2 * t / (1 - t)
    torch.testing.assert_close(found.mean_change_BK, (c * dt * (1 + variance * (1 - t) / (2 * t))).abs())
    torch.testing.assert_close(found.log_ratio_BKN.mean(dim=-1), found.log_ratio_BK)
    by_hand = flow.ratio_norm(
        actions.images[0].x_next_BKND,
        *(
            flow.transition(
                "flow",
                actions.images[0].x_BKND,
                v,
                t[..., None, None],
                (t + dt)[..., None, None],
                noise_level=0.8,
                t_second=actions.images[0].t_second,
            )
            for v in (new.velocities[0], old.velocities[0])
        ),
    )
    torch.testing.assert_close(found.log_ratio_BKN, by_hand.sum(dim=-1) / by_hand.shape[-1])
    (still,) = moves(actions, old, old, PAPER)
    assert all((value == 0).all() for value in vars(still).values())


def test_the_estimate_of_the_data_is_exact_for_the_true_velocity() -> None:
    data, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    for t in (0.0, 0.3, 1.0):
        x = (1 - t) * data + t * noise
        torch.testing.assert_close(flow.data_estimate(x, noise - data, torch.tensor(t)), data)
    assert math.isclose(float(flow.data_estimate(*torch.tensor([5.0, 2.0, 0.5]))), 4.0)
