"""`unigrpo train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.parallel.heartbeat import launched
from unigrpo_cli.run.signals import interrupts

if TYPE_CHECKING:
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.memory.plan import Plan


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
        typer.Option("--resume", help="A run, a checkpoint, or `auto`: --out (begun if need be) or the newest run."),
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
    summary.json. Interrupting finishes the step, saves a checkpoint and exits with 130; interrupting again drops
    the step. `--resume auto --out DIR` begins the run or goes on with it, whichever it needs. What cannot fit the
    memory (memory_gb, or the device's) is refused before anything is loaded.
    """
    from unigrpo_cli.run.console import Display

    rank, _, _ = launched()
    display = Display(json=json, quiet=quiet, rank=rank)
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

    def chosen() -> tuple[common.Config, Path | None, Path | None]:
        """Settings, the run to go on with, and the checkpoint of it that is asked for."""
        if resume is None:
            return resolved(config), None, None
        run, wanted = run_to_resume(resume, out)
        if not (run / "config.toml").is_file():  # requeued before it had begun
            return resolved(config), None, None
        return resolved(config or run / "config.toml"), run, wanted

    with interrupts() as listener:
        from unigrpo_cli.parallel.ranks import joined
        from unigrpo_cli.run import prepare, start
        from unigrpo_cli.run.resume import checkpoint_to_plan, run_to_resume

        if dry_run:
            settings, run, wanted = chosen()
            if rank == 0:
                _dry_run(prepare.plan(settings, run and checkpoint_to_plan(run, wanted)), display, json)
            return
        with joined() as ranks:
            with ranks.together():
                settings, run, wanted = chosen()
            if run is None:
                summary = start.start(settings, plugins, display, out, listener, ranks)
            else:
                summary = start.resume(settings, plugins, display, run, wanted, listener, ranks)
    if json and rank == 0:
        common.print_json(summary)
    if summary["interrupted"]:
        raise typer.Exit(130)


def _dry_run(plan: Plan, display: Display, json: bool) -> None:
    """All of the plan, and then the refusal of one that does not fit."""
    from unigrpo_cli.run.memory.plan import rates_of, refuse_too_large, report, show

    rates = rates_of(plan)
    if json:
        common.print_json(report(plan, rates))
    else:
        show(plan, rates, display)
    refuse_too_large(plan)
