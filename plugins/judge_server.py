"""A stand-in judge: a small server that speaks the real protocol and sees the shapes world.

It knows what a true judge knows, the request that it is sent: it decodes the picture, looks with the shapes
detector, reads the fenced words with the shapes world's grammar, and answers as it is asked to. So `vlm` runs
without a network, and what is tested is what a true judge would get. It can misbehave in all the ways of servers.

    python -m unigrpo_plugins.judge_server --port 8000
    python -m unigrpo_plugins.judge_server --port 8000 --fault 503 --fault reset --rate 0.3
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
import math
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "shapes-judge"
FAULTS = ("429", "500", "503", "reset", "malformed", "half", "hang")
LARGEST_REQUEST = 32 << 20
VARIANTS = (0.6, 0.25, 0.1, 0.05)  # of the probability of a word, by how it is written


@dataclass(frozen=True)
class Faults:
    """How to misbehave: at `rate` one of `kinds`, drawn from `seed`; features to refuse with status 400.

    `retry_after` is a header of 429 and 503; a hang lasts `hang_s` and then drops the connection.
    """

    kinds: tuple[str, ...] = ()
    rate: float = 0.0
    seed: int = 0
    retry_after: str | None = None
    hang_s: float = 30.0
    without: frozenset[str] = frozenset()


class BadRequestError(Exception):
    """A request that this server does not take; the text is for its sender."""


class JudgeServer(ThreadingHTTPServer):
    """Runs in threads of its own between `start` and `stop`."""

    request_queue_size = 256  # the default of 5 resets connections when a thread pool arrives at once
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0, faults: Faults = Faults()):
        super().__init__(("127.0.0.1", port), Conversation)
        from unigrpo_plugins.detector_shapes import ShapesDetector

        self.detector = ShapesDetector()
        self.faults = faults
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
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True, name="stand-in judge").start()
        return self

    def stop(self) -> None:
        """Ends it at once, open conversations too."""
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
        """A client that went away is no news."""


class Conversation(BaseHTTPRequestHandler):
    """One connection: requests and answers in JSON, in the form of OpenAI's chat completions."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out apart, and the second would wait for an acknowledgement
    timeout = 120
    server: JudgeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self._error(404, f"nothing at {self.path}")
        self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "unigrpo"}]})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_REQUEST:
            self.close_connection = True
            return self._error(413, "say how long the request is, at most 32 MiB")
        data = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            return self._error(404, f"nothing at {self.path}")
        fault = self.server.next_fault()
        if fault in ("429", "500", "503"):
            return self._error(int(fault), "injected", self.server.faults.retry_after if fault != "500" else None)
        if fault == "hang":
            self.server.stopping.wait(self.server.faults.hang_s)
        if fault in ("hang", "reset"):
            return self._reset()
        try:
            answer = complete(data, self.server)
        except BadRequestError as error:
            return self._error(400, str(error))
        except Exception as error:  # a fault of ours: said, where a dropped connection would look like the network's
            return self._error(500, f"{type(error).__name__}: {error}")
        self._send(200, answer, fault)

    def _error(self, status: int, message: str, retry_after: str | None = None) -> None:
        self._send(status, {"error": {"message": message, "type": "error", "code": status}}, None, retry_after)

    def _send(
        self, status: int, row: Mapping[str, Any], fault: str | None = None, retry_after: str | None = None
    ) -> None:
        body = json.dumps(row).encode()
        if fault == "malformed":
            body = body.replace(b":", b";")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
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


# ----- the judge itself


