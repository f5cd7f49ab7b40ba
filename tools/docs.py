"""Write the generated parts of the documentation: `python -m tools.docs`. A test compares them.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import inspect
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import typer
from rich.console import Console

from unigrpo_cli.config import config_keys, load_config
from unigrpo_cli.errors import TooLargeError
from unigrpo_cli.rewards.hooks import Hooks
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.run.doctor.checks import CHECKS, REPORT
from unigrpo_cli.run.monitor.rules import RULES

ROOT = Path(__file__).parents[1]
_PART = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def configuration() -> str:
    """One table row per configuration key."""
    lines = ["| key | default | what |", "|---|---|---|"]
    for key, (what, default) in config_keys().items():
        shown = {None: "none", "": '""'}.get(default, default) if not isinstance(default, dict) else "{}"
        if isinstance(shown, tuple):
            shown = list(shown)
        lines.append(f"| `{key}` | `{shown}` | {what} |".replace("[[", "[").replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def hooks() -> str:
    """Every hook with its exact signature and what it is for."""
    blocks = []
    for name, function in vars(Hooks).items():
        if name.startswith("unigrpo_"):
            signature = inspect.signature(function)
            names = ", ".join(p for p in signature.parameters if p != "self")
            blocks.append(f"### `{name}({names})`\n\n{inspect.getdoc(function)}\n")
    return "\n".join(blocks)


def rewards() -> str:
    plugins = Plugins()
    plugins.load()
    blocks = []
    for entry in sorted(plugins.rewards.entries, key=lambda e: e.name):
        if entry.origin != "unigrpo-cli":
            continue
        factory = entry.factory()
        low, high = factory.range
        limits = f"Range {low:g} to {high:g}." if low > -math.inf else "Range not declared."
        needs = ", ".join(sorted(factory.needs)) or "nothing"
        block = [
            f"### `{entry.name}`",
            "",
            f"{inspect.getdoc(factory)}",
            "",
            f"{limits} Needs {needs}. Licence: {factory.licence}.",
            "",
        ]
        for key, field in factory.Options.model_fields.items():
            block.append(f"* `@{key}` (default `{field.default}`): {field.description}")
        blocks.append("\n".join(block).rstrip() + "\n")
    return "\n".join(blocks)


def monitor() -> str:
    """Every rule of the monitor with its condition, its usual cause and its remedy."""
    lines = ["| rule | condition | usual cause | remedy |", "|---|---|---|---|"]
    for rule in RULES:
        n, m = rule.persistence
        often = "" if m == 1 else f", in {n} of {m} steps"
        lines.append(f"| `{rule.name}` | {rule.when}{often} | {rule.cause} | {rule.remedy} |")
    return "\n".join(lines) + "\n"


def doctor() -> str:
    """Every check of the doctor: what must hold, what a fault means, and its remedy."""
    lines = ["| check | what must hold | a fault means | remedy |", "|---|---|---|---|"]
    for check in CHECKS:
        holds = " ".join((inspect.getdoc(check.run) or "").split())
        lines.append(
            f"| `{check.name}` | {holds} | {check.means} | {'report' if check.remedy == REPORT else check.remedy} |"
        )
    return "\n".join(lines) + "\n"


def commands() -> str:
    from unigrpo_cli.cli import app

    blocks = []
    root = typer.main.get_command(app)
    for name, command in _leaves(root, "unigrpo"):
        text = inspect.getdoc(command.callback) or ""
        lines = [f"### `{name}`", "", text, ""]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            kind = getattr(parameter, "help", "") or ""
            label = " / ".join(parameter.opts) if parameter.param_type_name == "option" else parameter.name
            lines.append(f"* `{label}`: {kind}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def dry_run(recipe: str) -> str:
    """What `unigrpo train --dry-run` says of a recipe in examples/, where the release is not on the machine."""
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.memory.plan import plan_of, refuse_too_large
    from unigrpo_cli.run.memory.report import show, verdict

    config = load_config(file=ROOT / "examples" / recipe / "config.toml")
    plan = replace(plan_of(config, config.model, None, elsewhere=True), published=True)
    display, said = Display(), io.StringIO()
    display.console = Console(file=said, highlight=False)
    show(plan, display)
    said.write(f"{verdict(plan)}\n")
    try:
        refuse_too_large(plan)
    except TooLargeError as error:
        said.write(f"error: {error}\n")
    return f"```\n{said.getvalue()}```\n"


def _leaves(command, name: str):
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for key, sub in inner.items():
        yield from _leaves(sub, f"{name} {key}")


PARTS: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "hooks": hooks,
    "rewards": rewards,
    "commands": commands,
    "doctor": doctor,
    "monitor": monitor,
    "dry_run_bagel_one_gpu": partial(dry_run, "bagel_one_gpu"),
    "dry_run_bagel_24gb": partial(dry_run, "bagel_24gb"),
    "dry_run_bagel_unigrpo": partial(dry_run, "bagel_unigrpo"),
    "dry_run_bagel_reflect": partial(dry_run, "bagel_reflect"),
    "dry_run_zimage_one_gpu": partial(dry_run, "zimage_one_gpu"),
    "dry_run_klein_one_gpu": partial(dry_run, "klein_one_gpu"),
}


def regenerated(text: str) -> str:
    """A document with its generated parts written again."""
    return _PART.sub(lambda m: m[1] + PARTS[m[2]]() + m[4], text)


def documents() -> list[Path]:
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    return [path for path in sorted(found) if _PART.search(path.read_text())]


def main() -> None:
    for path in documents():
        path.write_text(regenerated(path.read_text()))
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
