"""A reward behind HTTP, for one that needs other packages or another machine. Its client: plugins/remote.py.

Protocol 1, JSON both ways (docs/rewards.md):

    GET  /v1/info   what the reward is and which columns to send
    POST /v1/check  {"metadata": [...], "has_reasoning": true}: do these prompts carry what it needs?
    POST /v1/score  {"samples": [{"prompt", "image", "reasoning", "metadata", "id", "group_id", "source", "segments"}],
                     "step", "split"}

`segments` are texts and pictures in order, {"text": ...} or {"image": ...}. Only what the reward reads is sent. Images
travel as base64 PNG, which keeps every pixel; a score of null is no opinion. Nothing that is sent is run: only JSON and
PNG are read, and a request has a largest size in bytes and in pixels.
"""

from __future__ import annotations

import base64
import hmac
import io
import ipaddress
import math
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unigrpo_cli.errors import RewardError, UsageError
from unigrpo_cli.io.json import to_json
from unigrpo_cli.io.limits import parse_json
from unigrpo_cli.rewards.batch import Sample
from unigrpo_cli.rewards.loaded import FailedCallError, LoadedReward
from unigrpo_cli.rewards.registry import message_of
from unigrpo_cli.rewards.scorer import Scorer

PROTOCOL = 1
COLUMNS_SENT = ("image", "reasoning", "texts", "pictures", "source", "metadata")
MAX_BYTES = 256 * 2**20
"""Of a request: 64 pictures of 1024 x 1024 are about 100 MiB as PNG."""
BYTES_PER_PIXEL = 2
"""A request may have as many pixels as its largest size in bytes divided by this: a small PNG can hold gigabytes."""
DRAIN_BYTES = 2**30
"""Of a refused request that are read and dropped, so that the client reads the answer."""
IDLE_S = 60.0
"""Seconds of silence after which a connection is closed."""
SINGLE_HEADERS = ("Host", "Content-Length", "Content-Type", "Authorization", "Origin")
"""Two of one of these would be read differently by different programs."""


class HttpError(Exception):
    """An answer other than 200: its status, a message, and the kind of error."""

    def __init__(self, status: int, text: str, kind: str = "request"):
        super().__init__(text)
        self.status, self.kind = status, kind


class RewardServer(ThreadingHTTPServer):
    """Serves one reward: many connections, one scoring at a time.

    Construct it, set up the reward, then `listen` and `serve_forever`: a port in use is found before weights are
    loaded, and no client connects before the reward is ready.

    Args:
        token: sent by clients as `Authorization: Bearer`; None accepts any program on this machine, but no web page.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, host: str, port: int, token: str | None = None, max_bytes: int = MAX_BYTES):
        if not token and not is_loopback(host):
            raise UsageError(
                f"--host {host} can be reached from other machines: give a --token-file (or UNIGRPO_REWARD_TOKEN), "
                "or use 127.0.0.1"
            )
        self.token, self.max_bytes, self.max_pixels = token, max_bytes, max_bytes // BYTES_PER_PIXEL
        self.rewards: Scorer | None = None
        self.facts: dict[str, Any] = {}
        self.scoring = threading.Lock()
        self.stopping = False
        self.lost = ""
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Exchange, bind_and_activate=False)
            self.server_bind()
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot serve at {host}:{port}: {error}; give another --host or --port") from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = f"[{host!s}]" if self.address_family == socket.AF_INET6 else str(host)
        return f"http://{name}:{port}"

    def server_bind(self) -> None:
        """Bind without looking up the machine's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def listen(self, rewards: Scorer, version: str) -> None:
        """Accept clients; `rewards` holds the one reward."""
        self.rewards = rewards
        self.facts = facts_of(rewards.rewards[0], version)
        self.facts |= {"max_bytes": self.max_bytes, "max_pixels": self.max_pixels}
        self.server_activate()

    def stop(self) -> None:
        """End `serve_forever` soon, from any thread or signal. Requests until then get a 503."""
        self.stopping = True
        threading.Thread(target=self.shutdown, daemon=True).start()

    def close(self, patience_s: float = 10.0) -> None:
        """Close the socket when the current scoring ends, or after `patience_s`."""
        self.stopping = True
        if self.scoring.acquire(timeout=patience_s):
            self.scoring.release()
        self.server_close()

    @contextmanager
    def _exclusive(self) -> Iterator[Scorer]:
        """The reward, for one request at a time."""
        with self.scoring:
            if self.stopping or self.rewards is None:
                raise HttpError(503, "the reward server is stopping", "stopping")
            yield self.rewards

    def check(self, body: Mapping[str, Any]) -> dict[str, Any]:
        rows = body.get("metadata")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise HttpError(400, "`metadata` must be a list of objects")
        has_reasoning = body.get("has_reasoning", True)
        if not isinstance(has_reasoning, bool):
            raise HttpError(400, "`has_reasoning` must be true or false")
        with self._exclusive() as rewards:
            try:
                rewards.check_needs(rows, has_reasoning=has_reasoning, has_source=True, split="train")
            except RewardError as error:
                raise HttpError(422, str(error), "needs") from error
        return {"protocol": PROTOCOL, "ok": True}

    def score(self, body: Mapping[str, Any]) -> dict[str, Any]:
        step, split = body.get("step", 0), body.get("split", "train")
        if type(step) is not int or split not in ("train", "eval"):
            raise HttpError(400, '`step` must be a whole number and `split` "train" or "eval"')
        with self._exclusive() as rewards:
            opened = rewards.rewards[0]
            samples = read_samples(body, self.max_pixels)  # one request at a time, for its memory
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the client warns of scores outside the range
                    scored = rewards.score(samples, step=step, split=split)[opened.alias]
            except FailedCallError as error:
                raise HttpError(500, str(error), "failed") from error
            except RewardError as error:
                if opened.worker.hung:
                    self.lost = str(error)
                    self.stop()
                raise HttpError(500, str(error), "contract") from error
        return {
            "protocol": PROTOCOL,
            "scores": scored.scores,
            "components": scored.components,
            "info": scored.info,
            "segments": scored.segments,
        }


