"""The page over HTTP, for this machine alone: it follows runs that still train, and shows every traced step."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from unigrpo_cli.errors import UnigrpoError, UsageError, one_line
from unigrpo_cli.report.content import runs_content
from unigrpo_cli.report.page import document
from unigrpo_cli.report.runs import read_runs, run_directories
from unigrpo_cli.report.steps import step_content
from unigrpo_cli.report.traced import load_step, traced_steps

HOST = "127.0.0.1"
WATCHED = ("config.toml", "metrics.jsonl", "eval_before.json", "eval_after.json", "summary.json", "eval.json", "traces")


class ReportServer(ThreadingHTTPServer):
    """Serves the report of directories, read again when their files change."""

    daemon_threads = True

    def __init__(self, paths: Sequence[Path], port: int = 0):
        self.paths = list(paths)
        self.reading = threading.Lock()
        self.runs = read_runs(self.paths)
        self.known: tuple[Any, str] | None = None
        try:
            super().__init__((HOST, port), _Exchange)
        except OSError as error:
            raise UsageError(f"cannot serve at {HOST}:{port}: {error.strerror}; give another --port") from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self) -> str:
        return "".join(document("unigrpo", [], served=True))

    def runs_json(self) -> str:
        """All runs; read again only when there are others, or a file of one is another than before."""
        with self.reading:
            state = self._state()
            if self.known is None or self.known[0] != state:
                self.runs = read_runs(self.paths)
                content = runs_content(self.runs, [traced_steps(run) for run in self.runs], [])
                content["footer"] = "Served from this machine; the page follows runs that still train."
                self.known = state, json.dumps(content, allow_nan=False)
            return self.known[1]

    def step_json(self, query: dict[str, list[str]]) -> str | None:
        """A traced step of a run by its name; None when there is none of that number."""
        try:
            name, step = query["run"][0], int(query["step"][0])
        except (KeyError, ValueError):
            return None
        run = next((own for own in self.runs if own.name == name), None)
        if run is None or step not in traced_steps(run):
            return None
        return json.dumps(step_content(load_step(run, step)), allow_nan=False)

    def _state(self) -> list[Any]:
        return [(directory, _files(directory)) for directory in run_directories(self.paths)]

    def stop(self) -> None:
        """End `serve_forever` soon, from any thread or signal."""
        threading.Thread(target=self.shutdown, daemon=True).start()


def _files(directory: Path) -> list[tuple[int, int] | None]:
    """Times and sizes of the files that a report reads."""
    found: list[tuple[int, int] | None] = []
    for name in WATCHED:
        try:
            status = (directory / name).stat()
            found.append((status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return found


class _Exchange(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):  # another site's name for us
            self.send_error(403)
            return
        address = urlsplit(self.path)
        try:
            body = {
                "/": self.server.page,
                "/runs.json": self.server.runs_json,
                "/step.json": lambda: self.server.step_json(parse_qs(address.query)),
            }.get(address.path, lambda: None)()
        except UnigrpoError as error:
            self._answer(500, "text/plain", one_line(str(error)))
            return
        if body is None:
            self.send_error(404)
            return
        self._answer(200, "text/html" if address.path == "/" else "application/json", body)

    def _answer(self, status: int, kind: str, body: str) -> None:
        content = body.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the page asks every few seconds."""
