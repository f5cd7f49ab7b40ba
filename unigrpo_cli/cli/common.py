"""What all commands share: common options, the settings they give, the one error line, the JSON object."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from unigrpo_cli.cli import completion
from unigrpo_cli.errors import EndedElsewhereError, RewardError, UnigrpoError, UsageError, one_line
from unigrpo_cli.io.entry_points import OURS, distribution, installed
from unigrpo_cli.io.secrets import redacted
from unigrpo_cli.io.stdout import stdout_to_stderr
from unigrpo_cli.programs import PROGRAMS

if TYPE_CHECKING:
    from unigrpo_cli.config import Config
    from unigrpo_cli.rewards.registry import Plugins
    from unigrpo_cli.rewards.scorer import Scorer
    from unigrpo_cli.rewards.spec import RewardSpec
    from unigrpo_cli.run.console import Display

Model = Annotated[
    str | None, typer.Option("--model", help="`embedded`, a model directory, a hub id, a checkpoint or a run.")
]
WeightsFile = Annotated[
    str | None, typer.Option("--weights-file", help="Weights file in the model directory, if not ema.safetensors.")
]
Adapter = Annotated[str | None, typer.Option("--adapter", help="PEFT adapter directory to apply to the model.")]
Reward = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        help="Rewards as `[alias=]name[:weight](@key=value)*`, comma-separated; repeatable.",
        autocompletion=completion.rewards,
    ),
]
RewardOpt = Annotated[
    list[str] | None,
    typer.Option("--reward-opt", "-R", help="Option of a reward as ALIAS.KEY=VALUE; VALUE may hold any character."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Output directory; default runs/<time>-<command>.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Random seed.")]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Default settings: embedded, paper or bagel-one-gpu; by default the model's.",
        autocompletion=completion.presets,
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change one setting: section.key=value; repeatable.", autocompletion=completion.settings
    ),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", "-p", help="Python file or module with rewards or hooks; no:NAME disables one."),
]
PluginsDir = Annotated[
    Path | None, typer.Option("--plugins-dir", help="Directory whose .py files are loaded (and run) as plugins.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, everything else to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and results.")]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="`shapes`, `shapes-edit`, `shapes-restore`, a .txt, .jsonl, .csv, .tsv or .parquet file, or "
        "hf:ORG/NAME[:split[:column]].",
    ),
]

SETTINGS = {
    "model": "model",
    "weights_file": "weights_file",
    "adapter": "adapter",
    "prompts": "prompts",
    "seed": "seed",
    "reward": "reward.names",
}
"""Options of commands and the settings they give; a command adds its own."""

_NO_ROOM = "free disk space, or choose another --out"
_NO_ACCESS = "choose a place with read and write permission"
PLACE_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_ROOM) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), _NO_ACCESS
)
"""What to do about a file that the system refuses, by error number."""


def options(context: typer.Context) -> dict[str, Any]:
    """Values of a command's options. Before typer 0.29 the context has paths as text."""
    return context.params | {
        name: Path(context.params[name]) for name in ("out", "config", "plugins_dir") if context.params.get(name)
    }


def one_error_line(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors into one line on stderr and an exit code; a traceback only with --debug."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        quiet = kwargs.get("quiet", False)
        with stdout_for_json(kwargs.get("json", False)), _announced_torch(quiet), _noticed_exit():
            return guarded(*args, **kwargs)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            _refuse_unprintable_out(kwargs.get("out"))
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
                typer.echo(f"error: {one_line(redacted(_message(error)))}", err=True)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None

    return wrapped


def _message(error: Exception) -> str:
    """The text of an error with a remedy."""
    if isinstance(error, UnigrpoError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}; {PLACE_REMEDIES.get(error.errno or 0, 'choose another place')}"
    if "No space left on device" in str(error) or "File too large" in str(error):  # safetensors' own errors
        return f"{error}; {PLACE_REMEDIES[errno.ENOSPC]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return f"out of memory ({error}); reduce sampling.batch_size, train.micro_batch_size or the image size"
    return f"{type(error).__name__}: {error} (`unigrpo --debug ...` shows where)"


def _refuse_unprintable_out(out: Path | None) -> None:
    """A run writes its own path into its files, which are UTF-8."""
    try:
        str(out).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"--out {out}: the name is not UTF-8; choose another --out") from error


