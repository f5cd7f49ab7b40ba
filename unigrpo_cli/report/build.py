"""A report on disk: the page, and the picture of curves beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from unigrpo_cli.report.content import runs_content
from unigrpo_cli.report.page import block, document, write
from unigrpo_cli.report.runs import ReportRun
from unigrpo_cli.report.steps import step_content
from unigrpo_cli.report.traced import load_step, traced_steps

LARGEST_PAGE = 38 * 2**20
"""Bytes of a page; a browser opens more, but mail and code hosts refuse it."""


@dataclass(frozen=True)
class Report:
    """What was written, and what was left out of it, a sentence each."""

    path: Path
    size: int
    notes: tuple[str, ...]


def write_report(runs: Sequence[ReportRun], out: Path, largest: int = LARGEST_PAGE) -> Report:
    """Write the page of all runs. Traces with which it would exceed `largest` bytes are thinned out evenly."""
    available = [traced_steps(run) for run in runs]
    blocks: dict[tuple[int, int], str] = {}
    size = sum(map(len, document("", [block("data-runs", runs_content(runs, available, []))])))
    for k, step in _in_turn(available):
        content = block(f"data-step-{k}-{step}", step_content(load_step(runs[k], step)))
        if blocks and size + len(content) > largest:
            break
        blocks[k, step] = content
        size += len(content)
    kept = [[step for step in steps if (k, step) in blocks] for k, steps in enumerate(available)]
    notes = _left_out(runs, len(blocks), sum(map(len, available)), largest)
    first = block("data-runs", runs_content(runs, kept, notes))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    written = write(out, document(f"{title} · unigrpo", [first, *(blocks[key] for key in sorted(blocks))]))
    return Report(out, written, notes)


def _in_turn(available: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Steps of all runs in an order of which every beginning is spread over each run, the last step first."""
    orders = [[(k, step) for step in spread_out(steps)] for k, steps in enumerate(available)]
    for together in zip_longest(*orders):
        yield from (item for item in together if item is not None)


def spread_out(steps: Sequence[int]) -> list[int]:
    """The last, the first, then again and again the middle of the widest gap."""
    if len(steps) < 3:
        return list(reversed(steps))
    order = [len(steps) - 1, 0]
    gaps = [(0, len(steps) - 1)]
    while gaps:
        halves = []
        for low, high in gaps:
            middle = (low + high) // 2
            if low < middle < high:
                order.append(middle)
                halves += [(low, middle), (middle, high)]
        gaps = halves
    return [steps[k] for k in order]


def _left_out(runs: Sequence[ReportRun], kept: int, available: int, largest: int) -> tuple[str, ...]:
    if kept == available:
        return ()
    whose = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return (
        f"Traces of {kept} of {available} steps of {whose} are in this page, evenly spread, to keep it under "
        f"{largest / 2**20:.3g} MiB; `unigrpo report --serve` shows all.",
    )
