"""The short examination at the start of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import FaultError
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.directory import Run
from unigrpo_cli.run.doctor.checks import examine
from unigrpo_cli.run.doctor.findings import WARN, faults, line, report, summary
from unigrpo_cli.training.state import TrainState


def examine_at_start(
    state: TrainState, prompts: Sequence[Prompt], rewards: Scorer, config: Config, run: Run, display: Display
) -> None:
    """Examine a new run before its first step, as `doctor.at_start` says; a resumed run is not examined again.

    Weights, optimizer and global random generators are restored, so the run is the same with and without it.
    """
    if config.doctor.at_start == "off" or state.step or not config.train.steps:
        return
    began = time.perf_counter()
    found = examine(state, prompts, rewards, config, thorough=False)
    wrong = faults(found)
    for finding in found:
        if finding in wrong or finding.verdict == WARN:
            display.warn(f"doctor: {line(finding)}")
    if wrong and config.doctor.at_start == "stop":
        names = ", ".join(f.name for f in wrong)
        raise FaultError(
            f"the doctor found a fault, and nothing was trained: {names}; `unigrpo doctor` with the same options "
            "shows more, --set doctor.at_start=warn trains anyway"
        )
    display.say(summary(found))
    run.write_json("doctor.json", report(found, time.perf_counter() - began))
