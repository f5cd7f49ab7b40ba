"""A plugin that writes a line of CSV after each training step.

unigrpo train --reward clip --plugin examples/metrics_csv/metrics_csv.py
"""

import csv
from pathlib import Path

from unigrpo_cli import hookimpl


@hookimpl
def unigrpo_after_step(step, metrics, groups):
    with Path("metrics.csv").open("a", newline="") as file:
        spread = max(len({e.reasoning for e in group.episodes}) for group in groups)
        csv.writer(file).writerow([step, metrics["loss"], metrics["advantage/std"], spread])
