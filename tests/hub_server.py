"""A stand-in of the hub's HTTP: repositories are made, files uploaded and committed, as huggingface_hub asks for it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """Repositories by id: files by path, and whether they are private."""

    url: str = ""
    token: str = "hf_standin"
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub at a free port of this machine."""
    state = Hub()

    class Requests(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {state.token}":
                self._answer(401, {"error": "Invalid username or password."})
            elif self.path == "/api/repos/create":
                given = json.loads(body)
                repo = "/".join(filter(None, (given.get("organization"), given["name"])))
                state.private[repo] = bool(given.get("private")) or given.get("visibility") == "private"
                state.files.setdefault(repo, {})
                self._answer(200, {"url": f"{state.url}/{repo}"})
            elif self.path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [
                    {"path": p, "uploadMode": "lfs" if p.endswith(".safetensors") else "regular", "shouldIgnore": False}
                    for p in files
                ]
                self._answer(200, {"files": modes})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**o, "actions": {"upload": {"href": f"{state.url}/store/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                self._answer(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                repo = self.path.split("/api/models/")[1].split("/commit/")[0]
                for line in body.decode().splitlines():
                    row = json.loads(line)
                    value = row["value"]
                    if row["key"] == "file":
                        state.files[repo][value["path"]] = base64.b64decode(value["content"])
                    elif row["key"] == "lfsFile":
                        state.files[repo][value["path"]] = state.stored[value["oid"]]
                self._answer(200, {"commitUrl": f"{state.url}/{repo}/commit/1", "commitOid": "1", "success": True})
            else:
                self._answer(404, {"error": self.path})

        def do_PUT(self) -> None:
            state.stored[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, {})

        def do_GET(self) -> None:
            self._answer(404, {"error": self.path})

        def _answer(self, code: int, content: dict) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *given: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
