"""Metrics of a training step: episodes, rewards, drift between rollout and replay, statistics of the updates.

docs/files.md describes each. None of them is used for training.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.credit import NONE, same_segment
from unigrpo_cli.algo.objective import Loss, Scores, step_densities
from unigrpo_cli.episode import Episode, Group, ImageActions, TextActions, flatten
from unigrpo_cli.replay import Batch
from unigrpo_cli.rewards.batch import RewardResult, rounds_of

GIB = 2**30
PENALTIES = ("image/velocity-mse", "image/latent-kl")


def rollout_metrics(
    groups: Sequence[Group], scored: dict[str, RewardResult], advantage_BS: Tensor, kind_BS: Tensor
) -> dict[str, float]:
    """What was drawn and how it was judged, before any update.

    Args:
        groups: this rank's own; scores and advantages are of all ranks.
    """
    metrics: dict[str, float] = {}
    for name, own in scored.items():
        metrics[f"reward/{name}"] = math.nan if own.mean is None else own.mean
        metrics[f"reward/{name}/abstained"] = float((~own.valid).mean())
        metrics[f"reward/{name}/spread"] = float(own.scores[own.valid].std()) if own.valid.any() else math.nan
        for part, values in own.components.items():
            known = values[own.valid & np.isfinite(values)]  # a part may be about some prompts only
            metrics[f"reward/{name}/{part}"] = float(known.mean()) if len(known) else math.nan
        for part, values in rounds_of(own.segments).items():
            metrics[f"reward/{name}/{part}"] = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
    zero_B = (advantage_BS == 0).all(dim=1)
    metrics["advantage/zero_groups"] = float(zero_B.view(-1, len(groups[0].episodes)).all(dim=1).float().mean())
    metrics["advantage/zero"] = float(zero_B.float().mean())
    metrics["advantage/std"] = float(advantage_BS[kind_BS != NONE].std(correction=0))
    by_name = same_segment(kind_BS)
    for name, at_BS in by_name.items() if len(by_name) > 2 else ():
        metrics[f"advantage/std/{name}"] = float(advantage_BS[at_BS].std(correction=0))
        metrics[f"advantage/zero/{name}"] = float((advantage_BS[at_BS] == 0).float().mean())
    episodes = flatten(groups)
    texts = [s for e in episodes for s in e.segments if isinstance(s, TextActions)]
    if texts:
        metrics["text/length"] = sum(len(t.ids) for t in texts) / len(texts)
        metrics["text/truncated"] = sum(not t.finished for t in texts) / len(texts)
        metrics["text/duplicates"] = _duplicates([[_words(e) for e in g.episodes] for g in groups])
    if any(e.images for e in episodes):
        metrics["image/duplicates"] = _duplicates([[_pictures(e) for e in g.episodes] for g in groups])
    return metrics


def _duplicates(groups: Sequence[Sequence[bytes]]) -> float:
    """Share of members that equal another member of their group."""
    shared = sum(sum(n for n in Counter(group).values() if n > 1) for group in groups)
    return shared / sum(map(len, groups))


def _words(episode: Episode) -> bytes:
    return _digest([s.ids for s in episode.segments if isinstance(s, TextActions)])


def _pictures(episode: Episode) -> bytes:
    """A digest of all painted latents; pixels would round small differences away."""
    return _digest([s.latent for s in episode.segments if isinstance(s, ImageActions)])


def _digest(tensors: Sequence[Tensor]) -> bytes:
    digest = blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()


def drift(replayed: Sequence[tuple[Batch, Scores]]) -> dict[str, float]:
    """How far replay is from rollout, in log-probability: the same weights, another way to compute them."""
    text: list[Tensor] = []
    masks: list[Tensor] = []
    image: list[Tensor] = []
    for batch, old in replayed:
        text.append((old.log_prob_BL - batch.behaviour_text_BL).abs().flatten())
        masks.append(batch.actions.mask_BL.flatten())
        if old.velocities and batch.actions.images:  # drawn states have no log-probability
            scores = [
                flow.log_prob(steps.sde, steps.x_next_BKND, step_densities(steps, v))
                for steps, v in zip(batch.actions.images, old.velocities, strict=True)
            ]
            image.append((torch.cat(scores, dim=1) - batch.behaviour_image_BK).abs())
    found: dict[str, float] = {}
    steps = {i.shape[1] for i in image}
    text_N, image_N = _on_host(text)[_on_host(masks).bool()], _on_host([i.flatten() for i in image])
    for name, values in (("text", text_N), ("image", image_N)):
        if len(values):
            found |= {f"{name}/drift_max": values.max().item(), f"{name}/drift_mean": values.mean().item()}
    if len(steps) == 1 and len(image_N):  # else their steps are not comparable
        means = image_N.view(-1, *steps).mean(dim=0).tolist()
        found |= {f"image/drift_mean/step_{k}": value for k, value in enumerate(means)}
    return found


def _on_host(parts: Sequence[Tensor]) -> Tensor:
    """Vectors one after the other, in one transfer from their device."""
    return torch.cat(list(parts)).cpu() if parts else torch.zeros(0)


@dataclass(frozen=True)
class LossValues:
    """The numbers of a `Loss` on the host: its terms and the loss itself, which add up, and its maxima."""

    means: dict[str, float]
    maxima: dict[str, float]


def values_of(losses: Sequence[Loss]) -> list[LossValues]:
    """The numbers of some losses, in one transfer from their device."""
    named = [(loss.means | {"loss": loss.total.detach()}, loss.maxima) for loss in losses]
    tensors = [value.double() for means, maxima in named for value in (*means.values(), *maxima.values())]
    values = iter(torch.stack(tensors).tolist())
    return [
        LossValues({name: next(values) for name in means}, {name: next(values) for name in maxima})
        for means, maxima in named
    ]


def add_terms(terms: dict[str, float], loss: LossValues) -> None:
    """Add the terms and statistics of one micro-batch to those of its update."""
    for name, value in loss.means.items():
        terms[name] = terms.get(name, 0.0) + value
    for name, value in loss.maxima.items():
        terms[name] = _larger(terms.get(name, 0.0), value)


def over_updates(updates: Sequence[dict[str, float]], *, ratio_checked: bool = True) -> dict[str, float]:
    """Statistics of a step from those of its updates: means, maxima of maxima, and what the first ones were.

    Before the first update the policy equals the old policy, so `first_max_abs_log_ratio` must be 0. From the second
    step on the policy differs from the reference, so a penalty's `first_` value must not be 0.

    Args:
        ratio_checked: the first update's old scores come from a separate pass; otherwise its ratio is 1 by
            construction and is not reported.
    """
    found: dict[str, float] = {}
    for name in updates[0] if updates else ():
        values = [u[name] for u in updates if name in u]
        if "max_abs" in name:
            found[name] = reduce(_larger, values)
            if ratio_checked:
                found[name.replace("max_abs", "first_max_abs")] = values[0]
        elif name.endswith("/log_ratio_square"):  # moments add up, a deviation does not
            mean = sum(u[name.replace("square", "mean")] for u in updates) / len(updates)
            spread = sum(values) / len(values) - mean**2
            found[name.replace("square", "std")] = math.sqrt(max(spread, 0.0))
        else:
            found[name] = sum(values) / len(values)
            if name in PENALTIES:
                found[name.replace("image/", "image/first_")] = values[0]
    return found


def _larger(a: float, b: float) -> float:
    """The maximum, or NaN where there is one, which `max` may lose."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def memory(device: torch.device) -> dict[str, float]:
    """GiB: what the process holds and has held at most; with a GPU, most on `device` since the last call."""
    found = {"memory/process": _resident() / GIB, "memory/process_peak": _peak_resident() / GIB}
    if device.type == "cuda":
        found["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
    return found


def _peak_resident() -> int:
    """Bytes, 0 on Windows. The system counts kibibytes, macOS bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _resident() -> int:
    """Bytes now, or at most where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_resident()


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to `seconds[name]`; several blocks may share a name."""
    began = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
