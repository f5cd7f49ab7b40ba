"""`unigrpo train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UsageError

if TYPE_CHECKING:
    from unigrpo_cli.plan import Plan
    from unigrpo_cli.runtime.display import Display


@one_error_line
def train(
    reward: common.Reward = None,
    reward_opt: common.RewardOpt = None,
    model: common.Model = None,
    weights_file: common.WeightsFile = None,
    adapter: common.Adapter = None,
    prompts: common.Prompts = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Training steps (train.steps).")] = None,
    out: common.Out = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="`auto` (newest checkpoint of --out, or of the newest run) or a path."),
    ] = None,
    seed: common.Seed = None,
    preset: common.Preset = None,
    config: common.ConfigFile = None,
    overrides: common.Set = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it would take in memory and time; loads and writes nothing."),
    ] = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Train a unified model with UniGRPO.

    Writes --out: config.toml, metrics.jsonl, samples/, checkpoints/, eval_before.json, eval_after.json and
    summary.json. Interrupting finishes the step, saves a checkpoint and exits with 130. What cannot fit the memory
    (memory_gb, or the device's) is refused before anything is loaded.
    """
    from unigrpo_cli.runtime.display import Display

    display = Display(json=json, quiet=quiet)
    plugins = common.load_plugins(plugin, plugins_dir, display)
    named = {
        "model": model,
        "weights_file": weights_file,
        "adapter": adapter,
        "prompts": prompts,
        "train.steps": steps,
        "seed": seed,
    }

    def resolved(file: Path | None) -> common.Config:
        return common.resolve_config(
            preset=preset,
            config=file,
            overrides=overrides,
            named=named,
            reward=reward,
            reward_opt=reward_opt,
        )

    from unigrpo_cli import training_run

    checkpoint = None
    if resume is None:
        settings = resolved(config)
    else:
        checkpoint = training_run.checkpoint_to_resume(resume, out)
        run = checkpoint.parent.parent
        if out is not None and out.resolve() != run.resolve():
            raise UsageError(f"--resume goes on in {run}; leave out --out {out}")
        began = common.resolve_config(config=run / "config.toml")
        settings = resolved(config or run / "config.toml")
        training_run.refuse_another_model(settings, began)
    if dry_run:
        _dry_run(training_run.plan(settings, checkpoint), display, json)
        return
    if checkpoint is None:
        summary = training_run.start(settings, plugins, display, out)
    else:
        summary = training_run.go_on(settings, plugins, display, checkpoint)
    if json:
        common.print_json(summary)
    if summary["interrupted"]:
        raise typer.Exit(130)


def _dry_run(plan: Plan, display: Display, json: bool) -> None:
    """All of the plan, and then the refusal of one that does not fit."""
    from unigrpo_cli.plan import rates_of, refuse_too_large, report, show

    rates = rates_of(plan)
    if json:
        common.print_json(report(plan, rates))
    else:
        show(plan, rates, display)
    refuse_too_large(plan)
