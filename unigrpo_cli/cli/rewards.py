"""`unigrpo rewards`: list, info, test. score, calibrate, serve and new have their own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from unigrpo_cli.cli import common, rewards_new, rewards_score, rewards_serve
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import RewardError

if TYPE_CHECKING:
    from unigrpo_cli.rewards.registry import RewardEntry

app = typer.Typer(help="List, test, serve and write rewards.", no_args_is_help=True)


@app.command("list")
@one_error_line
def list_rewards(
    plugin: common.PluginOption = None, plugins_dir: common.PluginsDir = None, json: common.Json = False
) -> None:
    """List all known rewards and where they come from."""
    from unigrpo_cli.run.console import Display

    display = Display(json=json)
    plugins = common.load_plugins(plugin, plugins_dir, display)
    rows = [_facts(entry) for entry in sorted(plugins.rewards.entries, key=lambda e: e.address)]
    if json:
        common.print_json({"rewards": rows})
        return
    cells = []
    for row in rows:
        scale = "" if row["range"] is None else f"{row['range'][0]:g} to {row['range'][1]:g}"
        what = row["summary"] if row["state"] == "ok" else row["state"]
        cells.append((row["name"], scale, f"{row['origin']} {row['version']}".removesuffix(" -"), what))
    display.table("rewards", ("reward", "range", "from", "what it measures"), cells, set())


def _facts(entry: RewardEntry) -> dict[str, Any]:
    """What a reward declares; for a broken one, the error."""
    row: dict[str, Any] = {
        "name": entry.name,
        "origin": entry.origin,
        "version": entry.version,
        "state": "ok",
        "range": None,
        "needs": [],
        "summary": "",
    }
    try:
        factory = entry.factory()
    except RewardError as error:
        return row | {"state": f"broken: {error}"}
    limits = list(getattr(factory, "range", ()))
    finite = bool(limits) and all(abs(x) != float("inf") for x in limits)
    return row | {
        "range": limits if finite else None,
        "needs": sorted(getattr(factory, "needs", ())),
        "summary": getattr(factory, "summary", ""),
    }


@app.command("info")
@one_error_line
def info(
    name: Annotated[str, typer.Argument(help="A reward, or origin/name.")],
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
) -> None:
    """Show a reward's options, needs and licence."""
    from unigrpo_cli.rewards.function import Options
    from unigrpo_cli.run.console import Display

    display = Display(json=json)
    plugins = common.load_plugins(plugin, plugins_dir, display)
    entry = plugins.rewards.find(name)
    factory = entry.factory()
    accepted = getattr(factory, "Options", Options).model_fields
    options = [
        {"option": key, "default": field.default, "what": field.description or ""} for key, field in accepted.items()
    ]
    facts = _facts(entry) | {
        "doc": (factory.__doc__ or "").strip(),
        "licence": getattr(factory, "licence", "not declared"),
        "options": options,
    }
    if json:
        common.print_json(facts)
        return
    display.say(f"{entry.address} {entry.version}", style="bold")
    display.say(facts["doc"] or facts["summary"])
    display.say(f"range {facts['range'] or 'not declared'}; needs {', '.join(facts['needs']) or 'nothing'}")
    display.say(f"licence: {facts['licence']}")
    for row in options:
        display.say(f"  @{row['option']}={row['default']}  {row['what']}")


@app.command("test")
@one_error_line
def test(
    name: Annotated[str, typer.Argument(help="Rewards as in --reward, options included.")],
    max_ms: Annotated[
        float | None, typer.Option("--max-ms", min=0, help="Limit of the time per sample, in milliseconds.")
    ] = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
) -> None:
    """Check the contract of rewards, on eight samples of the shapes world. Exit code 3 when a check fails."""
    from unigrpo_cli.rewards.conformance import check_reward
    from unigrpo_cli.run.console import Display

    display = Display(json=json)
    plugins = common.load_plugins(plugin, plugins_dir, display)
    names = [part.strip() for part in name.split(",")]
    found = {}
    for one in names:
        found[one] = check_reward(one, plugins=plugins, max_seconds=None if max_ms is None else max_ms / 1000)
        for check in found[one]:
            head = f"{one}: " if len(names) > 1 else ""
            display.say(f"{'ok  ' if check.ok else 'FAIL'} {head}{check.name}: {check.seen}")
    if json:
        rows = [{"reward": one} | vars(check) for one, checks in found.items() for check in checks]
        common.print_json({"reward": name, "checks": rows})
    if not all(check.ok for checks in found.values() for check in checks):
        raise typer.Exit(RewardError.exit_code)


app.command("score")(rewards_score.score)
app.command("calibrate")(rewards_score.calibrate)
app.command("serve")(rewards_serve.serve)
app.command("new")(rewards_new.new)
