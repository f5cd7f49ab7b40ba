"""Transport to a judge that speaks OpenAI's chat completions: patient with the network, never inventing an answer.

Whatever may pass by itself is tried again: a busy or failing server, a lost connection, half an answer. What the
server refuses is an error at once. A question that stays open within its budget is `UnansweredError`, and when that
happens many times in a row, the run stops: the judge is gone.
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic import SecretStr

from unigrpo_cli.errors import RewardError

A = TypeVar("A")
T = TypeVar("T")

KEY_NAMES = ("UNIGRPO_JUDGE_KEY", "OPENAI_API_KEY")
PASSING = frozenset({408, 409, 425, 429})  # and every 5xx: the same request may succeed later
LARGEST_ANSWER = 4 << 20  # bytes; an answer is a few kilobytes
REMEDIES = {
    400: "the server does not take this request; try @mode=auto, and see @body for what the model wants otherwise",
    401: f"set {' or '.join(KEY_NAMES)} to a valid key",
    402: "the account behind the key has no credit",
    403: f"the key in {' or '.join(KEY_NAMES)} may not use this model",
    404: "check @model, and that @url ends where /chat/completions begins (often in /v1)",
    413: "the picture is too large for this server",
    422: "the server does not take this request; try @mode=auto",
}


@dataclass(frozen=True)
class Patience:
    """How long to try: seconds to connect and to wait for data; a question's budget in seconds and tries.

    `breaker` questions in a row without an answer stop the run.
    """

    connect_s: float = 10.0
    read_s: float = 60.0
    deadline_s: float = 90.0
    attempts: int = 12
    backoff_s: float = 0.5
    backoff_most_s: float = 20.0
    breaker: int = 8


@dataclass(frozen=True)
class Answer:
    """What a judge said: its text, the likeliest first tokens with their log-probabilities, why it stopped.

    `call` is what it took to get it: tries, seconds, tokens. It is no part of what was said, and not remembered.
    """

    text: str
    first: tuple[tuple[str, float], ...] = ()
    finish: str = ""
    call: Mapping[str, float] = field(default_factory=dict, compare=False)

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text, "first": [list(pair) for pair in self.first], "finish": self.finish}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Answer:
        """Raises ValueError, KeyError or TypeError on anything that `as_json` did not write."""
        first = tuple((str(token), float(logprob)) for token, logprob in row["first"])
        return cls(str(row["text"]), first, str(row["finish"]))


class UnansweredError(Exception):
    """No answer within the budget of one question; the text says what came instead."""


class RefusedError(RewardError):
    """A status that no repetition cures."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


class _PassingError(Exception):
    """One try that failed in a way that may pass; `least_s` is how long the server asks to wait."""

    def __init__(self, why: str, least_s: float = 0.0):
        super().__init__(why)
        self.least_s = least_s


def key_from_environment() -> SecretStr | None:
    """The key, kept so that no repr shows it.

    Raises:
        RewardError: when it cannot stand in a header.
    """
    for name in KEY_NAMES:
        key = os.environ.get(name, "").strip()
        if key:
            if not (key.isascii() and key.isprintable()):
                raise RewardError(f"{name} holds characters that no key has; set it again")
            return SecretStr(key)
    return None


