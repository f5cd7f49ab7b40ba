"""Client of a judge behind OpenAI's chat completions: retries, deadlines, errors. It never invents an answer.

Faults that may pass are retried: a busy or failing server, a lost connection, half an answer. A refusal is an error at
once. A question without an answer within its budget is `UnansweredError`; many in a row stop the run.
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic import SecretStr

from unigrpo_cli.errors import RewardError
from unigrpo_plugins.http_client import ClosedError, HttpClient, Limits, NoAnswerError, checked_url

A = TypeVar("A")
T = TypeVar("T")

KEY_NAMES = ("UNIGRPO_JUDGE_KEY", "OPENAI_API_KEY")
RETRIED = frozenset({408, 409, 425, 429})  # and every 5xx: the same request may succeed later
MAX_ANSWER_BYTES = 4 << 20  # an answer is a few kilobytes
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
    """Limits: seconds to connect and between two reads; seconds and tries of one question with its retries.

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
    """A judge's answer: text, the likeliest first tokens with their log-probabilities, and its finish reason.

    `call` counts tries, seconds and tokens. It is not cached.
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
    """No answer within the budget of one question; the text names the last failure."""


class StatusError(RewardError):
    """A status that a retry cannot change."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


class _PassingError(Exception):
    """A try whose failure may pass; `least_s` is the wait that the server asks for."""

    def __init__(self, why: str, least_s: float = 0.0):
        super().__init__(why)
        self.least_s = least_s


def key_from_environment() -> SecretStr | None:
    """The API key; no repr shows it."""
    for name in KEY_NAMES:
        key = os.environ.get(name, "").strip()
        if key:
            if not (key.isascii() and key.isprintable()):
                raise RewardError(f"{name} holds characters that a header cannot carry; set it again")
            return SecretStr(key)
    return None


class Endpoint:
    """One server. Threads may share it.

    Args:
        url: the address in front of `/chat/completions`.
        clock, now, rest, draw: monotonic seconds, seconds since 1970, waiting, a number in [0, 1) for the jitter.
        transport: of httpx2, for tests without a socket.
    """

    def __init__(
        self,
        url: str,
        key: SecretStr | None,
        patience: Patience = Patience(),
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        rest: Callable[[float], Any] | None = None,
        draw: Callable[[], float] | None = None,
        transport: Any = None,
    ):
        address, local = checked_url("vlm", url, "an address such as http://localhost:8000/v1", KEY_NAMES[0])
        self.url = address.removesuffix("/chat/completions")
        self.patience = patience
        self._key = key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._client = HttpClient(self.url, local=local, headers=headers, transport=transport, clock=clock)
        self._closed = threading.Event()
        # Jitter of its own: waiting must not move the run's random numbers.
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
        answer, tries = self._exchange("POST", "/chat/completions", body, self._answer_of)
        return replace(answer, call={"tries": tries, "seconds": self._clock() - began, **answer.call})

    def models(self) -> list[str]:
        """Ids of the served models; raises like `ask`."""
        return self._exchange("GET", "/models", None, lambda row: [str(model["id"]) for model in row["data"]])[0]

    def figures(self) -> dict[str, float]:
        """Counts so far, and median and 95th percentile of the seconds of an answer."""
        with self._lock:
            seconds = sorted(self._seconds)
            return {
                **self._counts,
                "latency_p50_s": _percentile(seconds, 0.50),
                "latency_p95_s": _percentile(seconds, 0.95),
            }

    def close(self) -> None:
        """Wake all threads that wait; their questions stay unanswered."""
        self._closed.set()
        self._client.close()

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T]
    ) -> tuple[T, int]:
        """What `read` makes of the answer, and the number of tries."""
        content = None if body is None else json.dumps(body).encode()
        p = self.patience
        deadline = self._clock() + p.deadline_s
        tries, why = 0, "the deadline had passed"
        while tries < p.attempts and self._clock() < deadline:
            self._stop_if_broken()
            tries += 1
            try:
                found = self._try(method, path, content, deadline, read)
            except _PassingError as passing:
                why, least = str(passing), passing.least_s
            else:
                with self._lock:
                    self._in_a_row = 0
                return found, tries
            if tries == p.attempts:
                break
            # Full jitter: requests that failed together must not return together.
            wait = max(least, self._draw() * min(p.backoff_most_s, p.backoff_s * 2 ** (tries - 1)))
            if self._clock() + wait >= deadline:
                break
            with self._lock:
                self._counts["retries"] += 1
            self._rest(wait)
        self._give_up(why)
        raise UnansweredError(f"{why} (after {tries} tries)")

    def _try(self, method: str, path: str, content: bytes | None, deadline: float, read: Callable[[Any], T]) -> T:
        p, began = self.patience, self._clock()
        try:
            limits = Limits(max(deadline - began, 0.01), p.connect_s, p.read_s, MAX_ANSWER_BYTES)
            answer = self._client.request(method, path, content, limits)
        except NoAnswerError as error:
            raise _PassingError(self._without_key(str(error))) from None
        except ClosedError:
            raise UnansweredError("the judge was closed") from None
        status, data = answer.status, answer.body
        if status in RETRIED or status >= 500:
            least = _retry_after(answer.headers.get("retry-after"), self._now())
            raise _PassingError(f"status {status}{self._message(data)}", least)
        if not 200 <= status < 300:
            remedy = REMEDIES.get(status, "check @url")
            raise StatusError(f"judge {self.url}{path} gave status {status}{self._message(data)}; {remedy}", status)
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
            raise TypeError("content is not text")
        text = self._without_key(text)  # reasons are saved
        first: dict[str, float] = {}
        if listed:
            for entry in [*listed[0].get("top_logprobs", []), listed[0]]:
                # the sampled token is in the list too; each token counts once
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
                    "check that it runs, or set a larger @deadline_s or @attempts, or a smaller @concurrency"
                )
        self._stop_if_broken()

    def _stop_if_broken(self) -> None:
        if self._broken is not None:
            raise RewardError(self._broken)

    def _message(self, data: bytes | bytearray) -> str:
        """The message of an error's body, as one short line."""
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
    """`ask` of every item, `width` at a time. The first exception is raised at once.

    Daemon threads: the interpreter waits for those of a thread pool, so a judge that hangs would hold a stopped run.
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


def _retry_after(text: str | None, now: float) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 without one or when it cannot be parsed."""
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
        raise ValueError("a log-probability is NaN")
    return number


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
