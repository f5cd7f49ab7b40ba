"""Image objectives of the forward process: closed forms, numbers of the public codes, draws from keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.test_objective import PAPER, B, _case, _leaf, _random
from tests.test_replay import PROMPTS, SAMPLING
from unigrpo_cli.algo import flow, forward
from unigrpo_cli.algo.objective import Actions, Advantages, NoisedImage, Scores, unigrpo_loss
from unigrpo_cli.algo.surrogate import clipped_surrogate
from unigrpo_cli.episode import Episode, flatten
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.replay import collate, micro_batches, replay, replayed_tokens
from unigrpo_cli.rollout import rollout

K, N, D = 4, 6, 2


def _made(c: float, *shape: int) -> Tensor:
    """The same numbers on every machine and version."""
    count = torch.Size(shape).numel()
    return torch.sin(c * torch.arange(1, count + 1, dtype=torch.float64) ** 1.5).view(shape)


ADVANTAGE_B = torch.tensor([1.3, -0.4, -2.0], dtype=torch.float64)
T_BK = torch.tensor([1.0, 0.9, 0.6, 0.25], dtype=torch.float64).expand(3, K)
X_0, NOISE, V_OLD, MOVE = (_made(0.37, 3, N, D), *(_made(c, 3, K, N, D) for c in (0.53, 0.71, 0.29)))
X_T, TARGET = flow.noised(X_0[:, None], NOISE, T_BK[..., None, None]), flow.path_velocity(X_0[:, None], NOISE)


@pytest.mark.parametrize(
    ("beta", "most", "size", "loss", "gradient"),
    [
        (1.0, 5.0, 0.1, 5.133134991909816, 0.21061350512391336),
        (0.1, 5.0, 0.1, 51.3102735117038, 0.20603362669351535),
        (0.5, 1.0, 0.0, 2.0525548566506173, 0.1262739081016733),
    ],
)
def test_nft_is_its_public_code(beta: float, most: float, size: float, loss: float, gradient: float) -> None:
    """Loss and norm of its gradient from NVlabs/DiffusionNFT's training script on the same numbers."""
    v = (V_OLD + size * MOVE).requires_grad_()
    r_BK = forward.reward_probability(ADVANTAGE_B[:, None].expand(3, K), most)
    found = most / beta * forward.nft_loss(v, V_OLD, TARGET, T_BK, r_BK, beta=beta).mean()
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, rel=1e-9)
    assert float(v.grad.norm()) == pytest.approx(gradient, rel=1e-9)


@pytest.mark.parametrize(
    ("size", "clip", "loss", "gradient"),
    [
        (0.1, 0.05, 0.3590777800705672, 0.28198390029595755),
        (0.1, 0.01, 0.3617943452297692, 0.27787624030481445),
        (0.0, 0.05, 0.3666666666666667, 0.2820268671076585),
    ],
)
def test_fpo_is_its_public_code(size: float, clip: float, loss: float, gradient: float) -> None:
    """Loss and norm of its gradient from akanazawa/fpo's torch code on the same numbers; 0.01 clips one ratio."""
    v = (V_OLD + size * MOVE).requires_grad_()
    log_ratio_B = forward.fpo_log_ratio(v, V_OLD, TARGET)
    found = -(clipped_surrogate(log_ratio_B, ADVANTAGE_B, clip).gain + ADVANTAGE_B).mean()
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, rel=1e-9)
    assert float(v.grad.norm()) == pytest.approx(gradient, rel=1e-9)


def test_the_data_is_where_the_target_leads_from_any_time() -> None:
    torch.testing.assert_close(flow.data_estimate(X_T, TARGET, T_BK[..., None, None]), X_0[:, None].expand_as(X_T))
    assert torch.equal(X_T[:, 0], NOISE[:, 0]), "t = 1 is noise alone"


