"""The doctor: small groups through the very functions that training calls, and what is wrong with them by name.

`witness.py` writes down what the network is really fed, `trial.py` draws, scores, replays and updates on trial,
the checks compare; `checks.py` lists them. `examine` is the whole; `at_start.py` its short form before a run.
"""

from unigrpo_cli.run.doctor.at_start import examine_at_start
from unigrpo_cli.run.doctor.checks import CHECKS, findings
from unigrpo_cli.run.doctor.findings import FAULT, Finding
from unigrpo_cli.run.doctor.probe_step import gather
from unigrpo_cli.run.doctor.report import report, rows, show

__all__ = ["CHECKS", "FAULT", "Finding", "examine_at_start", "findings", "gather", "report", "rows", "show"]