class Endpoint:
    """One server. Threads may share it.

    Args:
        url: up to where `/chat/completions` begins.
        clock, now, rest, draw: monotonic seconds, seconds since 1970, waiting, a number in [0, 1) for the jitter.
        transport: of httpx2, for tests without a socket.
    """

    def __init__(
        self,
        url: str,
        key: SecretStr | None,
        patience: Patience = Patience(),
        connections: int = 16,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        rest: Callable[[float], Any] | None = None,
        draw: Callable[[], float] | None = None,
        transport: Any = None,
    ):
        import httpx2

        self.patience = patience
        self.url, local = _checked_url(url)
        self._key = key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._client = httpx2.Client(
            headers=headers,
            transport=transport,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            # without TLS on our own loopback there is nothing to verify, and loading the authorities takes a while
            verify=not (local and self.url.startswith("http://")),
            trust_env=not local,  # a proxy cannot reach our own loopback
        )
        self._closed = threading.Event()
        # Jitter of its own: waiting must not move random numbers that others draw.
        self._clock, self._now, self._draw = clock, now, draw or random.Random().random
        self._rest = rest or self._closed.wait
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._broken: str | None = None
        self._counts = dict.fromkeys(("calls", "retries", "unanswered", "prompt_tokens", "completion_tokens"), 0)
        self._seconds: deque[float] = deque(maxlen=100_000)

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    def ask(self, body: Mapping[str, Any]) -> Answer:
        """The answer to one chat completion.

        Raises:
            UnansweredError: when the budget is spent.
            RewardError: when the server refuses, or has not answered many questions in a row.
        """
        with self._lock:
            self._counts["calls"] += 1
        began = self._clock()
        answer, tried = self._exchange("POST", "/chat/completions", body, self._answer_of)
        return replace(answer, call={"tries": tried, "seconds": self._clock() - began, **answer.call})

    def models(self) -> list[str]:
        """Ids of the models that are served; raises like `ask`."""
        return self._exchange("GET", "/models", None, lambda row: [str(model["id"]) for model in row["data"]])[0]

    def figures(self) -> dict[str, float]:
        """Counts so far, and median and 95th percentile of the seconds that an answer took."""
        with self._lock:
            seconds = sorted(self._seconds)
            return {
                **self._counts,
                "latency_p50_s": _percentile(seconds, 0.50),
                "latency_p95_s": _percentile(seconds, 0.95),
            }

    def close(self) -> None:
        """Wakes whoever waits; further questions are unanswered."""
        self._closed.set()
        self._client.close()

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T]
    ) -> tuple[T, int]:
        """What `read` makes of the answer, and at which try."""
        content = None if body is None else json.dumps(body).encode()
        p = self.patience
        deadline = self._clock() + p.deadline_s
        tried, why = 0, "the deadline had passed"
        while tried < p.attempts and self._clock() < deadline:
            self._stop_if_broken()
            tried += 1
            try:
                found = self._once(method, path, content, deadline, read)
            except _PassingError as passing:
                why, least = str(passing), passing.least_s
            else:
                with self._lock:
                    self._in_a_row = 0
                return found, tried
            if tried == p.attempts:
                break
            # full jitter: many that failed together must not come back together
            wait = max(least, self._draw() * min(p.backoff_most_s, p.backoff_s * 2 ** (tried - 1)))
            if self._clock() + wait >= deadline:
                break
            with self._lock:
                self._counts["retries"] += 1
            self._rest(wait)
        self._give_up(why)
        raise UnansweredError(f"{why} (after {tried} tries)")

    def _once(self, method: str, path: str, content: bytes | None, deadline: float, read: Callable[[Any], T]) -> T:
        import httpx2

        if self._closed.is_set():
            raise UnansweredError("the judge was closed")
        p, began = self.patience, self._clock()
        left = max(deadline - began, 0.01)
        timeout = httpx2.Timeout(min(p.read_s, left), connect=min(p.connect_s, left), pool=left)
        headers = {"Content-Type": "application/json"}
        try:
            with self._client.stream(
                method, self.url + path, content=content, headers=headers, timeout=timeout
            ) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    # each chunk may come within the read timeout and their sum never end
                    if self._clock() > deadline or len(data) > LARGEST_ANSWER:
                        raise _PassingError("an answer without end")
                status, asked = response.status_code, response.headers.get("Retry-After")
        except (httpx2.RequestError, OSError) as error:
            raise _PassingError(self._without_key(f"{type(error).__name__}: {error}")) from None
        except RuntimeError:  # what a client says that was closed meanwhile
            raise UnansweredError("the judge was closed") from None
        if status in PASSING or status >= 500:
            raise _PassingError(f"status {status}{self._said(data)}", _retry_after(asked, self._now()))
        if not 200 <= status < 300:
            remedy = REMEDIES.get(status, "check @url")
            raise RefusedError(f"judge {self.url}{path} gave status {status}{self._said(data)}; {remedy}", status)
        try:
            found = read(json.loads(data))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise _PassingError(f"an answer that cannot be read: {type(error).__name__}") from None
        with self._lock:
            self._seconds.append(self._clock() - began)
        return found

    def _answer_of(self, row: Any) -> Answer:
        choice = row["choices"][0]
        message, listed = choice["message"], (choice.get("logprobs") or {}).get("content") or []
        text = message["content"] if message.get("content") is not None else ""
        if not isinstance(text, str):
            raise TypeError("content that is no text")
        text = self._without_key(text)  # reasons are written down
        first: dict[str, float] = {}
        if listed:
            for entry in [*listed[0].get("top_logprobs", []), listed[0]]:
                # the sampled token stands in the list too: each token counts once
                first.setdefault(str(entry["token"]), _number(entry["logprob"]))
        usage = row.get("usage") or {}
        tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        with self._lock:
            for name, count in tokens.items():
                self._counts[name] += count
        return Answer(text, tuple(first.items()), str(choice.get("finish_reason") or ""), tokens)

    def _give_up(self, why: str) -> None:
        with self._lock:
            self._counts["unanswered"] += 1
            self._in_a_row += 1
            if self._in_a_row >= self.patience.breaker and self._broken is None:
                self._broken = (
                    f"judge {self.url} left {self._in_a_row} questions in a row unanswered, the last with: {why}; "
                    "see that it runs, or give it more time with @deadline_s, @attempts or less @concurrency"
                )
        self._stop_if_broken()

    def _stop_if_broken(self) -> None:
        if self._broken is not None:
            raise RewardError(self._broken)

    def _said(self, data: bytes | bytearray) -> str:
        """What an error's body says, in one short line."""
        text = bytes(data[:4096]).decode(errors="replace")
        try:
            row = json.loads(text)
            error = row.get("error", row)
            text = str(error.get("message", "") if isinstance(error, dict) else error)
        except (ValueError, AttributeError, RecursionError):
            pass
        text = " ".join(self._without_key(text).split())[:200]
        return f" ({text})" if text else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._key.get_secret_value(), "[key]") if self._key else text


