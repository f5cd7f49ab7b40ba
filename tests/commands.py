"""A command of `unigrpo` in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from unigrpo_cli.cli import app


def unigrpo(*arguments: object) -> Result:
    """What `unigrpo ARGUMENTS` prints, and its exit code."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
