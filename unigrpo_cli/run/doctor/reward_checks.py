"""Checks of the rewards: constant, noisy or abstaining ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from unigrpo_cli.run.doctor.findings import FAULT, OK, WARN, Outcome, fault, judged, worst
from unigrpo_cli.run.doctor.recording import Recording

TOLERANCE = 1e-4  # a network's scores change this much with the batch they are in
NOISE = 0.25  # deviation of a reward's noise over its spread within groups
NO_SCORES = "no trained reward scored anything"
ASKED_ONCE = "remote rewards score once at the start of a run"


def reward_spread(r: Recording) -> Outcome:
    """Each trained reward differs within some group."""
    found: list[Outcome] = []
    ties: list[Outcome] = []
    for name in _trained(r):
        scores_PG = r.scores.scored[name].scores.reshape(len(r.rollout.groups), -1)
        known = [row[np.isfinite(row)] for row in scores_PG]
        known = [row for row in known if len(row)]
        if not known:
            continue  # reward-abstains reports it
        spread, value = max(float(np.ptp(row)) for row in known), float(known[0][0])
        contrasts = [x for x in r.scores.contrasts.get(name, []) if math.isfinite(x)]
        low = next(loaded.range[0] for loaded in r.rewards.rewards if loaded.alias == name)
        if spread > 0:
            found.append(Outcome(OK, spread, 0.0, f"{name} differs by up to {spread:.3g} within a group"))
        elif name not in r.scores.contrasts or len({value, *contrasts}) > 1:
            ties.append(
                Outcome(WARN, 0.0, 0.0, f"{name} is equal within each sampled group, but differs on other samples")
            )
        elif value == low and not r.thorough:  # its success may be rare: no reason to stop a run
            found.append(Outcome(WARN, 0.0, 0.0, f"{name} gave {value:g} to everything"))
        else:
            count = scores_PG.size + len(contrasts)
            found.append(fault(f"{name} gave {value:g} to all {count} samples", 0.0, 0.0))
    if any(o.verdict == OK for o in found):  # training learns from that reward; a constant one may be a guard
        found = [replace(o, verdict=WARN) if o.verdict == FAULT else o for o in found]
        ties = [replace(o, verdict=OK) for o in ties]
    return worst(found + ties, NO_SCORES)


def reward_repeats(r: Recording) -> Outcome:
    """A second scoring gives the same scores, or scores whose noise is small beside the spread within groups."""
    found: list[Outcome] = []
    for name in _trained(r):
        if name not in r.scores.again:
            continue
        first = r.scores.scored[name].scores
        gaps = np.abs(first - np.array(r.scores.again[name]))
        gaps = gaps[np.isfinite(gaps)]
        largest = float(gaps.max(initial=0.0))
        if largest <= TOLERANCE * max(1.0, float(np.abs(first[np.isfinite(first)]).max(initial=0.0))):
            found.append(Outcome(OK, largest, NOISE, f"{name} repeats"))
            continue
        noise = float(np.sqrt((gaps**2).mean() / 2))  # the variance of a difference is twice that of a score
        groups = [row[np.isfinite(row)] for row in first.reshape(len(r.rollout.groups), -1)]
        spread = float(np.mean([row.std() for row in groups if len(row)]))
        share = noise / spread if spread else math.inf
        found.append(judged(share, NOISE, f"{name} has noise of {noise:.2g} and a spread of {spread:.2g}", WARN))
    return worst(found, NO_SCORES if r.thorough else ASKED_ONCE)


def reward_abstains(r: Recording) -> Outcome:
    """Each trained reward scores enough samples for `reward.max_abstain`."""
    limit, found = r.config.reward.max_abstain, []
    for name in _trained(r):
        share = float((~r.scores.scored[name].valid).mean())
        verdict = FAULT if share == 1 and r.thorough else WARN  # in a run, reward.max_abstain decides
        found.append(judged(share, min(limit, 0.999), f"{name} abstained on {share:.0%}", verdict))
    return worst(found, NO_SCORES)


def _trained(r: Recording) -> list[str]:
    return [name for name, weight in r.rewards.weights.items() if weight]
