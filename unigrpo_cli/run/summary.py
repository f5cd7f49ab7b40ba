"""What a run prints first and last, and its `summary.json`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from unigrpo_cli.config import Config
from unigrpo_cli.errors import UnigrpoError, quoted
from unigrpo_cli.evaluate import Evaluation, compare, load_report, paired
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.directory import Run
from unigrpo_cli.run.memory import batch_of
from unigrpo_cli.training.state import TrainState


def headline(config: Config, directory: Path, state: TrainState) -> str:
    """Model, batch arithmetic and directory."""
    assert state.origin is not None
    t, ranks = config.train, state.ranks
    method = "Imitation of answers" if config.sft.data else "UniGRPO"
    experts = "both experts" if t.experts == "both" else f"the {t.experts} expert"
    lines = [
        f"{method} on {state.origin.reference.base}, {t.finetune} fine-tuning of {experts}",
        batch_of(config).lines()[0],
        *([] if ranks.alone else [_per_rank(config, state)]),
        f"writing {directory}" + (f", resuming from step {state.step}" if state.step else ""),
    ]
    return "\n".join(lines)


def _per_rank(config: Config, state: TrainState) -> str:
    t, world = config.train, state.ranks.world
    prompts = t.prompts_per_step // world
    episodes = prompts * batch_of(config).group
    weights = "sharded layers" if state.policy.is_sharded else "whole weights on each"
    return (
        f"{world} ranks, {weights}: each draws {prompts} prompts x {batch_of(config).group} = {episodes} episodes, "
        f"{episodes // t.minibatches} per optimizer step"
    )


def of_run(
    state: TrainState, files: Run, after: Evaluation | None, seed: int, warn: Callable[[str], None]
) -> dict[str, Any]:
    """The content of `summary.json`, but for seconds; `after` is None for a run that was interrupted."""
    record, none = state.record, {"text": None, "image": None}
    found: dict[str, Any] = {
        "run": str(files.directory),
        "steps": state.step,
        "interrupted": after is None,
        "eval_before": record.eval_before,
        "eval_after": None,
        "intervals": {},
        "difference": {},
        "ratio_step0_max_abs_log": record.ratio_step0_max_abs_log or none,
        "rollout_drift_max_abs": record.rollout_drift_max_abs or none,
        "checkpoint": str(files.checkpoint(state.step)),
    }
    if after is None:
        return found
    found |= {"eval_after": after.means(), "intervals": {"after": _intervals(after)}}
    try:
        before = load_report(files.directory / "eval_before.json")
    except UnigrpoError as error:
        warn(f"no difference is reported: {error}")
        return found
    if not paired(before, after):
        warn("no difference is reported: the evaluations used other prompts or settings")
        return found
    found["intervals"]["before"] = _intervals(before)
    return found | {"difference": compare(before, after, seed)}


def _intervals(result: Evaluation) -> dict[str, tuple[float, float]]:
    return {name: estimate.ci95 for name, estimate in result.scores.items()}


def show(summary: dict[str, Any], config: Config, prompts: int, display: Display) -> None:
    """The table of scores before and after, and where things are."""
    table = Table(title=f"evaluation on {config.eval.suite}, {prompts} prompts", title_style="bold")
    table.add_column("reward")
    for name in ("before", "after", "difference, 95 %"):
        table.add_column(name, justify="right")
    for name, after in summary["eval_after"].items():
        before, found = (summary["eval_before"] or {}).get(name), summary["difference"].get(name)
        table.add_row(
            name,
            _number(before),
            _number(after),
            f"{found['mean']:+.3f}, {found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f}" if found else "-",
        )
    display.say(table)
    run = summary["run"]
    display.say(
        f"checkpoint {summary['checkpoint']}\npictures   {Path(run) / 'samples' / 'progress.png'}\n"
        f"report     unigrpo report {quoted(run)}\n"
        f'try        unigrpo generate --model {quoted(run)} "a red circle above a blue square"'
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
