"""The short examination before a run: what is cheap, and leaves nothing behind but its report."""

from __future__ import annotations

import time
from collections.abc import Sequence

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import FaultError
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.directory import Run
from unigrpo_cli.run.doctor.checks import findings
from unigrpo_cli.run.doctor.findings import WARN
from unigrpo_cli.run.doctor.probe_step import gather
from unigrpo_cli.run.doctor.report import faults, line, report, summary
from unigrpo_cli.training.state import TrainState


def examine_at_start(
    state: TrainState, prompts: Sequence[Prompt], rewards: Scorer, config: Config, run: Run, display: Display
) -> None:
    """Examine a run that is about to begin, as `doctor.at_start` says.

    Weights, optimizer and global generators are afterwards as they were, so the run is the same with and without.
    A resumed run is not examined again: it was when it began, and the ratios of every 16th step are watched.

    Raises:
        FaultError: on a fault, with `at_start = "stop"`; nothing has been trained then.
    """
    if config.doctor.at_start == "off" or state.step or not config.train.steps:
        return
    began = time.perf_counter()
    found = findings(gather(state, prompts, rewards, config, thorough=False))
    wrong = faults(found)
    for finding in found:
        if finding in wrong or finding.verdict == WARN:
            display.warn(f"doctor: {line(finding)}")
    if wrong and config.doctor.at_start == "stop":
        names = ", ".join(f.name for f in wrong)
        raise FaultError(
            f"the doctor found a fault, and nothing was trained: {names}; `unigrpo doctor` with the same options "
            "says more, --set doctor.at_start=warn trains all the same"
        )
    display.say(summary(found))
    run.write_json("doctor.json", report(found, time.perf_counter() - began))
