"""Checks of replay: can the episodes be replayed, the first log-ratio, and the drift between rollout and replay."""

from __future__ import annotations

import math

import torch

from unigrpo_cli import train
from unigrpo_cli.algo import flow
from unigrpo_cli.algo.objective import step_densities
from unigrpo_cli.run.doctor.findings import FAULT, OK, WARN, Outcome, fault, judged, skipped
from unigrpo_cli.run.doctor.recording import Recording, label
from unigrpo_cli.run.first_ratio import AttentionKernels, clips_of, ratio_limits

DRIFT = {True: (0.5, 0.1), False: (1e-3, 1e-3)}  # largest text and image drift, in low precision and in fp32
STALE = 8.0  # times the first log-ratio: rounding does not grow so much in one update
NO_REPLAY = "replay failed"


def replayable(r: Recording) -> Outcome:
    """The sampled episodes can be stacked and scored, each once."""
    if r.replay is None:
        return fault(r.trouble["replay"])
    count = sum(len(m.rows) for m in r.replay.micro_batches)
    seen = f"{count} episodes in {len(r.replay.micro_batches)} micro-batches"
    if sorted(k for m in r.replay.micro_batches for k in m.rows) != list(range(len(r.episodes))):
        return fault(f"{seen}, but not each episode once")
    return Outcome(OK, None, None, seen)


def text_ratio(r: Recording) -> Outcome:
    """Before an update, old and current policy give each token the same probability (on a CPU exactly)."""
    return _ratio(r, "text") if r.trains_text else skipped("text is not trained")


def image_ratio(r: Recording) -> Outcome:
    """Before an update, old and current policy give each denoising step the same probability (on a CPU exactly)."""
    if not r.trains_image:
        return skipped("images are not trained")
    return _ratio(r, "image") if r.config.objective.image != "nft" else skipped("objective.image=nft has no ratio")


def _ratio(r: Recording, kind: str) -> Outcome:
    """The first log-ratio, now and after a trial update: 0 on a CPU, within rounding elsewhere."""
    if r.replay is None:
        return skipped(NO_REPLAY)
    limit = ratio_limits(r.policy, r.config.objective)[kind]
    clip = clips_of(r.config.objective)[kind]
    first = later = max((t.get(f"{kind}/max_abs_log_ratio", 0.0) for t in r.replay.terms), default=math.nan)
    seen = f"log-ratio {first:.3g} before an update; {no_update(r)}"
    if r.trial is not None:
        later = r.trial.step.metrics.get(f"{kind}/first_max_abs_log_ratio", math.nan)
        seen = f"log-ratio {first:.3g} before an update, {later:.3g} after one"
    value = math.nan if math.isnan(first) or math.isnan(later) else max(first, later)
    stale = later > STALE * first + limit / 100
    if not value <= limit or (value > 0 and stale):
        return fault(seen, value, limit)
    if value == 0:
        return Outcome(WARN if "update" in r.trouble else OK, value, limit, seen)
    seen += f", clip range {clip:g}; attention kernels: {_attention_kernels(r)}"
    means = "the passes with and without gradients round differently, which is no fault off the CPU"
    if value <= clip / 10:
        return Outcome(WARN, value, limit, seen, means, "nothing to do below a tenth of the clip range")
    remedy = (
        "set train.minibatches=1 and train.epochs=1, where no ratio needs a second pass, or dtype=float32; or let "
        "torch use one attention kernel for both passes"
    )
    return Outcome(WARN, value, limit, seen, means, remedy)


def _attention_kernels(r: Recording) -> str:
    """The attention kernels of a replay without gradients and with them."""
    assert r.replay is not None
    found = []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), AttentionKernels() as kernels:
            train.replay(r.policy, r.replay.micro_batches[0].batch, image=r.trains_image)
        found.append(str(kernels))
    return f"{found[0]} without gradients, {found[1]} with gradients"


def text_drift(r: Recording) -> Outcome:
    """Rollout and replay give each token the same probability, up to `doctor.text_drift`."""
    if not r.trains_text:
        return skipped("text is not trained")
    found = []
    for _, m, b, episode in r.replayed_rows():
        mask = m.batch.actions.mask_BL[b]
        gaps = (m.old_scores.log_prob_BL[b] - m.batch.behaviour_text_BL[b])[mask].abs().tolist()
        found += [(gap, f"token {k} of {label(episode)}") for k, gap in enumerate(gaps)]
    return _drift(r, found, r.config.doctor.text_drift or DRIFT[r.low_precision][0])


def image_drift(r: Recording) -> Outcome:
    """Rollout and replay give each denoising step the same probability, up to `doctor.image_drift`."""
    if not r.trains_image or not r.scores_steps:
        return skipped("images are not trained" if r.scores_steps else "no denoising step is scored")
    found = []
    for _, m, b, episode in r.replayed_rows():
        pairs = zip(m.batch.actions.images, m.old_scores.velocities, strict=True)
        scores = torch.cat([flow.log_prob(s.sde, s.x_next_BKND, step_densities(s, v))[b] for s, v in pairs])
        gaps = (scores - m.batch.behaviour_image_BK[b]).abs().tolist()
        steps = [k for image in episode.images for k in image.window.steps]
        found += [(gap, f"step {k} of {label(episode)}") for k, gap in zip(steps, gaps, strict=True)]
    return _drift(r, found, r.config.doctor.image_drift or DRIFT[r.low_precision][1])


def _drift(r: Recording, found: list[tuple[float, str]], limit: float) -> Outcome:
    """The largest difference between replayed and recorded log-probabilities, and the mean."""
    if not found:
        return skipped(NO_REPLAY if r.replay is None else "nothing was sampled")
    value, where = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    mean = sum(gap for gap, _ in found) / len(found)
    rounding = r.low_precision and mean <= limit / 10  # of thousands of tokens in bf16, a few differ a lot
    return judged(value, limit, f"largest at {where}, mean {mean:.2g}", WARN if rounding else FAULT)


def no_update(r: Recording) -> str:
    """Why there was no trial update."""
    return r.trouble.get("update") or r.trouble.get("no update") or "no update was tried"
