"""The joint objective (paper eq 2, 6, 7, 8): recorded actions and their scores in, one loss out.

Every mean is written as a sum over an explicit denominator, `episodes`: the number of episodes behind one
optimizer step. So a step may be split into micro-batches of any size and the gradients add up to the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo_cli.algo import flow, forward
from unigrpo_cli.algo.surrogate import clipped_surrogate, k3


@dataclass(frozen=True)
class ImageSteps:
    """The stochastic steps of one image segment, for B episodes, as recorded at rollout; all fp32.

    Args:
        x_BKND, x_next_BKND: latents before and after each step.
        t_BK, t_next_BK: times before and after each step.
        t_second: second point of the time grid, scalar.
        sde, noise_level: the transition that drew them.
        segment: which of the episode's acted segments the image is, from 0.
    """

    x_BKND: Tensor
    x_next_BKND: Tensor
    t_BK: Tensor
    t_next_BK: Tensor
    t_second: Tensor
    sde: str
    noise_level: float
    segment: int


@dataclass(frozen=True)
class NoisedImage:
    """The final latent x_0 of one image segment, noised to K drawn times, for B episodes; all fp32.

    Args:
        x_BKND, t_BK: x_t = (1 - t) x_0 + t e, and its times.
        target_BKND: its velocity e - x_0.
        segment: which of the episode's acted segments the image is, from 0.
    """

    x_BKND: Tensor
    t_BK: Tensor
    target_BKND: Tensor
    segment: int


@dataclass(frozen=True)
class Actions:
    """What the behaviour policy did in B episodes: where text was acted, and every image segment's steps.

    Args:
        mask_BL: True where position l holds a sampled token: a forced end token is not one.
        segment_BL: which of the episode's acted segments that token is in, from 0; anything off-mask.
        images: steps of each image segment.
        noised: in their place, each image segment's final latent for objectives of the forward process.
    """

    mask_BL: Tensor
    segment_BL: Tensor
    images: tuple[ImageSteps, ...]
    noised: tuple[NoisedImage, ...] = ()

    @property
    def scored(self) -> tuple[ImageSteps | NoisedImage, ...]:
        """The noisy latents of each image segment at which velocities are scored."""
        return self.images or self.noised


@dataclass(frozen=True)
class Advantages:
    """The advantage of each action of B episodes.

    Args:
        text_BL: of each text action; anything off-mask.
        images: of each image segment, [B, K], one number for each stochastic step or draw.
        maps: of each image segment, M_BN >= 0 with mean 1 over its positions: A_bkn = M_bn A_bk (ViPO, arXiv
            2511.18719). Empty for one advantage at all positions.
    """

    text_BL: Tensor
    images: tuple[Tensor, ...]
    maps: tuple[Tensor, ...] = ()


def per_action(advantage_BS: Tensor, actions: Actions, maps: tuple[Tensor, ...] = ()) -> Advantages:
    """Every action gets the advantage of the acted segment s that it is in: A_bl = A_b,s(l), A_bk = A_b,s(k)."""
    images = tuple(advantage_BS[:, s.segment, None].expand(s.t_BK.shape) for s in actions.scored)
    return Advantages(advantage_BS.gather(1, actions.segment_BL), images, maps)


@dataclass(frozen=True)
class Scores:
    """What one policy says about recorded actions.

    Args:
        log_prob_BL: log-probability of each text action at the sampling temperature; anything off-mask.
        entropy_BL: entropy of the distribution each text action was drawn from, nats.
        velocities: v_BKND of each image segment.
    """

    log_prob_BL: Tensor
    entropy_BL: Tensor
    velocities: tuple[Tensor, ...]

    def detached(self) -> Scores:
        """The same numbers, through which nothing is learnt."""
        return Scores(self.log_prob_BL.detach(), self.entropy_BL.detach(), tuple(v.detach() for v in self.velocities))


@dataclass(frozen=True)
class Objective:
    """The choices of eq 2, 6, 7 and 8.

    Args:
        text_weight: weight of the text term; 0 leaves it out.
        image_weight: the paper's lambda, weight of the image term and its penalty; 0 leaves both out.
        text_clip, image_clip: clip ranges of the token ratio and of the (mean-reduced) step ratio.
        text_kl: weight of the k3 estimate of KL to the reference on text; the paper has 0.
        trust_region: "ratio-norm" (the paper) or "ratio", the plain log-ratio of Flow-GRPO.
        penalty, penalty_weight: what holds the image policy near the reference, and how strongly.
        map_ratio: with advantage maps, whether ratio and clip are of a "step" or of each "position" in it.
        image: what is scored of images: each "transition" (eq 6), or the final latent by "fpo" or "nft".
        fpo_clip: clip range of FPO's ratio.
        nft_beta, nft_range: beta of NFT, and the advantage at which its r is 1.
    """

    text_weight: float
    image_weight: float
    text_clip: float
    image_clip: float
    text_kl: float
    trust_region: str
    penalty: str
    penalty_weight: float
    map_ratio: str = "step"
    image: str = "transition"
    fpo_clip: float = 0.05
    nft_beta: float = 1.0
    nft_range: float = 5.0


@dataclass(frozen=True)
class Loss:
    """A loss to minimise, its terms by name, and statistics.

    `total` and `means` are shares of a mean over `episodes`: add them over micro-batches. `maxima` combine by
    maximum. The constant mean of the advantages, which has no gradient, is left out of the surrogates.
    """

    total: Tensor
    means: dict[str, Tensor]
    maxima: dict[str, Tensor]


def text_term(
    log_prob_BL: Tensor, old_BL: Tensor, mask_BL: Tensor, advantage_BL: Tensor, *, clip: float, episodes: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq 2 without its KL: per episode the mean over its tokens, then the sum over episodes / `episodes`."""
    log_ratio = torch.where(mask_BL, log_prob_BL - old_BL, 0.0)
    surrogate = clipped_surrogate(log_ratio, advantage_BL, clip)
    return per_episode_mean(surrogate.gain, mask_BL).sum() / episodes, {
        "text/clip_fraction": per_episode_mean(surrogate.clipped.float(), mask_BL).sum() / episodes,
        "text/approx_kl": per_episode_mean(k3(-log_ratio, torch.zeros(())), mask_BL).sum() / episodes,
    } | _ratio_statistics("text", log_ratio, surrogate.clipped, mask_BL, episodes)


