"""`unigrpo export` and `unigrpo push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UsageError

Base = Annotated[
    str | None, typer.Option("--base", help="Hub id of the base model, where the run started from a copy of it.")
]


@one_error_line
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run (its newest checkpoint) or a checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; new or empty.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write whole weights in the release's names: the adapter added to its base.")
    ] = False,
    base: Base = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Write a trained model for others: adapter or weights and a model card, without optimizer and state.

    Merged weights are in fp32 where the adapter changed them. Writes to --out: the model's files, README.md with
    settings, rewards, curve and held-out scores, and pictures.
    """
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.export import export as write

    display = Display(json=json, quiet=quiet)
    common.load_plugins(plugin, plugins_dir, display)
    found = write(run, out, merge, base, _draw, display.warn)
    display.say(f"{found.kind} of step {found.step} written to {found.directory}: {', '.join(found.files)}")
    if json:
        common.print_json(asdict(found))


@one_error_line
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An exported directory, a run or a checkpoint.")],
    repo: Annotated[str, typer.Option("--repo", help="Repository on the hub, ORG/NAME; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base: Base = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Upload a trained model to the hub; a run or a checkpoint is exported first.

    Needs `hf auth login`, or HF_TOKEN; HF_ENDPOINT chooses another hub.
    """
    from unigrpo_cli.io.atomic import files_in
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.export import export as write
    from unigrpo_cli.run.export import exported, is_run
    from unigrpo_cli.run.export import push as upload

    display = Display(json=json, quiet=quiet)
    with TemporaryDirectory(prefix="unigrpo-push-") as temporary:
        if is_run(directory):
            place = Path(temporary) / "model"
            write(directory, place, False, base, _draw, display.warn)
            files = files_in(place)
        else:
            place, files = directory, exported(directory)
            if base is not None:
                raise UsageError(f"--base {base}: {directory} names its base; give --base to `unigrpo export`")
        url = upload(place, repo, private)
    display.say(f"pushed {', '.join(files)} to {url}")
    if json:
        common.print_json({"repo": repo, "url": url, "files": files})


def _draw(run: Path, path: Path, step: int) -> None:
    """The curves of a run up to a step as a picture."""
    from unigrpo_cli.report.curves import save_curves
    from unigrpo_cli.report.runs import read_runs

    save_curves([own.until(step) for own in read_runs([run])], path)