def _forward_case(images: int = 1) -> tuple[Actions, Scores, Scores, Advantages]:
    """`_case` of the transitions' tests with drawn states in place of steps, and an advantage per action."""
    actions, new, old, _ = _case(images)
    noised, a = [], []
    for k, steps in enumerate(actions.images):
        x_0, noise = _random(B, 1, *steps.x_BKND.shape[2:], seed=30 + k), _random(*steps.x_BKND.shape, seed=40 + k)
        x_t = flow.noised(x_0, noise, steps.t_BK[..., None, None])
        noised.append(NoisedImage(x_t, steps.t_BK, flow.path_velocity(x_0, noise), steps.segment))
        a.append(_random(B, seed=50 + k)[:, None].expand(steps.t_BK.shape))
    return replace(actions, images=(), noised=tuple(noised)), new, old, Advantages(_random(B, 5, seed=60), tuple(a))


def _by_hand(name: str, actions: Actions, new: Scores, old: Scores, own: Advantages, clip: float) -> Tensor:
    """The image loss in the words of the papers: losses and data estimates, with nothing simplified."""
    total = torch.zeros((), dtype=torch.float64)
    for s, v, w, a_BK in zip(actions.noised, new.velocities, old.velocities, own.images, strict=True):
        for b in range(B):
            a = a_BK[b, 0]
            if name == "fpo":
                fit = [((u - s.target_BKND[b]) ** 2).mean(dim=(1, 2)).mean() for u in (v[b], w[b])]
                ratio = torch.exp(fit[1] - fit[0])
                total = total - torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a) + a
                continue
            r, t = 0.5 + 0.5 * (a / 5).clamp(-1, 1), s.t_BK[b][:, None, None]
            clean = s.x_BKND[b] - t * s.target_BKND[b]
            losses = []
            for u in (0.4 * v[b] + 0.6 * w[b], 1.4 * w[b] - 0.4 * v[b]):
                estimate = s.x_BKND[b] - t * u
                size = (estimate - clean).abs().mean(dim=(1, 2), keepdim=True).detach()
                losses.append(((estimate - clean) ** 2 / size).mean())
            total = total + 5 / 0.4 * (r * losses[0] + (1 - r) * losses[1])
    return total / len(actions.noised) / B


