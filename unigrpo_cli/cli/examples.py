"""`unigrpo examples`."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UsageError, suggest


@one_error_line
def examples(
    name: Annotated[str | None, typer.Argument(help="Example to copy; without one, list them.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Directory to copy to; default the example's name.")] = None,
    json: common.Json = False,
) -> None:
    """List the examples that come with the package, or copy one."""
    from unigrpo_cli.run.console import Display

    display = Display(json=json)
    found = {path.name: path for path in sorted(_directory().iterdir()) if (path / "README.md").is_file()}
    if name is None:
        rows = [{"name": key, "summary": _summary(path)} for key, path in found.items()]
        if json:
            common.print_json({"examples": rows})
            return
        for row in rows:
            display.say(f"{row['name']:26} {row['summary']}")
        display.say("copy one with `unigrpo examples NAME`")
        return
    if name not in found:
        raise UsageError(f"no example {name!r}: {suggest(name, found)}")
    target = out or Path(name)
    if target.exists():
        raise UsageError(f"{target} exists: choose another --out")
    shutil.copytree(found[name], target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".pytest_cache"))
    display.say(f"{target / 'README.md'} says how to run it")
    if json:
        common.print_json({"example": name, "directory": str(target)})


def _directory() -> Path:
    """The examples of the installed package, or of a checkout."""
    spec = find_spec("unigrpo_examples")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[2] / "examples"


def _summary(example: Path) -> str:
    """The heading of its page."""
    return (example / "README.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
