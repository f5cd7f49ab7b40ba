"""What the doctor found, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from unigrpo_cli.run.console import Display
from unigrpo_cli.run.doctor.findings import FAULT, OK, SKIPPED, Finding


def rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """One JSON object per check: name, verdict, value, limit, seen, means, remedy."""
    return [asdict(f) for f in findings]


def faults(findings: Sequence[Finding]) -> list[Finding]:
    return [f for f in findings if f.verdict == FAULT]


def line(finding: Finding) -> str:
    """A finding in one line."""
    return f"{finding.name}: {finding.seen}; {finding.means}; {finding.remedy}"


def show(findings: Sequence[Finding], display: Display) -> None:
    """A table, and under it each finding that is not ok."""
    cells = [(f.name, f.verdict, _number(f.value), _number(f.limit), f.seen) for f in findings]
    display.table("doctor", ("check", "verdict", "value", "limit", "seen"), cells, {2, 3})
    for f in findings:
        if f.verdict not in (OK, SKIPPED):
            display.say(f"\n{f.name}: {f.verdict}\n  seen    {f.seen}\n  means   {f.means}\n  remedy  {f.remedy}")
    display.say("\n" + summary(findings))


def summary(findings: Sequence[Finding]) -> str:
    """How many checks were made and what is wrong, in one line."""
    made = [f for f in findings if f.verdict != SKIPPED]
    wrong = [f"{f.name} ({f.verdict})" for f in made if f.verdict != OK]
    return f"doctor: {len(made)} checks, {', '.join(wrong) or 'nothing wrong'}"


def report(findings: Sequence[Finding], seconds: float) -> dict[str, Any]:
    """The content of doctor.json."""
    return {"faults": len(faults(findings)), "seconds": seconds, "checks": rows(findings)}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