class Exchange(BaseHTTPRequestHandler):
    """One connection. A request is authorised before its body is read."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server_version = "unigrpo"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """The server prints only its address."""

    def _answer(self, found: Any) -> None:
        self._unread = 0
        try:
            self._check_headers()
            self._unread = self._length() or 0
            self._authorise()
            status, content = 200, to_json(found())
        except HttpError as refusal:
            body = {"protocol": PROTOCOL, "error": str(refusal), "kind": refusal.kind}
            status, content = refusal.status, to_json(body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        except Exception as error:  # a fault of this server, which keeps serving
            body = {"protocol": PROTOCOL, "error": message_of(error), "kind": "server"}
            status, content = 500, to_json(body)
        self._send(status, content.encode())

    def _length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None

    def _check_headers(self) -> None:
        """Refuse requests whose length or origin is ambiguous, and without a token those of web pages.

        A page can resolve its own name to 127.0.0.1 (DNS rebinding): its requests arrive here with that name as Host.
        """
        for name in SINGLE_HEADERS:
            if len(self.headers.get_all(name, ())) > 1:
                self.close_connection = True
                raise HttpError(400, f"send {name} once")
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise HttpError(411, "send Content-Length, not Transfer-Encoding")
        if self.server.token:
            return
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not is_loopback(_hostname(f"//{host}")):
            raise HttpError(403, f"Host {host!r} is not this machine; start the server with a token", "host")
        if origin is not None and not is_loopback(_hostname(origin)):
            raise HttpError(403, f"Origin {origin!r} is not this machine; start the server with a token", "host")

    def _send(self, status: int, content: bytes) -> None:
        if self._unread or self.server.stopping:  # the rest of this request is not the next one
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if self.close_connection:
            self.send_header("Connection", "close")
        try:
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
            left = 0 if status == 401 else min(self._unread, DRAIN_BYTES)
            while left > 0 and (piece := self.rfile.read(min(left, 2**16))):
                left -= len(piece)
        except OSError:
            self.close_connection = True

    def _authorise(self) -> None:
        token = self.server.token
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HttpError(401, "this reward server needs a token: `Authorization: Bearer TOKEN`", "token")

    def _get(self) -> dict[str, Any]:
        if self.path != "/v1/info":
            raise HttpError(404, f"nothing at {self.path}; GET /v1/info, POST /v1/check, POST /v1/score")
        return self.server.facts

    def _post(self) -> dict[str, Any]:
        actions = {"/v1/check": self.server.check, "/v1/score": self.server.score}
        if self.path not in actions:
            raise HttpError(404, f"nothing at {self.path}; GET /v1/info, POST /v1/check, POST /v1/score")
        body = self._body()
        if body.get("protocol") != PROTOCOL:
            said = body.get("protocol")
            raise HttpError(400, f"this server has protocol {PROTOCOL}, the request {said!r}", "protocol")
        return actions[self.path](body)

    def _body(self) -> dict[str, Any]:
        # a browser lets a web page post plain text to a loopback address, but asks first before it posts JSON
        if self.headers.get_content_type() != "application/json":
            raise HttpError(415, "send Content-Type: application/json")
        length, limit = self._length(), self.server.max_bytes
        if length is None:
            self.close_connection = True  # the end of this request is unknown
            raise HttpError(411, "send Content-Length")
        if length > limit:
            raise HttpError(413, f"the request has {length} bytes, the limit is {limit}; see --max-mb", "size")
        content = self.rfile.read(length)
        self._unread = 0
        try:
            body = parse_json(content.decode())
        except ValueError as error:
            raise HttpError(400, f"the request is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise HttpError(400, "the request must be a JSON object")
        return body


def facts_of(opened: LoadedReward, version: str) -> dict[str, Any]:
    """What a client needs to know of a reward; an infinite bound is null."""
    reward = opened.reward
    return {
        "protocol": PROTOCOL,
        "name": opened.spec.name,
        "address": opened.entry.address,
        "version": version,
        "summary": str(getattr(reward, "summary", "")),
        "licence": str(getattr(reward, "licence", "not declared")),
        "range": [x if math.isfinite(x) else None for x in opened.range],
        "needs": sorted(getattr(reward, "needs", ())),
        "sends": columns_sent(reward),
        "scope": str(getattr(reward, "scope", "sample")),
        "batch_size": getattr(reward, "batch_size", None),
        "segments": sorted(opened.segments),
        "higher_is_better": opened.sign > 0,
    }


def columns_sent(reward: Any) -> list[str]:
    """The columns that a reward reads, by its parameters or its `needs`; all when it declares neither."""
    if not hasattr(reward, "needs"):
        return list(COLUMNS_SENT)
    kinds = {need.partition(":")[0] for need in reward.needs}
    columns = set(getattr(reward, "columns", ()))
    if "batch" in columns:
        return list(COLUMNS_SENT)
    return [name for name in COLUMNS_SENT if name in kinds | columns]


def read_samples(body: Mapping[str, Any], max_pixels: int) -> list[Sample]:
    """The samples of a request. Its pictures are counted by their headers before one is decoded.

    Raises:
        HttpError: naming the sample and its fault.
    """
    rows = body.get("samples")
    if not isinstance(rows, list):
        raise HttpError(400, "`samples` must be a list of objects")
    pixels = 0
    for k, row in enumerate(rows):
        for text in _images_in(k, row):
            with _picture(k, text) as image:
                pixels += image.width * image.height
            if pixels > max_pixels:
                raise HttpError(
                    413, f"samples[{k}]: the request has more than {max_pixels} pixels, the limit; see --max-mb", "size"
                )
    return [_sample(k, row) for k, row in enumerate(rows)]


def _images_in(k: int, row: Any) -> list[Any]:
    """Every picture that a sample brings, as base64 text."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise HttpError(400, f"samples[{k}] must be an object with a text `prompt`")
    segments = row.get("segments") or []
    if not isinstance(segments, list) or not all(_is_segment(part) for part in segments):
        raise HttpError(400, f'samples[{k}]: `segments` must be a list of {{"text": ...}} and {{"image": ...}}')
    found = [row.get("image"), row.get("source"), *(part.get("image") for part in segments)]
    return [text for text in found if text is not None]


