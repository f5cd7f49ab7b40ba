"""curves.png: the main curves of runs for a README or a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unigrpo_cli.io.atomic import new_file
from unigrpo_cli.report.runs import ReportRun

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6fd1", "#7f7f7f")
FURTHER = ("text/entropy", "text/approx_kl", "image/velocity-mse", "image/latent-kl", "image/kl_old")
"""Shown after the rewards, where they were measured."""
MOST_PANELS, COLUMNS = 9, 3


def save_curves(runs: Sequence[ReportRun], path: Path) -> bool:
    """Draw rewards and distances by step. Seeds of one setting: their mean, and a band from least to largest; a line
    for each where they share no step.

    Dots are held-out scores with 95 % intervals. Returns whether there was anything to draw.
    """
    panels = _panels(runs)
    if not panels:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    settings = list(dict.fromkeys(run.same_setting for run in runs if run.curves.values))
    for k, metric in enumerate(panels):
        axes = figure.add_subplot(rows, columns, k + 1)
        for number, setting in enumerate(settings):
            members = [run for run in runs if run.same_setting == setting and metric in (run.curves.values or {})]
            if members:
                _draw(axes, members, metric, COLOURS[number % len(COLOURS)])
        axes.set_title(metric, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    if len(settings) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
    with new_file(path) as partial:
        figure.savefig(partial, format="png")
    return True


def _panels(runs: Sequence[ReportRun]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.curves.values or {})
    rewards = [name for name in names if name.startswith("reward/") and name.count("/") == 1]
    return [*rewards, *(name for name in FURTHER if name in names)][:MOST_PANELS]


def _draw(axes, members: Sequence[ReportRun], metric: str, colour: str) -> None:
    tables = []
    for run in members:
        values = (run.curves.values or {})[metric]
        tables.append({step: v for step, v in zip(run.curves.steps, values, strict=True) if v is not None})
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    if len(members) == 1 or not steps:
        for run, table in zip(members, tables, strict=True):
            axes.plot(list(table), list(table.values()), color=colour, linewidth=1.4, label=run.name)
    else:
        values_SR = np.array([[table[step] for table in tables] for step in steps])
        label = f"{members[0].name} and {len(members) - 1} more seeds"
        axes.plot(steps, values_SR.mean(axis=1), color=colour, linewidth=1.4, label=label)
        axes.fill_between(steps, values_SR.min(axis=1), values_SR.max(axis=1), color=colour, alpha=0.2, linewidth=0)
    for run in members:
        _held_out(axes, run, metric.removeprefix("reward/"), colour)


def _held_out(axes, run: ReportRun, reward: str, colour: str) -> None:
    last = run.curves.steps[-1] if run.curves.steps else 0
    for evaluation in run.scores:
        if found := evaluation.scores.get(reward):
            at = 0 if evaluation.label == "before" else last
            low, high = found["ci95"]
            bars = [[max(0.0, found["mean"] - low)], [max(0.0, high - found["mean"])]]
            axes.errorbar([at], [found["mean"]], yerr=bars, color=colour, fmt="o", markersize=4, capsize=2, linewidth=1)
