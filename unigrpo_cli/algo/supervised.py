"""Supervised fine-tuning: the likelihood of given texts and the flow-matching loss of given images.

Shape letters: B episodes, L text tokens, K drawn times of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unigrpo_cli.algo import forward
from unigrpo_cli.algo.objective import Actions, Advantages, Loss, Objective, Scores, per_episode_mean


def supervised_loss(
    actions: Actions,
    new: Scores,
    old: Scores,
    reference: Scores | None,
    advantages: Advantages,
    objective: Objective,
    *,
    episodes: int,
) -> Loss:
    """text_weight * cross-entropy + image_weight * flow matching, to be minimised.

    Cross-entropy, nats: per episode the mean over its tokens of -log p, then the sum over episodes / `episodes`. Flow
    matching (arXiv 2210.02747): per episode the mean over its images and their K draws of the mean over (N, D) of
    (v - (e - x_0))^2, then the sum over episodes / `episodes`. Takes what `unigrpo_loss` takes; nothing else is read.
    """
    total = new.log_prob_BL.new_zeros(())
    means: dict[str, Tensor] = {}
    if objective.text_weight and actions.mask_BL.shape[1]:
        means["sft/text_loss"] = per_episode_mean(-new.log_prob_BL, actions.mask_BL).sum() / episodes
        total = total + objective.text_weight * means["sft/text_loss"]
    if objective.image_weight:
        pairs = zip(new.velocities, actions.noised, strict=True)
        error_BK = torch.cat([forward.flow_matching(v, image.target_BKND) for v, image in pairs], dim=1)
        means["sft/image_loss"] = error_BK.mean(dim=1).sum() / episodes
        total = total + objective.image_weight * means["sft/image_loss"]
    return Loss(total, {name: value.detach() for name, value in means.items()}, {})
