"""`unigrpo models`: the families of models that are installed."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UsageError, suggest

app = typer.Typer(help="Families of models that can be trained.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
@one_error_line
def list_(plugin: common.PluginOption = None, plugins_dir: common.PluginsDir = None, json: common.Json = False) -> None:
    """List the families that are installed."""
    from unigrpo_cli.run.console import Display

    display = Display(json=json)
    rows = [_row(family) for family in _families(plugin, plugins_dir, display)]
    if json:
        common.print_json({"families": rows})
        return
    for row in rows:
        display.say(f"{row['name']:12} {row['summary']}")


@app.command()
@one_error_line
def info(
    name: Annotated[str, typer.Argument(metavar="FAMILY", help="Name of a family, as `models list` prints it.")],
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
) -> None:
    """Show what a family needs of a model directory, its usual settings, and its options."""
    from unigrpo_cli.run.console import Display

    display = Display(json=json)
    found = {family.name: family for family in _families(plugin, plugins_dir, display)}
    if name not in found:
        raise UsageError(f"no family of models {name!r}: {suggest(name, found)}; a model's directory: unigrpo inspect")
    family = found[name]
    kind = getattr(family, "Options", None)
    options = {} if kind is None else {key: field.description or "" for key, field in kind.model_fields.items()}
    facts = _row(family) | {"defaults": family.defaults(None), "options": options}
    if json:
        common.print_json(facts)
        return
    display.say(f"{name}: {facts['summary']}", style="bold")
    display.say(f"defined in {facts['defined']}; files fetched of a model on the hub: {' '.join(family.hub_files)}")
    for key, value in family.defaults(None).items():
        display.say(f"  usual {key}: {value}")
    for key, what in options.items():
        display.say(f"  model_options.{key}: {what}")


def _families(plugin: list[str] | None, directory: Any, display: Any) -> list[Any]:
    from unigrpo_cli.models.family import MODELS

    common.load_plugins(plugin, directory, display)
    found = MODELS.families()
    for problem in MODELS.broken.values():
        display.warn(problem)
    return found


def _row(family: Any) -> dict[str, Any]:
    kind = type(family)
    summary = (inspect.getdoc(kind) or "").partition("\n")[0]
    return {"name": family.name, "summary": summary, "defined": f"{kind.__module__}.{kind.__qualname__}"}
