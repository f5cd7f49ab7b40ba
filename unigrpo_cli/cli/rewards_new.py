"""`unigrpo rewards new`."""

from __future__ import annotations

import keyword
import os
import re
import shlex
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UsageError, suggest

FILES = {
    "function": {"$name.py": "function.py.tmpl", "test_$name.py": "test.py.tmpl"},
    "class": {"$name.py": "class.py.tmpl", "test_$name.py": "test.py.tmpl"},
    "segments": {"$name.py": "segments.py.tmpl", "test_$name.py": "test.py.tmpl"},
    "vlm": {"$name.py": "vlm.py.tmpl", "test_$name.py": "vlm_test.py.tmpl"},
    "package": {
        "$distribution/pyproject.toml": "package_pyproject.toml.tmpl",
        "$distribution/README.md": "package_README.md.tmpl",
        "$distribution/$module/__init__.py": "package.py.tmpl",
        "$distribution/tests/test_$name.py": "package_test.py.tmpl",
    },
}


@one_error_line
def new(
    name: Annotated[str, typer.Argument(help="Name of the reward, a Python identifier.")],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="function, class, segments (scores every text by itself), vlm (a judge with your own question), or "
            "package (to install and publish).",
        ),
    ] = "function",
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("."),
) -> None:
    """Write a new reward and its test: a working example, in a file or as an installable package."""
    if kind not in FILES:
        raise UsageError(f"--kind {kind}: {suggest(kind, FILES)}")
    _check_name(name)
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UsageError(f"--out {out} is a file; give a folder")
    words = {
        "name": name,
        "file": f"{name}.py",
        "module": f"unigrpo_reward_{name}",
        "distribution": f"unigrpo-reward-{name.replace('_', '-')}",
    }
    made = {out / Template(path).substitute(words): template for path, template in FILES[kind].items()}
    for path in made:
        if os.path.lexists(path):
            raise UsageError(f"{path} exists already; choose another name or --out")
    for path, template in made.items():
        text = (files("unigrpo_cli") / "cli" / "templates" / template).read_text()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {path.parent}: {error.strerror}; choose another --out") from error
        path.write_text(Template(text).substitute(words))
    first = next(iter(made))
    if kind == "package":
        folder = shlex.quote(str(first.parent))
        typer.echo(f"wrote {first.parent}; try: pip install -e {folder} && unigrpo rewards test {name}")
    elif kind == "vlm":
        tests = out / f"test_{name}.py"
        typer.echo(f"wrote {first} and its test; try: pytest {shlex.quote(str(tests))}")
    else:
        typer.echo(f"wrote {first} and its test; try: unigrpo rewards test {name} --plugin {shlex.quote(str(first))}")


def _check_name(name: str) -> None:
    """Refuse names that are not identifiers, or taken."""
    from unigrpo_cli.rewards.registry import Plugins

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(f"{name!r} cannot be the name of a reward: use lower-case letters, digits and _")
    if len(name) > 64:
        raise UsageError(f"{name!r} cannot be the name of a reward: use at most 64 letters")
    plugins = Plugins()
    plugins.load_installed()
    if any(entry.name == name for entry in plugins.rewards.entries):
        raise UsageError(f"there is a reward {name!r} already; choose another name")
