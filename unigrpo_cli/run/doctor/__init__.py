"""The doctor: records a small training step and checks it.

`recorder.py` records what the network actually receives, `probe_step.py` makes the step with the functions that
training calls, and `checks.py` lists the checks of the recording. `at_start.py` is the short form before a run.
"""

from unigrpo_cli.run.doctor.at_start import examine_at_start
from unigrpo_cli.run.doctor.checks import CHECKS, examine
from unigrpo_cli.run.doctor.findings import FAULT, Finding, report, rows, show

__all__ = ["CHECKS", "FAULT", "Finding", "examine", "examine_at_start", "report", "rows", "show"]
