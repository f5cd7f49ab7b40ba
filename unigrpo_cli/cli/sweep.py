"""`unigrpo sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unigrpo_cli.cli import common, completion
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UnigrpoError
from unigrpo_cli.parallel.launch import launched
from unigrpo_cli.programs import PROGRAMS

if TYPE_CHECKING:
    from unigrpo_cli.config import Config


@one_error_line
def sweep(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file of settings.")] = None,
    reward: common.Reward = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Seeds as 0,1,2: each setting is trained with each.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            help="A value of a varied setting, section.key=value; the same key again adds a value, another key makes "
            "the product.",
            autocompletion=completion.settings,
        ),
    ] = None,
    out: common.Out = None,
    preset: common.Preset = None,
    overrides: common.Set = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Train a run for each combination of settings and each seed, and compare their held-out scores.

    Writes to --out: a run directory for each, sweep.toml, sweep.json and sweep.csv. The same command with the same
    --out resumes a sweep, and adds runs for new values and seeds. Runs execute in sequence, each on all ranks of a
    launcher; commands started side by side with one --out divide the runs.
    """
    from unigrpo_cli.config import load_config
    from unigrpo_cli.parallel.join import join_ranks
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.setup import model_defaults
    from unigrpo_cli.run.sweep import runs_of, seeds_of, show, sweep_directory, train_all

    def configured(more: list[str], seed: int | None) -> Config:
        found = load_config(
            preset=preset,
            file=config,
            overrides=[*(overrides or []), *more],
            named={"seed": seed} | ({"reward.names": reward} if reward else {}),
            model_defaults=model_defaults,
        )
        PROGRAMS.find(found.sampling.program)
        return found

    rank, _, _ = launched()
    display = Display(json=json, quiet=quiet, rank=rank)
    with join_ranks() as ranks:
        with ranks.together():
            plugins = common.load_plugins(plugin, plugins_dir, display)
            runs = runs_of(vary or [], seeds_of(seeds), configured)
            made = str(sweep_directory(out, configured([], None))) if ranks.first else ""
        directory = Path(ranks.from_first(made))
        content, interrupted = train_all(runs, directory, plugins, display, ranks)
    if rank > 0:
        return
    show(content["cells"], display)
    display.say(f"written to {directory}")
    if json:
        common.print_json(content)
    own = {run.name for run in runs}
    states = [row["state"] for row in content["runs"] if row["run"] in own]
    if interrupted:
        display.say("interrupted; the same command with this --out resumes the sweep")
        raise typer.Exit(130)
    if failed := states.count("failed"):
        raise UnigrpoError(f"{failed} of {len(runs)} runs failed: see `error` in {directory / 'sweep.json'}")
    if waiting := states.count("unfinished"):
        display.say(f"{waiting} of {len(runs)} runs are not finished here: another process trains them, or was stopped")