class _TorchNotice:
    """An import hook that finds nothing: it prints a line when torch is imported, which takes seconds."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            sys.meta_path.remove(self)
            print("loading torch ...", file=sys.stderr, flush=True)


@contextmanager
def _announced_torch(quiet: bool) -> Iterator[None]:
    notice = _TorchNotice()
    if not quiet and "torch" not in sys.modules and (os.environ.get("RANK") or "0") == "0":
        sys.meta_path.insert(0, notice)
    try:
        yield
    finally:
        if notice in sys.meta_path:
            sys.meta_path.remove(notice)


def resolve_config(
    context: typer.Context, settings: Mapping[str, str] | None = None, *, file: Path | None = None
) -> Config:
    """The configuration that the options of a command give.

    Args:
        context: the command's context, with the value of every option.
        settings: options of this command and the settings they give, besides SETTINGS.
        file: a run's own config.toml, in place of --config.
    """
    from unigrpo_cli.config import load_config
    from unigrpo_cli.run.setup import model_defaults

    given = options(context)
    named = {key: given[option] for option, key in {**SETTINGS, **(settings or {})}.items() if option in given}
    named = {key: value for key, value in named.items() if value not in ((), [])}  # lists that were not given
    if given.get("reward_opt"):
        named["reward.options"] = reward_options(given["reward_opt"])
    config = load_config(
        preset=given["preset"],
        file=file or given["config"],
        overrides=given["overrides"],
        named=named,
        model_defaults=model_defaults,
        whole=file is not None,
    )
    PROGRAMS.find(config.sampling.program)
    return config


def reward_options(texts: list[str] | None) -> dict[str, Any]:
    """Values of `--reward-opt` by `alias.key`."""
    from unigrpo_cli.rewards.spec import scalar

    options = {}
    for text in texts or ():
        key, found, value = text.partition("=")
        if not found:
            raise UsageError(f"--reward-opt {text}: write it as ALIAS.KEY=VALUE")
        options[key] = scalar(value)
    return options


def load_plugins(plugin: list[str] | None, directory: Path | None, display: Display) -> Plugins:
    """All plugins of this command; problems of installed ones are warnings."""
    from unigrpo_cli.rewards.registry import Plugins

    plugins = Plugins()
    plugins.load(plugin, directory)
    for problem in plugins.rewards.problems:
        display.warn(problem)
    return plugins


def rewards_alone(
    choices: Sequence[RewardSpec], plugins: Plugins, device: str, timeout_s: float | None = None
) -> Scorer:
    """Rewards without a run: no model is imported, and every reward may abstain."""
    import torch

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
    """With --json, send everything but the JSON object to stderr."""
    if not wanted:
        yield
        return
    with stdout_to_stderr() as stream:
        _json_stream.append(stream)
        try:
            yield
        finally:
            _json_stream.pop()


@contextmanager
def _noticed_exit() -> Iterator[None]:
    """Report `os._exit(0)` by a plugin or library: without this the command would seem to have succeeded."""
    leave, process = os._exit, os.getpid()

    def noticed(status: int) -> NoReturn:
        if status == 0 and os.getpid() == process:  # a forked child may end this way
            text = "error: a reward, plugin or library ended the process with os._exit(0); the command is not done"
            os.write(2, f"{text}: remove that call\n".encode())
            status = RewardError.exit_code
        leave(status)

    os._exit = noticed
    try:
        yield
    finally:
        os._exit = leave


def print_json(content: Any) -> None:
    from unigrpo_cli.io.json import to_json

    stream = _json_stream[-1]
    stream.write(to_json(content) + "\n")
    stream.flush()


def plugin_commands(app: typer.Typer) -> list[str]:
    """Add commands of installed plugins; returns problems, which must not stop `--help`."""
    from unigrpo_cli.rewards.registry import PLUGIN_GROUP

    if all(distribution(point)[0] == OURS for point in installed(PLUGIN_GROUP)):  # ours add none
        return []
    from unigrpo_cli.rewards.registry import Plugins

    plugins, problems = Plugins(), []
    with stdout_to_stderr():
        plugins.load_installed()  # commands that need them report what is wrong
        commands, groups = list(app.registered_commands), list(app.registered_groups)
        try:
            plugins.call("unigrpo_register_commands", app=app)
        except UnigrpoError as error:
            problems.append(f"a command cannot be added: {error}")
    ours = {c.name for c in commands} | {g.name for g in groups}
    for added in [c for c in app.registered_commands if c not in commands and c.name in ours]:
        problems.append(f"a plugin's command {added.name!r} is ignored: the name is taken")
        app.registered_commands.remove(added)
    for group in [g for g in app.registered_groups if g not in groups and g.name in ours]:
        problems.append(f"a plugin's command {group.name!r} is ignored: the name is taken")
        app.registered_groups.remove(group)
    return problems