def in_parallel(ask: Callable[[A], T], items: Sequence[A], width: int) -> list[T]:
    """`ask` of every item, `width` at a time; the first exception is raised and the rest left.

    Threads of our own, for those of a pool are waited for when the interpreter ends: a judge that hangs would
    hold a run that has already stopped.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    for k in range(len(items)):
        todo.put(k)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                k = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((k, ask(items[k]), None))
            except BaseException as error:
                done.put((k, None, error))

    for number in range(min(width, len(items))):
        threading.Thread(target=work, daemon=True, name=f"judge {number}").start()
    found: dict[int, T] = {}
    while len(found) < len(items):
        k, value, error = done.get()
        if error is not None:
            stop.set()
            raise error
        found[k] = value
    return [found[k] for k in range(len(items))]


def _checked_url(url: str) -> tuple[str, bool]:
    """The url without a slash at its end, and whether it is this machine's. Errors do not repeat its secrets."""
    import httpx2

    try:
        parts = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError):
        raise RewardError("reward 'vlm': @url cannot be read; write it as http://host:port/v1") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise RewardError("reward 'vlm': @url must begin with http:// or https://, e.g. http://localhost:8000/v1")
    if not re.fullmatch(r"[\w.:-]+", parts.host) or not 0 < (parts.port or 80) < 2**16:
        raise RewardError("reward 'vlm': @url has no host or port that can be; write it as http://host:port/v1")
    if parts.userinfo or parts.query or parts.fragment:
        raise RewardError(
            "reward 'vlm': @url must hold no user, password, query or fragment, for it is printed and logged; put "
            f"the key in {KEY_NAMES[0]}"
        )
    plain = str(parts).rstrip("/").removesuffix("/chat/completions")
    return plain, parts.host in ("localhost", "127.0.0.1", "::1")


def _retry_after(text: str | None, now: float) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; 0 when it has none or makes no sense."""
    if not text:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _number(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise ValueError("a log-probability that is no number")
    return number


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
