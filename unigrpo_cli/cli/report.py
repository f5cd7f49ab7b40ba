"""`unigrpo report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UsageError

if TYPE_CHECKING:
    from unigrpo_cli.report.runs import ReportRun
    from unigrpo_cli.run.console import Display

VIEWERS = ("unipo",)


@one_error_line
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of train, rollout or eval, or one that holds them."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page, report.html by default; curves.png is written beside it."),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page to this machine instead; it follows runs that still train.")
    ] = False,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="With --serve; a free one by default.")
    ] = None,
    export: Annotated[
        tuple[str, Path] | None,
        typer.Option("--export", metavar="VIEWER DIR", help="Write the text of one run for another viewer: unipo."),
    ] = None,
    json: common.Json = False,
) -> None:
    """Show runs: curves, and what the traced steps did to every token and denoising step.

    Writes one HTML file that opens from disk and fetches nothing. Several runs are overlaid; seeds of one setting
    become their mean and a band. Traces come from train.trace_every. --serve runs until Ctrl-C.
    """
    from unigrpo_cli.run.console import Display

    display = Display(json=json)
    if serve:
        if given := [name for name, value in (("--out", out), ("--export", export)) if value is not None]:
            raise UsageError(f"{given[0]} writes files and --serve writes none: give one of them")
        _serve(runs, port or 0, display, json)
        return
    if port is not None:
        raise UsageError(f"--port {port} is for a served page: add --serve")
    from unigrpo_cli.report.runs import read_runs

    found = read_runs(runs)
    if export is not None:
        if out is not None:
            raise UsageError(f"--out {out} is for the page: --export writes into its own directory; give one of them")
        _export(found, *export, display, json)
        return
    from unigrpo_cli.report.build import write_report
    from unigrpo_cli.report.curves import save_curves

    out = out or Path("report.html")
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory: give a file, e.g. --out {out / 'report.html'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = write_report(found, out)
    picture = out.with_name("curves.png")
    drawn = save_curves(found, picture)
    for note in written.notes:
        display.say(note)
    display.say(f"{out}  {written.size / 2**20:.1f} MiB, open it in a browser" + (f"\n{picture}" if drawn else ""))
    if json:
        curves = str(picture) if drawn else None
        common.print_json({"report": str(out), "bytes": written.size, "curves": curves, "notes": list(written.notes)})


def _serve(runs: list[Path], port: int, display: Display, json: bool) -> None:
    from unigrpo_cli.cli.rewards_serve import until_stopped
    from unigrpo_cli.report.serve import ReportServer

    server = ReportServer(runs, port)
    with server, until_stopped(server.stop):
        display.say(f"serving {', '.join(run.name for run in server.runs)} at {server.url}")
        if json:
            common.print_json({"url": server.url})
        server.serve_forever(poll_interval=0.2)


def _export(runs: list[ReportRun], viewer: str, directory: Path, display: Display, json: bool) -> None:
    from unigrpo_cli.errors import suggest
    from unigrpo_cli.report.unipo import export_run

    if viewer not in VIEWERS:
        raise UsageError(f"--export {viewer}: {suggest(viewer, VIEWERS)}")
    if len(runs) != 1:
        raise UsageError(f"--export {viewer} takes one run, not {len(runs)}: export each into a directory of its own")
    written = export_run(runs[0], directory)
    if written.left_out:
        display.say(f"{written.left_out} steps are left out: a reward abstained, and UNIPO requires one")
    display.say(f"{written.path}  for UNIPO's data/ folder")
    if json:
        common.print_json({"export": str(written.path), "left_out": written.left_out})
