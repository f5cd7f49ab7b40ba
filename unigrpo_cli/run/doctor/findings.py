"""Outcomes of checks, and their report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unigrpo_cli.run.console import Display

OK, WARN, FAULT, SKIPPED = "ok", "warn", "FAULT", "skipped"


@dataclass(frozen=True)
class Outcome:
    """A verdict, the measured value, its limit, and what was seen, in words.

    `means` and `remedy` replace the check's own where the outcome knows better ones.
    """

    verdict: str
    value: float | None
    limit: float | None
    seen: str
    means: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """The outcome of a check by its name. `means` and `remedy` are empty for an outcome that is ok or skipped."""

    name: str
    verdict: str
    value: float | None
    limit: float | None
    seen: str
    means: str
    remedy: str


def judged(value: float, limit: float, seen: str, otherwise: str = FAULT) -> Outcome:
    """Ok up to the limit; NaN is above any limit."""
    return Outcome(OK if value <= limit else otherwise, value, limit, seen)


def fault(seen: str, value: float | None = None, limit: float | None = None) -> Outcome:
    return Outcome(FAULT, value, limit, seen)


def skipped(why: str) -> Outcome:
    return Outcome(SKIPPED, None, None, why)


def worst(found: Sequence[Outcome], nothing: str) -> Outcome:
    """The first fault, else the first warning, else all in one; `nothing` is why there are none."""
    for verdict in (FAULT, WARN):
        for outcome in found:
            if outcome.verdict == verdict:
                return outcome
    if not found:
        return skipped(nothing)
    values = [o.value for o in found if o.value is not None]
    return Outcome(OK, max(values, default=0.0), found[0].limit, ", ".join(o.seen for o in found))


# ----- report


def rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """One JSON object per check: name, verdict, value, limit, seen, means, remedy."""
    return [asdict(f) for f in findings]


def faults(findings: Sequence[Finding]) -> list[Finding]:
    return [f for f in findings if f.verdict == FAULT]


def line(finding: Finding) -> str:
    return f"{finding.name}: {finding.seen}; {finding.means}; {finding.remedy}"


def show(findings: Sequence[Finding], display: Display) -> None:
    """A table, and below it every warning and fault in full."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    cells = [(f.name, f.verdict, number(f.value), number(f.limit), f.seen) for f in findings]
    display.table("doctor", ("check", "verdict", "value", "limit", "seen"), cells, {2, 3})
    for f in findings:
        if f.verdict not in (OK, SKIPPED):
            display.say(f"\n{f.name}: {f.verdict}\n  seen    {f.seen}\n  means   {f.means}\n  remedy  {f.remedy}")
    display.say("\n" + summary(findings))


def summary(findings: Sequence[Finding]) -> str:
    """How many checks ran and which found something, in one line."""
    ran = [f for f in findings if f.verdict != SKIPPED]
    wrong = [f"{f.name} ({f.verdict})" for f in ran if f.verdict != OK]
    return f"doctor: {len(ran)} checks, {', '.join(wrong) or 'nothing wrong'}"


def report(findings: Sequence[Finding], seconds: float) -> dict[str, Any]:
    return {"faults": len(faults(findings)), "seconds": seconds, "checks": rows(findings)}