def complete(data: bytes, server: JudgeServer) -> dict[str, Any]:
    """The answer to the body of one chat completion.

    Raises:
        BadRequestError: when it is none, or wants what this server goes without.
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
    if not 0 <= top <= 20:
        raise BadRequestError("top_logprobs is at most 20")
    shown, clean, reasons = look(_picture(parts), text, server.detector)
    content, first = _spoken(body, text, shown, clean, reasons)
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": content}}
    choice |= {"finish_reason": "stop", "logprobs": None}
    if body.get("logprobs"):
        listed = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in first]
        choice["logprobs"] = {"content": [listed[0] | {"top_logprobs": listed[:top]}]}
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [choice],
        "usage": {"prompt_tokens": len(text.split()) + 16, "completion_tokens": len(content.split())},
    }


def look(image: Any, text: str, detector: Any) -> tuple[float | None, float, tuple[str, ...]]:
    """How much of what is asked about is there, None for words of another world; how clean it is; what is amiss."""
    from unigrpo_cli.toy.prompts import parse_prompt
    from unigrpo_plugins.colors import name_color
    from unigrpo_plugins.detector_shapes import background_deviation
    from unigrpo_plugins.geneval_rules import Seen, judge, keep_confident

    clean = max(0.0, 1 - 10 * background_deviation([image])[0])
    match = re.search(r"^<((?:request|question)[-\d]*)>\n(.*?)\n</\1>$", text, re.MULTILINE | re.DOTALL)
    caption = "" if match is None else match[2].strip()
    asked = re.fullmatch(r"Does the picture show (?:exactly )?(.*)\?", caption, re.DOTALL)
    metadata = parse_prompt(asked[1] if asked else caption)
    if metadata is None:
        return None, clean, ("I cannot read that.",)
    objects: dict[str, list[Seen]] = {}
    for d in detector.detect([image])[0]:
        objects.setdefault(d.label, []).append(Seen(d.score, d.box, name_color(image, d.mask, d.box)))
    seen = keep_confident(
        objects,
        metadata,
        threshold=detector.threshold,
        counting_threshold=detector.counting_threshold,
    )
    verdict = judge(seen, metadata)
    return verdict.partial, clean, verdict.reasons


def _spoken(
    body: Mapping[str, Any], text: str, shown: float | None, clean: float, reasons: tuple[str, ...]
) -> tuple[str, list[tuple[str, float]]]:
    """The words of the answer, and the likeliest first tokens."""
    if shown is None:
        return "I cannot tell.", [("I", math.log(0.9)), ("The", math.log(0.05)), ("Well", math.log(0.02))]
    odds = 0.02 + 0.96 * shown
    first = [
        (token, math.log(0.97 * share * p))
        for word, p in (("yes", odds), ("no", 1 - odds))
        for token, share in zip((word.title(), f" {word}", word, word.upper()), VARIANTS, strict=True)
    ]
    first = sorted([*first, ("The", math.log(0.02)), ("It", math.log(0.01))], key=lambda pair: -pair[1])
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        names = [n for n, p in wanted["json_schema"]["schema"]["properties"].items() if p.get("type") == "integer"]
        grades = {n: 1 + round(4 * (shown if k == 0 else clean)) for k, n in enumerate(names)}
        return json.dumps({"reason": "; ".join(reasons) or "As asked.", **grades}), first
    if "whole number from 0" in text:
        return str(round(10 * shown)), first
    return ("Yes" if shown == 1 else "No") if not body.get("logprobs") else first[0][0], first


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _picture(parts: list[dict[str, Any]]) -> Any:
    """The first picture of a message, [height, width, 3] uint8."""
    import numpy as np
    from PIL import Image

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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unigrpo_plugins.judge_server", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--fault", action="append", choices=FAULTS, default=[], help="repeatable")
    parser.add_argument("--rate", type=float, default=0.3, help="share of requests with a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retry-after", help="header of 429 and 503: seconds, or a date")
    parser.add_argument("--hang-s", type=float, default=30.0)
    parser.add_argument("--without", action="append", choices=("logprobs", "response_format"), default=[])
    a = parser.parse_args()
    faults = Faults(tuple(a.fault), a.rate, a.seed, a.retry_after, a.hang_s, frozenset(a.without))
    server = JudgeServer(a.port, faults)
    print(f"vlm@url={server.url}@model={MODEL}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
