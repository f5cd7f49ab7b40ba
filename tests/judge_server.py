"""A judge behind OpenAI's chat completions that sees the shapes world, and injects the faults of real servers."""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from unigrpo_plugins.detector_shapes import ShapesDetector
from unigrpo_plugins.judge_modes import Form, Rating, Rubric, YesNoOdds, YesNoWord
from unigrpo_plugins.judge_shapes import answer, look

MODEL = "shapes-judge"
FAULTS = ("429", "500", "503", "reset", "malformed", "half", "hang")


@dataclass(frozen=True)
class Faults:
    """At `rate` one of `kinds`, drawn from `seed`; features to refuse with status 400.

    A hang lasts `hang_s` and then drops the connection.
    """

    kinds: tuple[str, ...] = ()
    rate: float = 0.0
    seed: int = 0
    hang_s: float = 30.0
    without: frozenset[str] = frozenset()


class BadRequestError(Exception):
    """A request that this server refuses."""


class JudgeServer(ThreadingHTTPServer):
    """Runs in its own threads between `start` and `stop`."""

    request_queue_size = 256  # the default of 5 resets connections when a thread pool arrives at once
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0, faults: Faults = Faults()):
        super().__init__(("127.0.0.1", port), Conversation)
        self.detector = ShapesDetector()
        self.faults = faults
        self.says: str | None = None  # the text of every answer, in place of the true one
        self.injected: Counter[str] = Counter()
        self.served = 0
        self.stopping = threading.Event()
        self._draw = random.Random(faults.seed)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def start(self) -> JudgeServer:
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True, name="stand-in judge").start()
        return self

    def stop(self) -> None:
        """End at once, with all open connections."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):  # it may have ended by itself
                    connection.shutdown(socket.SHUT_RDWR)

    def next_fault(self) -> str | None:
        with self._lock:
            f = self.faults
            self.served += 1
            if not f.kinds or self._draw.random() >= f.rate:
                return None
            kind = self._draw.choice(f.kinds)
            self.injected[kind] += 1
            return kind

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may close its connection at any time."""


class Conversation(BaseHTTPRequestHandler):
    """One connection: requests and answers in JSON, in the form of OpenAI's chat completions."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body would wait for an acknowledgement of the headers
    timeout = 120
    server: JudgeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self._error(404, f"nothing at {self.path}")
        self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "unigrpo"}]})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            return self._error(404, f"nothing at {self.path}")
        fault = self.server.next_fault()
        if fault in ("429", "500", "503"):
            return self._error(int(fault), "injected")
        if fault == "hang":
            self.server.stopping.wait(self.server.faults.hang_s)
        if fault in ("hang", "reset"):
            return self._reset()
        try:
            answer = complete(data, self.server)
        except BadRequestError as error:
            return self._error(400, str(error))
        except Exception as error:  # a dropped connection would look like a fault of the network
            return self._error(500, f"{type(error).__name__}: {error}")
        self._send(200, answer, fault)

    def _error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "error", "code": status}})

    def _send(self, status: int, row: Mapping[str, Any], fault: str | None = None) -> None:
        body = json.dumps(row).encode()
        if fault == "malformed":
            body = body.replace(b":", b";")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "half":
            self.close_connection = True
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def _reset(self) -> None:
        """Closing with nothing lingering makes the kernel send RST instead of an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


# ----- the judge


def complete(data: bytes, server: JudgeServer) -> dict[str, Any]:
    """The answer to the body of one chat completion.

    Raises:
        BadRequestError: when it is malformed, or asks for a feature that this server lacks.
    """
    try:
        body = json.loads(data)
        parts = [part for m in body["messages"] for part in _parts(m["content"])]
        top = int(body.get("top_logprobs") or 0)
        text = "\n".join(p["text"] for p in parts if p.get("type") == "text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadRequestError("no chat completion") from None
    for feature in sorted(server.faults.without):
        if body.get(feature):
            raise BadRequestError(f"{feature} is not supported")
    if body.get("model") != MODEL:
        raise BadRequestError(f"there is one model here, {MODEL}")
    image = _picture(parts)
    match = re.search(r"^<((?:request|question)[-\d]*)>\n(.*?)\n</\1>$", text, re.MULTILINE | re.DOTALL)
    given = answer(look(image, match[2] if match else "", server.detector), _form_of(body, text))
    content = server.says if server.says is not None else given.text
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": content}}
    choice |= {"finish_reason": "stop", "logprobs": None}
    if body.get("logprobs"):
        listed = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in given.first]
        choice["logprobs"] = {"content": [listed[0] | {"top_logprobs": listed[:top]}]}
    usage = {"prompt_tokens": len(text.split()) + 16, "completion_tokens": len(content.split())}
    return {"id": "chatcmpl-0", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}


def _form_of(body: Mapping[str, Any], text: str) -> Form:
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        fields = wanted["json_schema"]["schema"]["properties"]
        return Rubric({name: 1.0 for name in fields if name != "reason"})
    if "whole number from 0" in text:
        return Rating()
    return YesNoOdds() if body.get("logprobs") else YesNoWord()


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _picture(parts: list[dict[str, Any]]) -> np.ndarray:
    """The first picture of a message, [height, width, 3] uint8."""
    for part in parts:
        if part.get("type") == "image_url":
            source = part.get("image_url")
            head, _, data = str(source.get("url") if isinstance(source, dict) else "").partition(",")
            if not re.fullmatch(r"data:image/(png|jpeg);base64", head):
                raise BadRequestError("send the picture as a data URL, PNG or JPEG")
            try:
                with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=("PNG", "JPEG")) as image:
                    return np.asarray(image.convert("RGB"))
            except (binascii.Error, OSError, ValueError, SyntaxError) as error:
                raise BadRequestError(f"the picture cannot be read: {error}") from None
    raise BadRequestError("there is no picture")
