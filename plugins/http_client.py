"""HTTP requests with one deadline over each: connecting, sending, headers and body.

A socket's timeout starts again with every byte. A server that sends a header byte by byte, or `100 Continue` without
end, outlasts it. So every request runs in its own thread, on a connection that no other request uses meanwhile, and is
abandoned at its deadline.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from unigrpo_cli.errors import RewardError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class NoAnswerError(Exception):
    """A lost connection, a timeout or an answer without end: another try may succeed."""


class AnswerTooLargeError(NoAnswerError):
    """An answer beyond the limit of bytes."""


class ClosedError(Exception):
    """The client was closed before the answer came."""


@dataclass(frozen=True)
class Limits:
    """Seconds for the whole request, for connecting and between two reads; bytes of the answer's body."""

    deadline_s: float
    connect_s: float
    read_s: float
    max_bytes: int


@dataclass(frozen=True)
class HttpAnswer:
    """`headers` by lower-case name."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def checked_url(reward: str, url: str, example: str, place_of_secrets: str) -> tuple[str, bool]:
    """The address without a slash at its end, and whether it is this machine's loopback.

    Args:
        example: the address to type.
        place_of_secrets: where the key or token belongs.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", 80 if parts.port is None else parts.port
    except ValueError:
        raise RewardError(f"reward {reward!r}: @url cannot be parsed; give {example}") from None
    if parts.scheme not in ("http", "https"):
        raise RewardError(f"reward {reward!r}: @url must begin with http:// or https://; give {example}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RewardError(
            f"reward {reward!r}: @url must hold no user, password, query or fragment, because it is printed and "
            f"logged; put the key or token in {place_of_secrets}"
        )
    if not re.fullmatch(r"[\w.:-]+", host) or not port:
        raise RewardError(f"reward {reward!r}: @url has no valid host or port; give {example}")
    return url.rstrip("/"), host in LOOPBACK


class HttpClient:
    """Sends requests to one server. Threads may share it.

    Args:
        url: the address that all paths are relative to.
        local: the server is on this machine's loopback, which no proxy can reach.
        transport: of httpx2, for tests without a socket.
    """

    def __init__(
        self,
        url: str,
        *,
        local: bool,
        headers: Mapping[str, str],
        transport: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        import httpx2

        plain = local and url.startswith("http://")
        verify = False if plain else httpx2.create_ssl_context()  # once: loading the certificates takes a while
        self.url = url
        self._new = lambda: httpx2.Client(headers=headers, transport=transport, verify=verify, trust_env=not local)
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._waiting: dict[Any, queue.SimpleQueue[HttpAnswer | BaseException]] = {}
        self._closed = False

    def request(self, method: str, path: str, content: bytes | None, limits: Limits) -> HttpAnswer:
        """The answer to one request.

        Raises:
            NoAnswerError: without a whole answer in time; AnswerTooLargeError beyond `max_bytes`.
            ClosedError: when the client is closed meanwhile.
            RewardError: when the address cannot be used.
        """
        connection, done = self._take()
        until = self._clock() + limits.deadline_s

        def work() -> None:
            try:
                done.put(self._send(connection, method, self.url + path, content, limits, until))
            except BaseException as error:
                done.put(error)

        threading.Thread(target=work, daemon=True, name="http request").start()
        try:
            answer = done.get(timeout=limits.deadline_s)
        except queue.Empty:
            self._put_back(connection, usable=False)
            raise NoAnswerError(f"no whole answer within {limits.deadline_s:.3g} s") from None
        self._put_back(connection, usable=not isinstance(answer, ClosedError))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End all requests; those that wait raise ClosedError."""
        with self._lock:
            self._closed = True
            idle, waiting = self._idle, dict(self._waiting)
            self._idle = []
        for done in waiting.values():
            done.put(ClosedError("the client was closed"))
        for connection in (*idle, *waiting):
            _close(connection)

    def _send(
        self, connection: Any, method: str, url: str, content: bytes | None, limits: Limits, until: float
    ) -> HttpAnswer:
        import httpx2

        left = max(until - self._clock(), 0.01)
        timeout = httpx2.Timeout(min(limits.read_s, left), connect=min(limits.connect_s, left))
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            with connection.stream(method, url, content=content, headers=headers, timeout=timeout) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > limits.max_bytes:
                        raise AnswerTooLargeError(f"an answer of more than {limits.max_bytes:,} bytes")
                    if self._clock() > until:
                        raise NoAnswerError("an answer without end")
                return HttpAnswer(
                    response.status_code, {k.lower(): v for k, v in response.headers.items()}, bytes(body)
                )
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
            raise RewardError(f"{url} cannot be used ({type(error).__name__})") from None
        except (httpx2.RequestError, OSError, RuntimeError) as error:  # RuntimeError: closed meanwhile
            raise NoAnswerError(f"{type(error).__name__}: {error}") from None

    def _take(self) -> tuple[Any, queue.SimpleQueue[HttpAnswer | BaseException]]:
        """An idle or new connection, and the queue for its answer."""
        with self._lock:
            if self._closed:
                raise ClosedError("the client was closed")
            connection = self._idle.pop() if self._idle else self._new()
            self._waiting[connection] = queue.SimpleQueue()
            return connection, self._waiting[connection]

    def _put_back(self, connection: Any, *, usable: bool) -> None:
        with self._lock:
            del self._waiting[connection]
            usable = usable and not self._closed
            if usable:
                self._idle.append(connection)
        if not usable:
            _close(connection)


def _close(connection: Any) -> None:
    """Close a connection. A thread that still reads from it fails at its next byte or at its timeout."""
    with suppress(OSError, RuntimeError):
        connection.close()
