"""Standing metrics of a training step: what was drawn, how it was judged, how exactly it is replayed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.objective import Scores, step_densities
from unigrpo_cli.episode import Group, TextActions, flatten
from unigrpo_cli.replay import Batch
from unigrpo_cli.rewards.scoring import Scored

CLEAR = 3.0  # t statistics; noise without a trend rises so over one stretch of twenty steps in two hundred


def rollout_metrics(groups: Sequence[Group], scored: dict[str, Scored], advantage_B: Tensor) -> dict[str, float]:
    """What was drawn and how it was judged, before any update."""
    metrics: dict[str, float] = {}
    for name, own in scored.items():
        metrics[f"reward/{name}"] = math.nan if own.mean is None else own.mean
        metrics[f"reward/{name}/abstained"] = float((~own.valid).mean())
        for part, values in own.components.items():
            known = values[own.valid & np.isfinite(values)]  # a part may be about some prompts only
            metrics[f"reward/{name}/{part}"] = float(known.mean()) if len(known) else math.nan
    advantage_PG = advantage_B.view(len(groups), -1)
    metrics["advantage/zero_groups"] = float((advantage_PG == 0).all(dim=1).float().mean())
    metrics["advantage/std"] = float(advantage_B.std(correction=0))
    texts = [s for e in flatten(groups) for s in e.segments if isinstance(s, TextActions)]
    if texts:
        metrics["text/length"] = sum(len(t.ids) for t in texts) / len(texts)
        metrics["text/truncated"] = sum(not t.finished for t in texts) / len(texts)
    return metrics


def trend(values: Sequence[float]) -> float:
    """Slope of a series in units of its standard error (a t statistic); 0 for fewer than three finite values."""
    pairs = [(float(k), v) for k, v in enumerate(values) if math.isfinite(v)]
    if len(pairs) < 3:
        return 0.0
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in pairs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in pairs) / (len(pairs) - 2)
    if rest == 0:
        return math.copysign(math.inf, slope) if slope else 0.0
    return slope / math.sqrt(rest / spread)


def parting(history: Sequence[dict[str, float]], trained: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Held-out rewards that fall while a trained one rises: how it looks when a policy learns its judge's weakness.

    Args:
        history: of each step the rewards' means by name, all with larger meaning better.

    Returns:
        Names of the held-out rewards, when trends over `history` are clear (|t| > 3) and opposite.
    """
    if not any(trend([row.get(name, math.nan) for row in history]) > CLEAR for name in trained):
        return []
    return [name for name in held_out if trend([row.get(name, math.nan) for row in history]) < -CLEAR]


def drift(replayed: Sequence[tuple[Batch, Scores]]) -> dict[str, float]:
    """How far replay is from rollout, in log-probability: the same weights, another way to compute them."""
    text: list[Tensor] = []
    image: list[Tensor] = []
    for batch, old in replayed:
        mask = batch.actions.mask_BL
        text.append((old.log_prob_BL - batch.behaviour_text_BL)[mask].abs())
        if old.velocities:
            scores = [
                flow.log_prob(steps.kernel, steps.x_next_BKND, step_densities(steps, v))
                for steps, v in zip(batch.actions.images, old.velocities, strict=True)
            ]
            image.append((torch.cat(scores, dim=1) - batch.behaviour_image_BK).abs().flatten())
    found: dict[str, float] = {}
    for name, parts in (("text", text), ("image", image)):
        values = torch.cat(parts) if parts else torch.zeros(0)
        if len(values):
            found |= {f"{name}/drift_max": values.max().item(), f"{name}/drift_mean": values.mean().item()}
    return found
