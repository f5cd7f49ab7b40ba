"""`unigrpo train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UsageError
from unigrpo_cli.parallel.launch import launched
from unigrpo_cli.run.signals import interrupts

if TYPE_CHECKING:
    from unigrpo_cli.config import Config
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.memory.plan import Plan
    from unigrpo_cli.run.start import FinishedRun
    from unigrpo_cli.run.trainer import Trainer


Steps = Annotated[int | None, typer.Option("--steps", min=0, help="Training steps (train.steps).")]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        help="Run or checkpoint to resume. `auto`: the run in --out, started if there is none, or the newest run.",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option("--report-to", help="Experiment tracker: tensorboard, wandb, trackio or mlflow; repeatable."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check options, rewards and prompts and print the memory plan; load no weights."),
]


@one_error_line
def train(
    context: typer.Context,
    reward: common.Reward = None,
    reward_opt: common.RewardOpt = None,
    model: common.Model = None,
    weights_file: common.WeightsFile = None,
    adapter: common.Adapter = None,
    prompts: common.Prompts = None,
    steps: Steps = None,
    out: common.Out = None,
    resume: Resume = None,
    report_to: ReportTo = None,
    seed: common.Seed = None,
    preset: common.Preset = None,
    config: common.ConfigFile = None,
    overrides: common.Set = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    dry_run: DryRun = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Train a unified model with UniGRPO.

    Writes to --out: config.toml, metrics.jsonl, samples/, checkpoints/, eval_before.json, eval_after.json and
    summary.json. Ctrl-C finishes the step, saves a checkpoint and exits with 130; a second Ctrl-C drops the step.
    `--resume auto --out DIR` starts a run or resumes it. A run that does not fit in memory is refused before
    anything is loaded.
    """

    def without_answers(config: Config) -> Config:
        if config.sft.data and resume is None:
            raise UsageError(
                "sft.data imitates answers: type `unigrpo sft`, or --set 'sft.data=[]' to train by rewards"
            )
        return config

    with opened(context, without_answers) as trainer:
        summary = trainer.run() if trainer is not None else None
    finish(context, summary)


@contextmanager
def opened(
    context: typer.Context, check: Callable[[Config], Config] = lambda config: config
) -> Iterator[Trainer | FinishedRun | None]:
    """The run that the options of a command start or resume, on each rank of its launcher; None on a dry run.

    Args:
        check: refuses or completes the settings of a command.
    """
    from unigrpo_cli.run.console import Display

    given = common.options(context)
    out, resume = given["out"], given["resume"]
    rank, _, _ = launched()
    display = Display(json=given["json"], quiet=given["quiet"], rank=rank)
    plugins = common.load_plugins(given["plugin"], given["plugins_dir"], display)

    def chosen() -> tuple[Config, Path | None, Path | None]:
        """Settings, the run to resume, and the checkpoint that was asked for."""
        settings = {"steps": "train.steps", "report_to": "train.report_to", "data": "sft.data", "keep": "sft.keep"}
        if resume is not None:
            run, wanted = run_to_resume(resume, out)
            if (run / "config.toml").is_file():  # not when a job was requeued before it wrote anything
                file = None if given["config"] else run / "config.toml"
                return check(common.resolve_config(context, settings, file=file)), run, wanted
        return check(common.resolve_config(context, settings)), None, None

    with interrupts() as listener:
        from unigrpo_cli.parallel.join import join_ranks
        from unigrpo_cli.run import prepare
        from unigrpo_cli.run.inputs import read_inputs
        from unigrpo_cli.run.resume import checkpoint_to_plan, run_to_resume
        from unigrpo_cli.run.start import opened_run

        if given["dry_run"]:
            configuration, run, wanted = chosen()
            if rank == 0:
                configuration = read_inputs(configuration, plugins, display.say, dry_run=True).config
                plan = prepare.plan(configuration, run and checkpoint_to_plan(run, wanted))
                _dry_run(plan, display, given["json"])
            yield None
            return
        with join_ranks() as ranks:
            with ranks.together():
                configuration, run, wanted = chosen()
            with opened_run(configuration, plugins, display, out, run, wanted, listener, ranks) as trainer:
                yield trainer


def finish(context: typer.Context, summary: dict[str, Any] | None) -> None:
    """Print the summary of a run with --json, on the first rank; an interrupted run exits with 130."""
    if summary is None:
        return
    if context.params["json"] and launched()[0] == 0:
        common.print_json(summary)
    if summary["interrupted"]:
        raise typer.Exit(130)


def _dry_run(plan: Plan, display: Display, json: bool) -> None:
    """Print the plan and its verdict, then refuse a plan that does not fit."""
    from unigrpo_cli.run.memory.plan import refuse_too_large
    from unigrpo_cli.run.memory.report import as_json, show, verdict

    if json:
        common.print_json(as_json(plan))
    else:
        show(plan, display)
        typer.echo(verdict(plan))
    refuse_too_large(plan)
