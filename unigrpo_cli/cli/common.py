"""What all commands share: their common options, their one error line, their JSON."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from unigrpo_cli.errors import EndedElsewhereError, UnigrpoError, one_line
from unigrpo_cli.io.secrets import redacted

if TYPE_CHECKING:
    from unigrpo_cli.config import Config
    from unigrpo_cli.rewards.registry import Plugins
    from unigrpo_cli.rewards.scorer import Scorer
    from unigrpo_cli.rewards.spec import RewardSpec
    from unigrpo_cli.run.console import Display

Model = Annotated[
    str | None,
    typer.Option("--model", help="`embedded`, a model directory, a hub id, a checkpoint or a run."),
]
WeightsFile = Annotated[
    str | None,
    typer.Option("--weights-file", help="The model's weights in its directory, if not ema.safetensors."),
]
Adapter = Annotated[str | None, typer.Option("--adapter", help="PEFT adapter directory put on the model.")]
Reward = Annotated[
    list[str] | None,
    typer.Option("--reward", help="Rewards, [alias=]name[:weight](@key=value)*, comma-separated; repeatable."),
]
RewardOpt = Annotated[
    list[str] | None,
    typer.Option("--reward-opt", "-R", help="An option of a reward, ALIAS.KEY=VALUE (any characters)."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Directory to write; default runs/<time>-<command>.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of everything random.")]
Preset = Annotated[
    str | None, typer.Option("--preset", help="Where defaults come from: embedded or paper (that for a BAGEL).")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, section.key=value; repeatable.")]
PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", "-p", help="file.py or module with rewards or hooks; no:NAME leaves one out."),
]
PluginsDir = Annotated[
    Path | None,
    typer.Option("--plugins-dir", help="Folder whose .py files are loaded as plugins (runs them)."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors and results.")]
Prompts = Annotated[str | None, typer.Option("--prompts", help="`shapes` or a .txt or .jsonl file of prompts.")]


_NO_ROOM = "make room there, or choose another --out"
_NOT_OURS = "choose a place that you may read and write"
PLACE_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_ROOM) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), _NOT_OURS
)
"""What to do about a file that the system refuses, by its reason."""


def one_error_line(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn our errors into a line on stderr and an exit code; a traceback only with --debug."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with stdout_for_json(kwargs.get("json", False)):
            return guarded(*args, **kwargs)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if os.environ.get("UNIGRPO_DEBUG"):
                typer.echo(redacted(traceback.format_exc()).encode(errors="backslashreplace"), err=True)
            if not isinstance(error, EndedElsewhereError):
                typer.echo(f"error: {one_line(redacted(_said(error)))}", err=True)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None

    return wrapped


def _said(error: Exception) -> str:
    """What an error says to a person, with a remedy."""
    if isinstance(error, UnigrpoError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}; {PLACE_REMEDIES.get(error.errno or 0, 'choose another place')}"
    if "No space left on device" in str(error) or "File too large" in str(error):  # safetensors' own errors
        return f"{error}; {PLACE_REMEDIES[errno.ENOSPC]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return f"out of memory ({error}); smaller sampling.batch_size, train.micro_batch_size or images need less"
    return f"{type(error).__name__}: {error} (`unigrpo --debug ...` shows where)"


def resolve_config(
    *,
    preset: str | None = None,
    config: Path | None = None,
    overrides: list[str] | None = None,
    named: dict[str, Any] | None = None,
    reward: list[str] | None = None,
    reward_opt: list[str] | None = None,
) -> Config:
    """The configuration of a command from its common options."""
    from unigrpo_cli.config import load_config

    named = dict(named or {})
    if reward:
        named["reward.names"] = reward
    if reward_opt:
        named["reward.options"] = reward_options(reward_opt)
    from unigrpo_cli.run.setup import model_defaults

    return load_config(preset=preset, file=config, overrides=overrides, named=named, model_defaults=model_defaults)


def reward_options(texts: list[str] | None) -> dict[str, Any]:
    """`--reward-opt` texts as `alias.key` and value."""
    from unigrpo_cli.errors import UsageError
    from unigrpo_cli.rewards.spec import scalar

    options = {}
    for text in texts or ():
        key, found, value = text.partition("=")
        if not found:
            raise UsageError(f"--reward-opt {text}: write it as ALIAS.KEY=VALUE")
        options[key] = scalar(value)
    return options


def load_plugins(plugin: list[str] | None, directory: Path | None, display: Display) -> Plugins:
    """All plugins of this call; problems of installed ones are warnings."""
    from unigrpo_cli.rewards.registry import Plugins

    plugins = Plugins()
    plugins.load(plugin, directory)
    for problem in plugins.rewards.problems:
        display.warn(problem)
    return plugins


def rewards_alone(
    choices: Sequence[RewardSpec], plugins: Plugins, device: str, timeout_s: float | None = None
) -> Scorer:
    """Rewards without a run around them: nothing of models is imported, and to abstain is an answer.

    Raises:
        UsageError: when the device is not there.
        RewardError: when a reward is unknown, misconfigured or cannot be set up.
    """
    import torch

    from unigrpo_cli.errors import UsageError
    from unigrpo_cli.rewards.batch import RewardContext
    from unigrpo_cli.rewards.loaded import RewardLimits
    from unigrpo_cli.rewards.scorer import Scorer

    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {error}") from error
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    context = RewardContext(device=name, seed=0, embedded=False, offline=offline)
    return Scorer(choices, plugins, context, RewardLimits(timeout_s=timeout_s, max_abstain=1.0))


_json_stream: list[TextIO] = []


@contextmanager
def stdout_for_json(wanted: bool) -> Iterator[None]:
    """With --json, whatever prints to stdout meanwhile (a reward, a library) prints to stderr."""
    if not wanted:
        yield
        return
    _json_stream.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream.pop()


def print_json(content: Any) -> None:
    """The one object (or list) on stdout."""
    from unigrpo_cli.io.json import to_json

    stream = _json_stream[-1]
    stream.write(to_json(content) + "\n")
    stream.flush()


def plugin_commands(app: typer.Typer) -> list[str]:
    """Add sub-commands of installed plugins; returns what went wrong, which must not stop `--help`."""
    from unigrpo_cli.rewards.registry import NO_AUTOLOAD, PLUGIN_GROUP

    if not entry_points(group=PLUGIN_GROUP) or os.environ.get(NO_AUTOLOAD, "") not in ("", "0"):
        return []
    from unigrpo_cli.rewards.registry import Plugins

    plugins, problems = Plugins(), []
    with redirect_stdout(sys.stderr):
        plugins.load_installed()  # what is wrong with them a command that needs them will say
        commands, groups = list(app.registered_commands), list(app.registered_groups)
        try:
            plugins.call("unigrpo_register_commands", app=app)
        except UnigrpoError as error:
            problems.append(f"a command cannot be added: {error}")
    ours = {c.name for c in commands} | {g.name for g in groups}
    for added in [c for c in app.registered_commands if c not in commands and c.name in ours]:
        problems.append(f"a plugin's command {added.name!r} is left out: there is one of that name")
        app.registered_commands.remove(added)
    for group in [g for g in app.registered_groups if g not in groups and g.name in ours]:
        problems.append(f"a plugin's command {group.name!r} is left out: there is one of that name")
        app.registered_groups.remove(group)
    return problems