def image_term(
    log_ratio_BK: Tensor, advantage_BK: Tensor, *, clip: float, episodes: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq 6: per episode the mean over its K stochastic steps, then the sum over episodes / `episodes`.

    With a ratio for each position, K counts positions of steps; FPO has one ratio for an image.
    """
    surrogate = clipped_surrogate(log_ratio_BK, advantage_BK, clip)
    return surrogate.gain.mean(dim=1).sum() / episodes, {
        "image/clip_fraction": surrogate.clipped.float().mean(dim=1).sum() / episodes,
        "image/abs_log_ratio": log_ratio_BK.detach().abs().mean(dim=1).sum() / episodes,
    } | _ratio_statistics("image", log_ratio_BK, surrogate.clipped, torch.ones_like(surrogate.clipped), episodes)


def nft_term(
    actions: Actions, new: Scores, old: Scores, advantages: Advantages, objective: Objective, *, episodes: int
) -> Tensor:
    """DiffusionNFT: minus its loss, per episode the mean over its draws, then the sum over episodes / `episodes`.

    The factor range / beta is its code's: at the old policy the gradient is then A times that of a regression.
    """
    beta, most = objective.nft_beta, objective.nft_range
    losses = []
    for s, v, v_old, own in zip(actions.noised, new.velocities, old.velocities, advantages.images, strict=True):
        r_BK = forward.reward_probability(own, most).to(v.dtype)
        losses.append(forward.nft_loss(v, v_old, s.target_BKND, s.t_BK, r_BK, beta=beta))
    return -most / beta * torch.cat(losses, dim=1).mean(dim=1).sum() / episodes


@torch.no_grad()
def _ratio_statistics(kind: str, log_ratio: Tensor, clipped: Tensor, mask: Tensor, episodes: int) -> dict[str, Tensor]:
    """First two moments of the log-ratio, and on which side the clip binds; float64, for image log-ratios are 1e-6.

    Shares of a mean over `episodes` of means over an episode's actions. The square, not the deviation: squares add.
    """
    exact = log_ratio.double()
    values = {
        "log_ratio_mean": exact,
        "log_ratio_square": exact.square(),
        "clip_fraction_above": (clipped & (log_ratio > 0)).double(),
        "clip_fraction_below": (clipped & (log_ratio < 0)).double(),
    }
    return {f"{kind}/{name}": per_episode_mean(value, mask).sum() / episodes for name, value in values.items()}


def per_episode_mean(value_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over the masked positions of each row, [B]; 0 for a row without any. Off-mask values may be NaN."""
    kept = torch.where(mask_BL, value_BL, 0.0)
    return kept.sum(dim=1) / mask_BL.sum(dim=1).clamp_min(1)


def step_densities(steps: ImageSteps, v_BKND: Tensor) -> flow.Transition:
    """The transition of every recorded step under the velocities of one policy."""
    return flow.transition(
        steps.sde,
        steps.x_BKND,
        v_BKND,
        steps.t_BK[..., None, None],
        steps.t_next_BK[..., None, None],
        noise_level=steps.noise_level,
        t_second=steps.t_second,
    )


def token_log_ratios(actions: Actions, new: Scores, old: Scores) -> Tensor:
    """Log-ratio of every text action: [B, L]; 0 off-mask."""
    return torch.where(actions.mask_BL, new.log_prob_BL - old.log_prob_BL, 0.0)


def token_kls(actions: Actions, new: Scores, reference: Scores) -> Tensor:
    """k3 estimate of KL to the reference at every text action: [B, L]; 0 off-mask.

    Masked before k3, not after: a NaN in the padding would come back through its derivative.
    """
    here, there = (torch.where(actions.mask_BL, x.log_prob_BL, 0.0) for x in (new, reference))
    return k3(here, there)


def element_log_ratios(actions: Actions, new: Scores, old: Scores, objective: Objective) -> tuple[Tensor, ...]:
    """Log-ratio of every element of the latent that a step led to: [B, K, N, D] of each image segment."""
    pairs = zip(actions.images, new.velocities, old.velocities, strict=True)
    return tuple(log_ratio_of(s, step_densities(s, v), step_densities(s, v_old), objective) for s, v, v_old in pairs)


def log_ratio_of(steps: ImageSteps, new: flow.Transition, old: flow.Transition, objective: Objective) -> Tensor:
    """The configured log-ratio of two densities of an image's steps, per element: [B, K, N, D]."""
    if objective.trust_region == "ratio-norm":
        return flow.ratio_norm(steps.x_next_BKND, new, old)
    return flow.log_ratio(steps.sde, steps.x_next_BKND, new, old)


def step_log_ratios(actions: Actions, new: Scores, old: Scores, objective: Objective) -> Tensor:
    """Log-ratio of every image step of an episode, its image segments one after the other: [B, K]."""
    ratios = element_log_ratios(actions, new, old, objective)
    return torch.cat([ratio_BKND.mean(dim=(-2, -1)) for ratio_BKND in ratios], dim=1)


def mapped_log_ratios(
    actions: Actions, new: Scores, old: Scores, advantages: Advantages, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Log-ratios and advantages of image actions under advantage maps M, [B, K] both, or [B, K * N] by position.

    "position" (ViPO): ratio, clip and advantage of each position, log r_p = mean over D, A_p = M_p A. "step": one ratio
    and one clip for the step, log r = mean over positions of M_p log r_p. Both have the gradient
    A mean(M_p d log r_p) at the old policy; an all-ones map with "step" is the plain objective to the bit.
    """
    dtype = new.log_prob_BL.dtype
    if not advantages.maps:
        return step_log_ratios(actions, new, old, objective), torch.cat(advantages.images, dim=1).to(dtype)
    ratios, own = [], []
    elements = element_log_ratios(actions, new, old, objective)
    for ratio_BKND, advantage_BK, map_BN in zip(elements, advantages.images, advantages.maps, strict=True):
        map_B1N = map_BN[:, None].to(dtype)
        if objective.map_ratio == "position":
            ratios.append(ratio_BKND.mean(dim=-1).flatten(1))
            own.append((advantage_BK[..., None].to(dtype) * map_B1N).flatten(1))
        else:
            ratios.append((ratio_BKND * map_B1N[..., None]).mean(dim=(-2, -1)))
            own.append(advantage_BK.to(dtype))
    return torch.cat(ratios, dim=1), torch.cat(own, dim=1)


def fpo_log_ratios(actions: Actions, new: Scores, old: Scores, advantages: Advantages) -> tuple[Tensor, Tensor]:
    """Log-ratio and advantage of every image of an episode: [B, images] both."""
    triples = zip(actions.noised, new.velocities, old.velocities, strict=True)
    ratios = [forward.fpo_log_ratio(v, v_old, s.target_BKND) for s, v, v_old in triples]
    own = [advantage_BK[:, 0].to(new.log_prob_BL.dtype) for advantage_BK in advantages.images]
    return torch.stack(ratios, dim=1), torch.stack(own, dim=1)


def step_penalties(actions: Actions, new: Scores, reference: Scores, objective: Objective) -> Tensor:
    """Distance from the reference at every image step, or draw, of an episode: [B, K]."""
    if objective.penalty == "velocity-mse":
        pairs = zip(new.velocities, reference.velocities, strict=True)
        return torch.cat([flow.velocity_mse(v, v_ref) for v, v_ref in pairs], dim=1)
    triples = zip(actions.images, new.velocities, reference.velocities, strict=True)
    return torch.cat(
        [flow.latent_kl(step_densities(steps, v), step_densities(steps, v_ref)) for steps, v, v_ref in triples], dim=1
    )


@torch.no_grad()
def step_kls(actions: Actions, new: Scores, old: Scores) -> Tensor:
    """KL between the old and the new policy's transition at every image step, mean over its elements: [B, K]."""
    pairs = zip(actions.images, new.velocities, old.velocities, strict=True)
    return torch.cat(
        [flow.latent_kl(step_densities(steps, v), step_densities(steps, v_old)) for steps, v, v_old in pairs], dim=1
    )


@torch.no_grad()
def _forward_statistics(actions: Actions, new: Scores, old: Scores, episodes: int) -> dict[str, Tensor]:
    """Of the drawn states: how well the policy predicts its own pictures, and how far it is from the old policy."""
    triples = list(zip(actions.noised, new.velocities, old.velocities, strict=True))
    found = {
        "image/flow_matching": [forward.flow_matching(v, s.target_BKND) for s, v, _ in triples],
        "image/mse_old": [flow.velocity_mse(v, v_old) for _, v, v_old in triples],
    }
    return {name: torch.cat(values, dim=1).mean(dim=1).sum() / episodes for name, values in found.items()}


def _by_step(name: str, value_BK: Tensor, actions: Actions, episodes: int) -> dict[str, Tensor]:
    """A mean over episodes for each stochastic step of the first image, which all have; `name/step_0` is the first.

    Draws are at times of their own, so there is none for them.
    """
    if not actions.images:
        return {}
    sums = value_BK[:, : actions.images[0].t_BK.shape[1]].detach().sum(dim=0) / episodes
    return {f"{name}/step_{k}": value for k, value in enumerate(sums)}


def unigrpo_loss(
    actions: Actions,
    new: Scores,
    old: Scores,
    reference: Scores | None,
    advantages: Advantages,
    objective: Objective,
    *,
    episodes: int,
) -> Loss:
    """Eq 7: -(text + lambda * image) + lambda * penalty_weight * penalty + text_kl * KL, to be minimised.

    An action's term is multiplied by its own advantage; terminal credit gives all actions of an episode the same one.
    """
    dtype = new.log_prob_BL.dtype
    total = new.log_prob_BL.new_zeros(())
    means: dict[str, Tensor] = {}
    maxima: dict[str, Tensor] = {}
    mask = actions.mask_BL
    if objective.text_weight and mask.shape[1]:
        gain, stats = text_term(
            new.log_prob_BL,
            old.log_prob_BL,
            mask,
            advantages.text_BL.to(dtype),
            clip=objective.text_clip,
            episodes=episodes,
        )
        total = total - objective.text_weight * gain
        means |= stats | {"text/loss": -gain}
        means["text/entropy"] = per_episode_mean(new.entropy_BL, mask).sum() / episodes
        maxima["text/max_abs_log_ratio"] = token_log_ratios(actions, new, old).abs().max()
        if objective.text_kl:
            assert reference is not None
            kl = per_episode_mean(token_kls(actions, new, reference), mask).sum() / episodes
            total = total + objective.text_weight * objective.text_kl * kl
            means["text/kl"] = kl
    if objective.image_weight and any(s.x_BKND.shape[1] for s in actions.scored):
        if objective.image == "nft":
            gain = nft_term(actions, new, old, advantages, objective, episodes=episodes)
        else:
            if objective.image == "fpo":
                log_ratio_BK, advantage_BK = fpo_log_ratios(actions, new, old, advantages)
            else:
                log_ratio_BK, advantage_BK = mapped_log_ratios(actions, new, old, advantages, objective)
            clip = objective.fpo_clip if objective.image == "fpo" else objective.image_clip
            gain, stats = image_term(log_ratio_BK, advantage_BK, clip=clip, episodes=episodes)
            means |= stats
            maxima["image/max_abs_log_ratio"] = log_ratio_BK.abs().max()
        total = total - objective.image_weight * gain
        means["image/loss"] = -gain
        if objective.image == "transition":
            kl_BK = step_kls(actions, new, old)
            means["image/kl_old"] = kl_BK.mean(dim=1).sum() / episodes
            means |= _by_step("image/kl_old", kl_BK, actions, episodes)
        else:
            means |= _forward_statistics(actions, new, old, episodes)
        if objective.penalty != "none":
            assert reference is not None
            penalty_BK = step_penalties(actions, new, reference, objective)
            penalty = penalty_BK.mean(dim=1).sum() / episodes
            total = total + objective.image_weight * objective.penalty_weight * penalty
            name = f"image/{objective.penalty}"
            means |= {name: penalty} | _by_step(name, penalty_BK, actions, episodes)
    detached = {name: value.detach() for name, value in means.items()}
    return Loss(total, detached, {name: value.detach() for name, value in maxima.items()})
