"""Checks of what is around the algorithm: memory, packages, and on a GPU what bf16 does to scores."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires

import torch
from packaging.requirements import Requirement

from unigrpo_cli import train
from unigrpo_cli.run.directory import PACKAGES, environment
from unigrpo_cli.run.doctor.findings import FAULT, OK, WARN, Evidence, Outcome, judged, skipped
from unigrpo_cli.run.memory.formulas import GIB
from unigrpo_cli.run.memory.plan import TIGHT, free_gib

BF16_TEXT = 0.5  # nats per word; BAGEL's decoding in bf16 against its own fp32 has not been measured yet


def memory(e: Evidence) -> Outcome:
    """What the run needs beside what there is."""
    if e.plan is None:
        return skipped("reckoned by `unigrpo train --dry-run`, and at every start")
    need, there = e.plan.memory.need, e.plan.available
    seen = f"{e.plan.memory.peak.name} needs {need:.2f} GiB of {e.plan.device}"
    return Outcome(FAULT if need > there else WARN if need > TIGHT * there else OK, need, there, seen)


def versions(e: Evidence) -> Outcome:
    """Packages that decide numbers, beside what this one asks for."""
    found, wrong = environment(), []
    try:
        asked = {(r := Requirement(line)).name.lower(): r for line in requires("unigrpo-cli") or ()}
    except PackageNotFoundError:
        return skipped("this package is not installed, so nobody knows what it asks for")
    for name in PACKAGES:
        wanted = asked.get(name.lower().replace("_", "-"))
        if wanted is not None and not wanted.specifier.contains(str(found[name]), prereleases=True):
            wrong.append(f"{name} {found[name]}, asked for {wanted.specifier}")
    said = ", ".join(f"{name} {found[name]}" for name in PACKAGES[1:])
    return Outcome(WARN if wrong else OK, len(wrong), 0, "; ".join(wrong) if wrong else said)


def bf16(e: Evidence) -> Outcome:
    """On a GPU, the first micro-batch scored in bf16 and in fp32."""
    if e.policy.device.type != "cuda":
        return skipped("only on a GPU")
    if e.replayed is None or not e.writes or not e.coarse:
        return skipped("the network computes in fp32" if not e.coarse else "no words are replayed")
    needed = 4 * sum(p.numel() for _, p in e.policy.named_parameters())
    if GIB * free_gib(e.policy.device) < 1.5 * needed:
        return skipped("no room for the network in fp32 beside itself")
    return judged(_from_wide(e), BF16_TEXT, "largest difference of a word's log-probability, bf16 and fp32")


@torch.no_grad()
def _from_wide(e: Evidence) -> float:
    """Largest difference of the first micro-batch's words from those of the same weights in fp32, nats."""
    assert e.replayed is not None
    m = e.replayed.batches[0]
    wide = e.policy.widened()
    scores = train.replay(wide, m.batch, image=False)
    mask = m.batch.actions.mask_BL
    return float((scores.log_prob_BL - m.old_scores.log_prob_BL)[mask].abs().max())
