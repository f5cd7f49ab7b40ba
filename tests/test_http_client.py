"""One deadline for a whole HTTP request: no server can outlast it, however it sends its bytes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from unigrpo_cli import RewardContext
from unigrpo_cli.errors import RewardError
from unigrpo_plugins.http_client import AnswerTooLargeError, ClosedError, HttpClient, Limits, NoAnswerError, checked_url
from unigrpo_plugins.remote import RemoteReward
from unigrpo_plugins.vlm import VlmOptions, VlmReward

CONTEXT = RewardContext(device="cpu", seed=0, embedded=False, offline=True)
DEADLINE_S, LATEST_S = 0.15, 3.0  # the latest that a request may end on a busy machine
LIMITS = Limits(deadline_s=20, connect_s=20, read_s=20, max_bytes=100)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@contextmanager
def _sending(*chunks: bytes, forever: bytes = b"", every_s: float = 0.02) -> Iterator[str]:
    """A server that sends `chunks` to every connection, then `forever` again and again."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def talk(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            for chunk in chunks:
                connection.sendall(chunk)
            while not stop.wait(every_s):
                connection.sendall(forever)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.close()


SLOW_SERVERS = {
    "silent": {},
    "header byte by byte": {"chunks": (b"HTTP/1.1 200 OK\r\nX-Slow: ",), "forever": b"a"},
    "headers without end": {"chunks": (b"HTTP/1.1 200 OK\r\n",), "forever": b"A: b\r\n"},
    "100 Continue without end": {"forever": b"HTTP/1.1 100 Continue\r\n\r\n"},
    "103 Early Hints without end": {"forever": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"},
    "body byte by byte": {"chunks": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n",), "forever": b" "},
    "chunks without end": {
        "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",),
        "forever": b"1\r\n \r\n",
    },
    "chunk size byte by byte": {
        "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",),
        "forever": b"0",
    },
}


def _plain(url: str) -> None:
    client = HttpClient(url, local=True, headers={})
    try:
        client.request("POST", "/", b"{}", replace(LIMITS, deadline_s=DEADLINE_S, max_bytes=10**6))
    finally:
        client.close()


def _remote(url: str) -> None:
    RemoteReward(RemoteReward.Options(url=url, deadline_s=DEADLINE_S)).setup(CONTEXT)


def _judge(url: str) -> None:
    VlmReward(VlmOptions(url=url, deadline_s=DEADLINE_S)).setup(CONTEXT)


ASKED = [
    *((server, _plain, NoAnswerError) for server in SLOW_SERVERS),
    *((server, _remote, ConnectionError) for server in ("silent", "body byte by byte")),
    *((server, _judge, RewardError) for server in ("silent", "body byte by byte")),
]


@pytest.mark.parametrize(("server", "ask", "error"), ASKED)
def test_the_deadline_holds(server: str, ask: Callable[[str], None], error: type[Exception]) -> None:
    how = SLOW_SERVERS[server]
    with _sending(*how.get("chunks", ()), forever=how.get("forever", b"")) as url:
        began = time.monotonic()
        with pytest.raises(error):
            ask(url)
        assert time.monotonic() - began < LATEST_S


def test_an_abandoned_request_ends_with_its_connection() -> None:
    """Its thread reads from a closed connection at the next byte, and does not read on for ever."""
    before = threading.active_count()
    with _sending(b"HTTP/1.1 200 OK\r\nX-Slow: ", forever=b"a") as url:
        with pytest.raises(NoAnswerError):
            _plain(url)
        until = time.monotonic() + LATEST_S
        while any(t.name == "http request" for t in threading.enumerate()) and time.monotonic() < until:
            time.sleep(0.02)
        assert not [t for t in threading.enumerate() if t.name == "http request"]
    assert threading.active_count() <= before + 2


def test_an_answer_beyond_the_limit_is_refused() -> None:
    with _sending(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123456789") as url:
        client = HttpClient(url, local=True, headers={})
        with pytest.raises(AnswerTooLargeError, match="more than 8 bytes"):
            client.request("GET", "/", None, replace(LIMITS, max_bytes=8))
        client.close()


def test_a_connection_is_used_again() -> None:
    connections = []
    with _sending(OK, forever=OK, every_s=0.1) as url:
        client = HttpClient(url, local=True, headers={})
        for _ in range(3):
            assert client.request("GET", "/", None, LIMITS).status == 200
            connections.append(client._idle[:])
        assert connections[0] == connections[1] == connections[2] and len(connections[0]) == 1
        client.close()


def test_closing_wakes_threads_that_wait() -> None:
    with _sending() as url:
        client = HttpClient(url, local=True, headers={})
        threading.Timer(0.1, client.close).start()
        began = time.monotonic()
        for _ in range(2):  # the one that waits, and one that comes later
            with pytest.raises(ClosedError):
                client.request("GET", "/", None, LIMITS)
        assert time.monotonic() - began < LATEST_S


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "must begin with http"),
        ("127.0.0.1:80", "must begin with http"),
        ("ftp://h/secret", "must begin with http"),
        ("http://me:secret@h/v1", "no user, password"),
        ("http://h/v1?key=secret", "no user, password"),
        ("http://h/#secret", "no user, password"),
        ("http://", "no valid host or port"),
        ("http://a b/", "no valid host or port"),
        ("http://h:0", "no valid host or port"),
        ("http://h:99999", "cannot be parsed"),
        ("http://[::1", "cannot be parsed"),
    ],
)
def test_an_address_that_cannot_be_used_is_not_repeated(url: str, says: str) -> None:
    with pytest.raises(RewardError, match=says) as caught:
        checked_url("vlm", url, "an address such as http://localhost:8000/v1", "A_KEY")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address", "local"),
    [
        ("http://localhost:8000/v1/", "http://localhost:8000/v1", True),
        ("http://[::1]:80", "http://[::1]:80", True),
        ("https://api.example.com/v1", "https://api.example.com/v1", False),
    ],
)
def test_addresses(url: str, address: str, local: bool) -> None:
    assert checked_url("vlm", url, "x", "y") == (address, local)
