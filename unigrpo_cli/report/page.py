"""One HTML file with everything inside: style, programs, data, pictures. A browser fetches nothing for it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from unigrpo_cli.io.atomic import new_file

SCRIPTS = ("core.js", "charts.js", "level_runs.js", "level_step.js", "level_episode.js", "level_formula.js", "main.js")
CHARTS = ("bokeh.min.js", "bokeh-api.min.js")
SERVED = '<script type="application/json" id="data-served">1</script>'


@cache
def _asset(name: str) -> str:
    return (files("unigrpo_cli") / "report" / "page" / name).read_text("utf-8")


@cache
def _charts() -> tuple[str, ...]:
    """The programs that draw curves, from the bokeh package."""
    folder = files("bokeh") / "server" / "static" / "js"
    return tuple(_in_script((folder / name).read_text("utf-8")) for name in CHARTS)


def _in_script(program: str) -> str:
    """A program that does not end its own element."""
    return program.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def block(name: str, content: Any) -> str:
    """Data as an element that is not run. No `<` is left in it, so no text can end it or begin another."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def document(title: str, data: Sequence[str], *, served: bool = False) -> Iterator[str]:
    """The page in parts. `data` are the elements of `block`; a served page asks its server instead."""
    scripts = [_in_script(_asset(name)) for name in SCRIPTS]
    later = [f'<script type="text/plain" data-later>{program}</script>' for program in _charts()]
    before, rest = _asset("page.html").split("{{data}}")
    filled = before.replace("{{policy}}", _policy((*scripts, *_charts()), served)).replace(
        "{{title}}", html.escape(title)
    )
    yield filled.replace("{{style}}", _asset("page.css"))
    yield SERVED if served else ""
    yield from data
    yield rest.replace("{{scripts}}", "\n".join([*later, *(f"<script>{program}</script>" for program in scripts)]))


def _policy(scripts: Sequence[str], served: bool) -> str:
    """What the page may do: run these very programs, show pictures that it holds; reach no network."""
    digests = (base64.b64encode(hashlib.sha256(program.encode()).digest()).decode() for program in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    connect = "connect-src 'self'; " if served else ""
    return (
        f"default-src 'none'; {connect}script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def write(path: Path, parts: Iterator[str]) -> int:
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for part in parts:
            file.write(part)
    return path.stat().st_size
