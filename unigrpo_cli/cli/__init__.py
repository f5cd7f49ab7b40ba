"""The command line. Nothing here imports torch until a command that needs it runs."""

from __future__ import annotations

import os
import sys

import typer

from unigrpo_cli import __version__
from unigrpo_cli.cli import evaluating, generating, rewarding, rolling, training

app = typer.Typer(
    name="unigrpo",
    help="Reinforcement learning of reasoning and painting in one unified model (UniGRPO).",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 reward or plugin, 4 gate not met, 5 weights, 130 interrupted.",
)
app.command("train")(training.train)
app.command("rollout")(rolling.rollout)
app.command("eval")(evaluating.evaluate)
app.command("generate")(generating.generate)
app.add_typer(rewarding.app, name="rewards")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
) -> None:
    if debug:
        os.environ["UNIGRPO_DEBUG"] = "1"


def main() -> None:
    """Entry point: sub-commands of installed plugins first, then ours."""
    from unigrpo_cli.cli.common import plugin_commands

    for problem in plugin_commands(app):
        print(f"warning: {problem}", file=sys.stderr)
    app()
