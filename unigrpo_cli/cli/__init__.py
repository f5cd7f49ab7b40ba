"""The command line. Nothing here imports torch until a command that needs it runs."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys

import typer

from unigrpo_cli import __version__
from unigrpo_cli.cli import (
    doctor,
    eval,
    examples,
    export,
    generate,
    inspect,
    models,
    report,
    rewards,
    rollout,
    sft,
    sweep,
    train,
)
from unigrpo_cli.errors import UsageError, one_line
from unigrpo_cli.io.stdout import keep_running_without_output
from unigrpo_cli.run.signals import NUMBERS

app = typer.Typer(
    name="unigrpo",
    help="Reinforcement learning of reasoning and painting in one unified model (UniGRPO).",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would read `[alias=]` as markup
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 reward or plugin, 4 score below --fail-under, 5 weights, "
    "6 fault found by the doctor, 130 interrupted.",
)
app.command("train")(train.train)
app.command("sft")(sft.sft)
app.command("sweep")(sweep.sweep)
app.command("rollout")(rollout.rollout)
app.command("eval")(eval.evaluate)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("push")(export.push)
app.command("doctor")(doctor.doctor)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.command("examples")(examples.examples)
app.add_typer(rewards.app, name="rewards")
app.add_typer(models.app, name="models")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
) -> None:
    if debug:
        os.environ["UNIGRPO_DEBUG"] = "1"


def _usage_message(message: str) -> str:
    """The message of a usage error; for an option or a command of another tool, what to use here."""
    from unigrpo_cli.config.elsewhere import COMMANDS, setting_here

    if (found := re.match(r"No such option:? '?(-[^\s'=.]+)", message)) and (here := setting_here(found[1])):
        return f"no option {found[1]}: use {'--set ' if re.match('[a-z_.]+(=|$| (and|for|or) )', here) else ''}{here}"
    if (found := re.match(r"No such command '([^']+)'", message)) and (here := COMMANDS.get(found[1])):
        return f"no command {found[1]}: use `{here}`"
    return message


def main() -> None:
    from unigrpo_cli.cli.common import plugin_commands

    code = 1
    keep_running_without_output()

    def end_at_once() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)

    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        # End before Python finalizes: torch's threads release the last collective's tensors slightly later, and
        # needing the interpreter then aborts the process (pytorch/pytorch#179291). The handler registered first
        # runs last, so all other handlers have run.
        atexit.register(end_at_once)
    # OpenMP reads this when torch loads. Threads that spin while waiting halve the speed of small tensors when
    # another program needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for problem in plugin_commands(app):
        print(f"warning: {one_line(problem)}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        # A misspelt option or a value of the wrong kind. Its class depends on typer's version (newer ones include
        # click); the method does not.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        if type(error).__name__ != "NoArgsIsHelpError":  # this one has printed the help
            where = context.command_path if context is not None else "unigrpo"
            print(f"error: {one_line(_usage_message(error.format_message()))} (see `{where} --help`)", file=sys.stderr)
        code = UsageError.exit_code
    if code == 130:
        for number in NUMBERS:  # a second signal changes nothing
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
