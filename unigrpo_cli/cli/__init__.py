"""The command line. Nothing here imports torch until a command that needs it runs."""

from __future__ import annotations

import atexit
import os
import signal
import sys

import typer

from unigrpo_cli import __version__
from unigrpo_cli.cli import doctor, eval, generate, inspect, rewards, rollout, train
from unigrpo_cli.errors import UsageError

app = typer.Typer(
    name="unigrpo",
    help="Reinforcement learning of reasoning and painting in one unified model (UniGRPO).",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 reward or plugin, 4 gate not met, 5 weights, "
    "6 fault found by the doctor, 130 interrupted.",
)
app.command("train")(train.train)
app.command("rollout")(rollout.rollout)
app.command("eval")(eval.evaluate)
app.command("generate")(generate.generate)
app.command("doctor")(doctor.doctor)
app.command("inspect")(inspect.inspect)
app.add_typer(rewards.app, name="rewards")


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

    code = 1

    def end_at_once() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)

    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        # One of several processes ends before Python takes itself apart: torch's threads let go of the last
        # collective's tensors a little after it, and one that asks for Python by then aborts the process
        # (pytorch/pytorch#179291). What is registered first is called last, so nothing else is left out.
        atexit.register(end_at_once)
    # OpenMP reads this when torch loads. Threads that spin while they wait halve the speed of small tensors as
    # soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for problem in plugin_commands(app):
        print(f"warning: {problem}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        # A misspelt option or a value of the wrong kind. Which class says so depends on typer's version (newer
        # ones have click inside), what it offers does not.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        if type(error).__name__ != "NoArgsIsHelpError":  # which has printed the help already
            where = context.command_path if context is not None else "unigrpo"
            print(f"error: {error.format_message()} (see `{where} --help`)", file=sys.stderr)
        code = UsageError.exit_code
    if code == 130:
        for number in (signal.SIGINT, signal.SIGTERM):  # who asks twice gets the same answer
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
