"""Skip updates whose batch, loss or gradient is not finite, or whose gradient explodes.

Nothing here changes a weight. The checks raise `RefusedUpdateError` before the optimizer's step; the rest of that
training step is skipped (docs/decisions/0014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from unigrpo_cli.algo.objective import Scores
from unigrpo_cli.episode import Group, ImageActions, TextActions, flatten
from unigrpo_cli.errors import DivergedError, RefusedUpdateError
from unigrpo_cli.replay import Batch
from unigrpo_cli.training.metrics import LossValues

RECENT = 32  # accepted updates whose median a new norm is compared with
ENOUGH = 8  # accepted updates before the rule applies: norms during warm-up are not typical


def check_batch(groups: Sequence[Group], fixed: Sequence[tuple[Batch, Scores | None, Scores | None]]) -> None:
    """Before any backward pass: are all recorded actions finite, and all scores that stay fixed?

    Raises:
        RefusedUpdateError: naming what is not.
    """
    episodes = flatten(groups)
    bad = [e for e in episodes for s in e.segments if not all(v.isfinite().all() for v in _numbers(s))]
    if bad:
        raise RefusedUpdateError(
            f"latents or log-probabilities of the rollout are not finite (first for prompt "
            f"{bad[0].prompt.text!r}, member {bad[0].member}; {len(bad)} of {len(episodes)} episodes)"
        )
    whose, flags = [], []
    for batch, old, reference in fixed:
        for name, scores in (("old policy's", old), ("reference's", reference)):
            if scores is not None:
                whose.append(name)
                flags.append(_finite(scores, batch.actions.mask_BL))
    for name, finite in zip(whose, torch.stack(flags).tolist() if flags else (), strict=True):
        if not finite:
            raise RefusedUpdateError(f"the {name} scores of the recorded actions are not finite")


def _numbers(segment: object) -> tuple[Tensor, ...]:
    if isinstance(segment, ImageActions):
        return segment.before, segment.after, segment.latent, segment.log_prob
    return (segment.log_prob,) if isinstance(segment, TextActions) else ()


def _finite(scores: Scores, mask_BL: Tensor) -> Tensor:
    text = scores.log_prob_BL.isfinite()
    if mask_BL.shape == text.shape:
        text = text | ~mask_BL
    return torch.stack([text.all(), *(v.isfinite().all() for v in scores.velocities)]).all()


def check_losses(losses: Sequence[LossValues]) -> None:
    """Before their backward pass.

    Raises:
        RefusedUpdateError: when a loss is not finite.
    """
    for loss in losses:
        if not math.isfinite(loss.means["loss"]):
            raise RefusedUpdateError(f"the loss is {loss.means['loss']}, not finite, so no update was made")


def check_gradient(norms: dict[str, float], known: dict[str, list[float]], limit: float) -> None:
    """Before the optimizer's step: is each expert's gradient finite, and of a size like those before it?

    Compared with the median of the last accepted updates that had something to learn (`remember_norms`). Each
    expert on its own: norms may be a thousandfold apart, and the larger would hide the smaller's explosion.

    Args:
        known: `RunRecord.gradient_norms`.
        limit: how many times the median; `monitor.explosion`.

    Raises:
        RefusedUpdateError: naming the expert.
    """
    for expert, norm in norms.items():
        if not math.isfinite(norm):
            raise RefusedUpdateError(f"the gradient of the {expert} expert is not finite, so no update was made")
        recent = known.get(expert, [])
        if len(recent) >= ENOUGH and norm > limit * median(recent):
            raise RefusedUpdateError(
                f"the gradient of the {expert} expert exploded: its norm {norm:.3g} is above "
                f"monitor.explosion={limit:g} times the recent median {median(recent):.3g}, so no update was made"
            )


def remember_norms(norms: dict[str, float], known: dict[str, list[float]], taught: bool) -> None:
    """Keep the norms of an accepted update.

    Norms of 0, and updates in which every advantage is 0, are left out: a penalty's gradient alone is a thousand times
    smaller, and after a few such updates each normal gradient would look like an explosion.
    """
    for expert, norm in norms.items():
        if taught and norm > 0:
            recent = known.setdefault(expert, [])
            recent.append(norm)
            del recent[:-RECENT]


def check_weights(parameters: Sequence[Tensor], step: int) -> None:
    """After the optimizer's step, which cannot be taken back."""
    largest = torch._foreach_norm(list(parameters), ord=math.inf)  # NaN where a weight is NaN
    if not torch.stack([norm.float() for norm in largest]).isfinite().all():
        raise DivergedError(
            f"step {step + 1}: weights overflowed in an update whose gradient was finite; lower train.lr_text and "
            "train.lr_image, and resume from the last checkpoint"
        )
