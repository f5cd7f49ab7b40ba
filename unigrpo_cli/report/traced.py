"""Which steps of a run have traces, and reading one of them."""

from __future__ import annotations

from unigrpo_cli.report.runs import ROLLOUT, TRAIN, ReportRun
from unigrpo_cli.run.trace_files import load_trace, load_traces, trace_directories
from unigrpo_cli.run.trace_types import StepTrace


def traced_steps(run: ReportRun) -> list[int]:
    """The steps of a run whose traces can be shown; 0 stands for the episodes of a rollout."""
    if run.kind == TRAIN:
        return [int(path.name.rpartition("_")[2]) for path in trace_directories(run.directory)]
    return [0] if run.kind == ROLLOUT else []


def load_step(run: ReportRun, step: int) -> StepTrace:
    if run.kind == ROLLOUT:
        return load_traces(run.directory)[0]
    return load_trace(run.directory / "traces" / f"step_{step:06d}")
