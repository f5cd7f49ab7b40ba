"""Checks of the rewards: do they tell episodes apart, do they repeat, do they own up to what they cannot judge?"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from unigrpo_cli.run.doctor.findings import FAULT, OK, WARN, Evidence, Outcome, judged, skipped
from unigrpo_cli.run.doctor.unreadable import ABSTAINS, LATE, NOT_ASKED, PARTS, RAISES

TOLERANCE = 1e-4  # a network's scores move this much with the batch they are in
TIES = "ties"  # a verdict that other rewards decide
NOISE = 0.25  # deviation of a reward's noise over its spread within groups


def reward_spread(e: Evidence) -> Outcome:
    """Some group has episodes of different reward, for each reward that is trained on."""
    found: list[Outcome] = []
    for name in _weighted(e):
        scores_PG = e.judged.scored[name].scores.reshape(len(e.drawn.groups), -1)
        known = [row[np.isfinite(row)] for row in scores_PG]
        spread = max((float(np.ptp(row)) for row in known if len(row)), default=0.0)
        if spread > 0:
            found.append(Outcome(OK, spread, 0.0, f"{name} up to {spread:.3g} apart in a group"))
            continue
        contrasts = [x for x in e.judged.contrasts.get(name, []) if math.isfinite(x)]
        low = next(r.range[0] for r in e.rewards.rewards if r.alias == name)
        value = max((float(row[0]) for row in known if len(row)), default=math.nan)
        if math.isnan(value):
            continue  # it judged nothing, which is the matter of reward-abstains
        if len({value, *contrasts}) > 1 or name not in e.judged.contrasts:
            found.append(Outcome(TIES, 0.0, 0.0, f"{name} ties in every group here, but not everywhere"))
        elif value == low and not e.thorough:  # perhaps what it looks for is rare: that stops no run
            found.append(Outcome(WARN, 0.0, 0.0, f"{name} gave {value:g} for everything"))
        else:
            count = scores_PG.size + len(contrasts)
            found.append(Outcome(FAULT, 0.0, 0.0, f"{name} gave {value:g} for all {count} things it was shown"))
    # Beside one that differs there is something to learn from, and a guard may be constant.
    others = any(o.verdict == OK for o in found)
    milder = {TIES: OK, FAULT: WARN} if others else {TIES: WARN}
    return _worst([replace(o, verdict=milder.get(o.verdict, o.verdict)) for o in found])


def reward_repeats(e: Evidence) -> Outcome:
    """The same episodes get the same rewards; else how large the noise is beside the spread within groups."""
    found: list[Outcome] = []
    for name in _weighted(e):
        again = e.judged.again.get(name)
        if again is None:
            continue
        first = e.judged.scored[name].scores
        gaps = np.abs(first - np.array(again))
        gaps = gaps[np.isfinite(gaps)]
        scale = max(1.0, float(np.abs(first[np.isfinite(first)]).max(initial=0.0)))
        if not len(gaps) or gaps.max() <= TOLERANCE * scale:
            found.append(Outcome(OK, float(gaps.max()) if len(gaps) else 0.0, NOISE, f"{name} repeats"))
            continue
        noise = float(np.sqrt((gaps**2).mean() / 2))  # a difference has twice the variance
        groups = [row[np.isfinite(row)] for row in first.reshape(len(e.drawn.groups), -1)]
        spread = float(np.mean([row.std() for row in groups if len(row)]))
        share = noise / spread if spread else math.inf
        seen = f"{name} has noise of {noise:.2g} beside a spread of {spread:.2g} in groups"
        found.append(judged(share, NOISE, seen, WARN))
    if not found and not e.thorough:
        return skipped("rewards that wait for an endpoint are asked once at the start")
    return _worst(found)


def reward_errors(e: Evidence) -> Outcome:
    """What a reward cannot read it raises about or abstains from; no failure becomes a number."""
    if not e.judged.unreadable:
        return skipped("rewards that wait for an endpoint are asked once at the start")
    found: list[Outcome] = []
    for name, answers in e.judged.unreadable.items():
        for part, answer in zip(PARTS, answers, strict=True):
            if answer == LATE:
                return Outcome(FAULT, None, None, f"{name} gave no answer in time about an unreadable {part}")
            if answer not in (RAISES, ABSTAINS, NOT_ASKED):
                # Malformed words may well be worth 0, and a reward on their form catches what they make it raise.
                verdict = WARN if part == "reasoning" else FAULT
                found.append(
                    Outcome(verdict, float(answer), None, f"{name} gives {answer} for a {part} that cannot be read")
                )
    if found:
        return _worst(found)
    names = ", ".join(e.judged.unreadable)
    return Outcome(OK, None, None, f"{names} raise or abstain")


def reward_abstains(e: Evidence) -> Outcome:
    limit, found = e.config.reward.max_abstain, []
    for name in _weighted(e):
        share = float((~e.judged.scored[name].valid).mean())
        verdict = FAULT if share == 1 and e.thorough else WARN  # in a run, reward.max_abstain decides
        found.append(judged(share, min(limit, 0.999), f"{name} abstained on {share:.0%}", verdict))
    return _worst(found)


def _weighted(e: Evidence) -> list[str]:
    return [name for name, weight in e.rewards.weights.items() if weight]


def _worst(found: list[Outcome]) -> Outcome:
    """The gravest of several; all of them in words when none is grave."""
    for verdict in (FAULT, WARN):
        for outcome in found:
            if outcome.verdict == verdict:
                return outcome
    if not found:
        return skipped("no reward that is trained on judged anything")
    values = [o.value for o in found if o.value is not None]
    return Outcome(OK, max(values, default=0.0), found[0].limit, ", ".join(o.seen for o in found))