@pytest.mark.parametrize("name", ["fpo", "nft"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("size", [0.0, 1.0, 100.0])
def test_the_loss_and_its_gradient_are_those_of_the_papers_by_hand(name: str, images: int, size: float) -> None:
    """At the old policy, near it, and where ratios are clipped; means over draws, images and episodes."""
    actions, new, old, own = _forward_case(images)
    moved = zip(new.velocities, old.velocities, strict=True)
    new = replace(new, velocities=tuple(w + size * (v - w) for v, w in moved))
    only = replace(PAPER, text_weight=0.0, penalty="none", image=name, fpo_clip=0.02, nft_beta=0.4)
    found, wanted = _leaf(new), _leaf(new)
    loss = unigrpo_loss(actions, found, old, None, own, only, episodes=B)
    by_hand = _by_hand(name, actions, wanted, old, own, clip=0.02)
    torch.testing.assert_close(loss.total, by_hand, rtol=1e-9, atol=1e-12)
    loss.total.backward()
    by_hand.backward()
    for one, other in zip(found.velocities, wanted.velocities, strict=True):
        assert one.grad.abs().max() > 1e-6
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert ("image/max_abs_log_ratio" in loss.maxima) == (name == "fpo")
    assert (loss.means["image/mse_old"] == 0) == (size == 0)
    if name == "fpo":
        assert (loss.maxima["image/max_abs_log_ratio"] == 0) == (size == 0)
        assert (loss.means["image/clip_fraction"] > 0) == (size == 100.0)


@pytest.mark.parametrize("name", ["fpo", "nft"])
def test_at_the_old_policy_the_gradient_is_advantage_times_a_regressions(name: str) -> None:
    """NFT's regression has weights t^2 / mean |t (v - u)|; text and the penalty are as with transitions."""
    actions, _, old, own = _forward_case()
    leaf = _leaf(old)
    wanted = replace(PAPER, image=name, nft_beta=0.3, penalty_weight=0.2)
    reference = replace(old, velocities=tuple(v + 0.1 for v in old.velocities))
    loss = unigrpo_loss(actions, leaf, old, reference, own, wanted, episodes=B)
    loss.total.backward()
    (s,), (v,), (a_BK,) = actions.noised, old.velocities, own.images
    error = v - s.target_BKND
    count = v[0].numel()
    weight = torch.ones_like(s.t_BK)
    if name == "nft":
        weight = s.t_BK / error.abs().mean(dim=(2, 3))
    regression = 2 * (a_BK * weight)[..., None, None] * error / count / B
    penalty = 0.2 * 2 * -0.1 / count / B
    torch.testing.assert_close(leaf.velocities[0].grad, regression + penalty)
    assert loss.means["image/velocity-mse"] == pytest.approx(0.01)
    transitions, _, plain, _ = _case()
    text = _leaf(plain)
    unigrpo_loss(transitions, text, plain, plain, replace(own, images=own.images), PAPER, episodes=B).total.backward()
    torch.testing.assert_close(leaf.log_prob_BL.grad, text.log_prob_BL.grad)


def _episodes(model: MoTPolicy, **more) -> list[Episode]:
    return flatten(rollout(model, PROMPTS, 2, replace(SAMPLING, **more), flow.Window(0, 0), 0))


def test_draws_are_functions_of_the_episode(tiny: MoTPolicy) -> None:
    """Times of its own grid, none twice before all have come; the same in every batch; two images have their own."""
    episodes = _episodes(tiny, program="reflect", rounds=2)
    batch, alone = collate(episodes, draws=8), collate(episodes[3:4], draws=8)
    assert not batch.actions.images and len(batch.actions.noised) == 2
    grid = episodes[0].images[0].times[:-1]
    for k, (image, own) in enumerate(zip(batch.actions.noised, alone.actions.noised, strict=True)):
        for name in ("x_BKND", "t_BK", "target_BKND"):
            assert torch.equal(getattr(image, name)[3:4], getattr(own, name))
        for b, episode in enumerate(episodes):
            assert torch.equal(image.t_BK[b, :6].sort(descending=True).values, grid)
            assert len(image.t_BK[b, 6:].unique()) == 2
            clean = flow.data_estimate(image.x_BKND[b], image.target_BKND[b], image.t_BK[b, :, None, None])
            torch.testing.assert_close(clean, episode.images[k].latent.expand_as(clean), atol=1e-5, rtol=0)
        noise = image.x_BKND + (1 - image.t_BK[..., None, None]) * image.target_BKND
        assert abs(float(noise.std()) - 1) < 0.02 and abs(float(noise.mean())) < 0.02
    first, second = batch.actions.noised
    assert not torch.equal(first.target_BKND + episodes[0].images[0].latent, second.target_BKND)
    assert [image.segment for image in batch.actions.noised] == [1, 3]


def test_velocities_are_those_of_the_network_at_the_drawn_states(tiny: MoTPolicy) -> None:
    """As a pass over each state alone; old and new scores are equal to the bit; tokens count draws."""
    episodes = _episodes(tiny)
    batch = collate(episodes, draws=3)
    with torch.no_grad():
        old = replay(tiny, batch)
        one_by_one = replay(tiny, batch, copies=1)
    new = replay(tiny, batch)
    assert torch.equal(new.velocities[0], old.velocities[0]) and torch.equal(new.log_prob_BL, old.log_prob_BL)
    torch.testing.assert_close(one_by_one.velocities[0], old.velocities[0], atol=1e-6, rtol=1e-5)
    assert old.velocities[0].shape == batch.actions.noised[0].x_BKND.shape
    image = episodes[0].images[0]
    each = len(image.latent) + 2
    assert replayed_tokens(episodes[0], 3) == replayed_tokens(episodes[0]) + 3 * each
    most = max(replayed_tokens(e, 3) for e in episodes)
    assert len(micro_batches(episodes, range(6), 6, 2 * most)) < len(micro_batches(episodes, range(6), 6, most, 3))