def _is_segment(part: Any) -> bool:
    return isinstance(part, dict) and (part.keys() == {"image"} or isinstance(part.get("text"), str))


def _sample(k: int, row: dict[str, Any]) -> Sample:
    reasoning, metadata = row.get("reasoning"), row.get("metadata") or {}
    if not isinstance(reasoning, str | None) or not isinstance(metadata, dict):
        raise HttpError(400, f"samples[{k}]: `reasoning` is text or null, `metadata` an object")
    # A picture that was not sent has no pixels, so a reward that reads it all the same fails.
    segments = tuple(
        part["text"] if "text" in part else _pixels(k, part["image"]) for part in row.get("segments") or ()
    )
    pictures = [part for part in segments if not isinstance(part, str)]
    if segments and not pictures:
        raise HttpError(400, f"samples[{k}]: `segments` has no picture; one that is not sent is null")
    source = row.get("source")
    return Sample(
        row["prompt"],
        pictures[-1] if pictures and row.get("image") is None else _pixels(k, row.get("image")),
        reasoning,
        metadata,
        str(row.get("id", "")),
        str(row.get("group_id", "")),
        None if source is None else _pixels(k, source),
        segments,
    )


def _pixels(k: int, text: Any) -> NDArray[np.uint8]:
    if text is None:
        return np.zeros((0, 0, 3), np.uint8)
    with _picture(k, text) as image:
        if image.mode != "RGB":
            raise HttpError(400, f"samples[{k}]: the picture is {image.mode}; send RGB")
        return np.asarray(image)


@contextmanager
def _picture(k: int, text: Any) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            yield image
    except (TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise HttpError(400, f"samples[{k}]: `image` is not a base64 PNG: {error}") from error


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether an address or name reaches this machine only; other names count as reachable from outside."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
