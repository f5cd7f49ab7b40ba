"""Requests to a judge on a clock of their own: retries, waits, deadlines, refusals. No failure becomes an answer."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import httpx2
import pytest

from unigrpo_cli.errors import RewardError
from unigrpo_plugins.judge_client import Endpoint, Patience, StatusError, UnansweredError, in_parallel
from unigrpo_plugins.judge_endpoint import find_model
from unigrpo_plugins.judge_modes import YesNoOdds


class Clock:
    def __init__(self) -> None:
        self.at = 0.0
        self.rests: list[float] = []

    def __call__(self) -> float:
        return self.at

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.at += seconds


def answering(text: str = "Yes", first: tuple = (("Yes", -0.1), ("No", -2.4))) -> dict:
    listed = [{"token": t, "logprob": p, "bytes": None} for t, p in first]
    logprobs = {"content": [{**listed[0], "top_logprobs": listed}]}
    choice = {"message": {"role": "assistant", "content": text}, "logprobs": logprobs, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


def endpoint_of(answers: list, clock: Clock, **facts: Any) -> tuple[Endpoint, list[httpx2.Request]]:
    """An endpoint that gives these answers in turn (responses, JSON or exceptions), and the requests it got."""
    seen: list[httpx2.Request] = []

    def give(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        answer = answers[min(len(seen), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return httpx2.Response(200, json=answer) if isinstance(answer, dict) else answer

    options = {"clock": clock, "rest": clock.rest, "now": lambda: 1e9, "draw": lambda: 1.0} | facts
    patience = options.pop("patience", Patience())
    return Endpoint("http://localhost/v1", None, patience, transport=httpx2.MockTransport(give), **options), seen


def test_waits_double_under_full_jitter() -> None:
    clock, draws = Clock(), iter([1.0, 0.5, 0.0, 1.0])
    patience = Patience(attempts=5, backoff_s=1.0, backoff_most_s=6.0)
    endpoint, seen = endpoint_of([httpx2.Response(500)], clock, patience=patience, draw=lambda: next(draws))
    with pytest.raises(UnansweredError, match=r"status 500 \(after 5 tries\)"):
        endpoint.ask({})
    assert clock.rests == [1.0, 1.0, 0.0, 6.0]
    assert len(seen) == 5


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "wait"),
    [("7", 7.0), ("0", 0.5), (formatdate(1e9 + 9, usegmt=True), 9.0), (formatdate(1e9 - 9, usegmt=True), 0.5)]
    + [("soon", 0.5), ("-3", 0.5), ("nan", 0.5)],
)
def test_retry_after(status: int, header: str, wait: float) -> None:
    clock = Clock()
    endpoint, _ = endpoint_of([httpx2.Response(status, headers={"Retry-After": header}), answering()], clock)
    assert endpoint.ask({}).text == "Yes"
    assert clock.rests == [wait]


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    clock = Clock()
    endpoint, seen = endpoint_of([httpx2.Response(503, headers={"Retry-After": "3600"})], clock)
    with pytest.raises(UnansweredError):
        endpoint.ask({})
    assert (clock.rests, len(seen)) == ([], 1)


def test_an_answer_that_drips_ends_at_the_deadline() -> None:
    clock = Clock()

    def drip() -> Iterator[bytes]:
        while True:
            clock.at += 10
            yield b" "

    endpoint, seen = endpoint_of([httpx2.Response(200, content=drip())], clock, patience=Patience(deadline_s=45))
    with pytest.raises(UnansweredError, match="without end"):
        endpoint.ask({})
    assert (clock.at, len(seen)) == (50, 1)


@pytest.mark.parametrize(
    "passing",
    [httpx2.Response(status) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)]
    + [httpx2.Response(200, content=b'{"choices": [{"mess'), httpx2.Response(200, content=b"<html>")]
    + [{"choices": []}, {"error": "late"}, answering(text=["no", "text"])]  # type: ignore[arg-type]
    + [httpx2.Response(200, content=json.dumps(answering(first=(("Yes", math.nan),))))]
    + [httpx2.ConnectError("refused"), httpx2.ReadError("reset"), httpx2.ReadTimeout("slow")]
    + [httpx2.RemoteProtocolError("half"), httpx2.ConnectTimeout("slow"), httpx2.PoolTimeout("full")],
    ids=lambda p: str(getattr(p, "status_code", None) or type(p).__name__),
)
def test_faults_that_may_pass_are_retried(passing: Any) -> None:
    endpoint, seen = endpoint_of([passing, answering()], Clock())
    assert endpoint.ask({}).text == "Yes"
    assert len(seen) == 2
    assert endpoint.figures()["retries"] == 1


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(400, "@mode=auto"), (401, "UNIGRPO_JUDGE_KEY"), (403, "UNIGRPO_JUDGE_KEY"), (404, "@model"), (422, "@mode=auto")]
    + [(413, "too large"), (402, "credit"), (301, "@url"), (418, "@url")],
)
def test_refusals_are_not_retried(status: int, remedy: str) -> None:
    endpoint, seen = endpoint_of([httpx2.Response(status, json={"error": {"message": "no such\nthing"}})], Clock())
    with pytest.raises(StatusError, match=rf"status {status} \(no such thing\); .*{remedy}") as caught:
        endpoint.ask({})
    assert (caught.value.exit_code, caught.value.status, len(seen)) == (3, status, 1)


def test_timeouts_stay_within_the_deadline() -> None:
    patience = Patience(connect_s=3, read_s=40, deadline_s=50, attempts=2, backoff_s=30, backoff_most_s=30)
    endpoint, seen = endpoint_of([httpx2.ReadTimeout("slow"), answering()], Clock(), patience=patience)
    endpoint.ask({})
    limits = [request.extensions["timeout"] for request in seen]
    assert [(t["connect"], t["read"]) for t in limits] == [(3, 40), (3, 20)]


def test_only_failures_in_a_row_stop_a_run() -> None:
    bad, good = httpx2.Response(500), answering()
    patience = Patience(attempts=1, breaker=2)
    endpoint, _ = endpoint_of([bad, good, bad, good, bad, bad], Clock(), patience=patience)
    for error in (UnansweredError, None, UnansweredError, None, UnansweredError, RewardError, RewardError):
        if error is None:
            endpoint.ask({})
        else:
            with pytest.raises(error):
                endpoint.ask({})


def test_which_model() -> None:
    def among(*answers: Any, model: str | None = None) -> str:
        return find_model(endpoint_of(list(answers), Clock())[0], model)

    assert among({"data": [{"id": "only"}]}) == "only"
    assert among({"data": [{"id": "a"}, {"id": "b"}]}, model="c") == "c"
    assert among(httpx2.Response(404), model="c") == "c", "not every server lists its models"
    with pytest.raises(RewardError, match=r"serves 2 models: a, b; choose with @model"):
        among({"data": [{"id": "b"}, {"id": "a"}]})
    with pytest.raises(RewardError, match="status 404"):
        among(httpx2.Response(404))
    with pytest.raises(RewardError, match=r"status 401.*UNIGRPO_JUDGE_KEY"):
        among(httpx2.Response(401), model="c")


def test_the_sampled_token_counts_once_and_counts_when_it_is_not_listed() -> None:
    row = answering(first=(("Yes", math.log(0.6)), ("No", math.log(0.3))))
    assert YesNoOdds().read(endpoint_of([row], Clock())[0].ask({})).value == pytest.approx(2 / 3)
    row["choices"][0]["logprobs"]["content"][0] |= {"token": " yes", "logprob": math.log(0.1)}
    assert YesNoOdds().read(endpoint_of([row], Clock())[0].ask({})).value == pytest.approx(0.7)


def test_the_first_error_does_not_wait_for_slow_questions() -> None:
    gate = threading.Event()

    def ask(k: int) -> int:
        if k == 1:
            raise RewardError("gone")
        return gate.wait(30) or k

    began = time.perf_counter()
    with pytest.raises(RewardError, match="gone"):
        in_parallel(ask, range(4), 2)
    assert time.perf_counter() - began < 5
    gate.set()
    assert in_parallel(lambda k: k * k, range(20), 7) == [k * k for k in range(20)]
