"""A reward served over HTTP: the same scores to the bit, a guarded door, and no failure that becomes a number."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tests.commands import Process, command_line
from unigrpo_cli import RewardContext, RewardOutput, Sample, reward
from unigrpo_cli.errors import RewardError, UsageError
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.rewards.conformance import example_samples
from unigrpo_cli.rewards.http import HttpError, RewardServer, columns_sent, read_samples
from unigrpo_cli.rewards.loaded import RewardLimits
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import parse_rewards
from unigrpo_plugins import remote

CONTEXT = RewardContext(device="cpu", seed=0, embedded=False, offline=True)
LENIENT = RewardLimits(max_abstain=1.0)
ABSTAIN = RewardLimits(on_error="abstain", max_abstain=1.0)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.02)


def _plugins(*factories: object) -> Plugins:
    plugins = Plugins()
    plugins.load()
    for factory in factories:
        plugins.rewards.add(getattr(factory, "__unigrpo_reward__", factory).name, factory)
    return plugins


@contextmanager
def _served(text: str, *factories: object, policy: RewardLimits = LENIENT, **how: Any) -> Iterator[RewardServer]:
    """A server of a reward in a thread; `how` goes to RewardServer."""
    server = RewardServer("127.0.0.1", how.pop("port", 0), **how)
    with Scorer(parse_rewards([text]), _plugins(*factories), CONTEXT, policy) as rewards:
        server.listen(rewards, "1.0")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.close()


@contextmanager
def _remote(url: str, policy: RewardLimits = LENIENT, **options: Any) -> Iterator[Scorer]:
    (choice,) = parse_rewards(["remote"])
    choice.options.update({"url": url, "deadline_s": 20.0} | options)
    with Scorer([choice], _plugins(), CONTEXT, policy) as rewards:
        yield rewards


def _ask(rewards: Scorer, samples: list[Sample], **how: Any) -> RewardResult:
    (scored,) = rewards.score(samples, **how).values()
    return scored


def _local(text: str, samples: list[Sample], *factories: object, **how: Any) -> RewardResult:
    with Scorer(parse_rewards([text]), _plugins(*factories), CONTEXT, LENIENT) as rewards:
        return _ask(rewards, samples, **how)


@reward("everything", range=(-5, 5), batch_size=3)
def everything(pixels, prompts, reasoning, metadata, ids, group_ids, step, split, gain=1.0):
    """Depends on every bit of every column, abstains now and then, and on its place in a batch of three."""
    scores: list[float | None] = []
    for k, image in enumerate(pixels):
        text = f"{prompts[k]}{reasoning[k]}{json.dumps(dict(metadata[k]))}{ids[k]}{group_ids[k]}{step}{split}{k}"
        digest = int(np.random.default_rng([*text.encode(), *image.tobytes()]).integers(2**53))
        scores.append(None if digest % 4 == 0 else gain * digest / 2**53)
    parts = {"third": [None if s is None else s / 3 for s in scores]}
    return RewardOutput(scores, parts, [{"reason": f"because {s}"} for s in scores])


# ----- the same


@pytest.mark.parametrize("text", ["geneval", "clip@model=embedded", "plan", "everything@gain=0.7"])
def test_served_and_local_scores_are_equal_to_the_bit(text: str) -> None:
    samples = example_samples(8)
    for how in ({"step": 3, "split": "train"}, {"split": "eval"}):
        here = _local(text, samples, everything, **how)
        with _served(text, everything) as server, _remote(server.url) as rewards:
            there = _ask(rewards, samples, **how)
        assert np.array_equal(here.scores, there.scores, equal_nan=True)
        assert here.components.keys() == there.components.keys()
        for name, values in here.components.items():
            assert np.array_equal(values, there.components[name], equal_nan=True)
        assert here.info == there.info
    assert text != "everything@gain=0.7" or 0 < (~there.valid).sum() < 8, "some abstain, and stay NaN"


@pytest.mark.parametrize("limit", [17_000, 23_000, 30_000])
def test_a_small_request_limit_cuts_requests_and_changes_nothing(limit: int) -> None:
    samples = example_samples(8)
    here = _local("everything", samples, everything)
    with _served("everything", everything, max_bytes=limit) as server:
        counted = server.score
        sizes: list[int] = []

        def score(body: Any) -> Any:
            sizes.append(len(body["samples"]))
            return counted(body)

        server.score = score  # type: ignore[method-assign]
        with _remote(server.url) as rewards:
            assert np.array_equal(_ask(rewards, samples).scores, here.scores, equal_nan=True)
    assert len(sizes) > 1
    assert all(size % 3 == 0 for size in sizes[:-1]), "cut between the reward's own batches"


def test_range_needs_and_direction_are_the_servers() -> None:
    class Cost:
        name, range, needs, higher_is_better = "cost", (2.0, math.inf), frozenset({"metadata:include"}), False

        def __init__(self, options):
            pass

        def score(self, batch):
            return [3.0] * len(batch)

    with _served("cost", Cost) as server, _remote(server.url) as rewards:
        assert rewards.ranges == {"remote": (2.0, math.inf)}
        assert rewards.weights == {"remote": -1.0}
        assert rewards.rewards[0].reward.name == "cost"
        with pytest.raises(RewardError, match="needs metadata 'include'"):
            rewards.check_needs([{}], has_reasoning=True, has_source=False, split="train")


def test_the_server_looks_at_prompts_before_anything_is_sampled() -> None:
    """`geneval` refuses classes that its detector cannot see, from afar too."""
    row = {"prompt": "an airplane", "tag": "single_object", "include": [{"class": "airplane", "count": 1}]}
    with _served("geneval") as server, _remote(server.url) as rewards:
        rewards.check_needs(
            [s.metadata for s in example_samples(4)], has_reasoning=True, has_source=False, split="train"
        )
        with pytest.raises(RewardError, match="airplane"):
            rewards.check_needs([row], has_reasoning=True, has_source=False, split="train")


def test_what_is_sent_is_what_is_needed() -> None:
    @reward("wordy")
    def wordy(prompts):
        return [float(len(p)) for p in prompts]

    class Undeclared:
        def score(self, batch):
            return []

    with _served("wordy", wordy) as server:
        seen: list[dict] = []
        score = server.score
        server.score = lambda body: seen.append(body) or score(body)  # type: ignore[method-assign,func-returns-value]
        with _remote(server.url) as rewards:
            _ask(rewards, example_samples(2))
    assert set(seen[0]["samples"][0]) == {"prompt", "id", "group_id"}
    assert columns_sent(Undeclared()) == ["image", "reasoning", "texts", "pictures", "source", "metadata"]


def test_a_group_reward_is_sent_whole_or_not_at_all() -> None:
    class Ranked:
        name, range, needs, scope = "ranked", (0.0, 1.0), frozenset({"image"}), "group"

        def __init__(self, options):
            pass

        def score(self, batch):
            return [k / len(batch) for k in range(len(batch))]

    with _served("ranked", Ranked) as server, _remote(server.url) as rewards:
        assert _ask(rewards, example_samples(8)).scores.tolist() == [k / 8 for k in range(8)]
    with _served("ranked", Ranked, max_bytes=10_000) as server, _remote(server.url) as rewards:
        with pytest.raises(RewardError, match=r"8 samples that belong together .* larger --max-mb"):
            _ask(rewards, example_samples(8))


# ----- the door


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNIGRPO_REWARD_TOKEN", raising=False)
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("s3cret\n")
    bad.write_text("s3cres\n")
    samples = example_samples(2)
    with _served("geneval", token="s3cret") as server:
        with _remote(server.url, token_file=str(good)) as rewards:
            assert _ask(rewards, samples).valid.all()
        for options in ({"token_file": str(bad)}, {}):
            with pytest.raises(RewardError, match=r"needs a token.*UNIGRPO_REWARD_TOKEN or @token_file="):
                with _remote(server.url, **options):
                    pass
        with pytest.raises(RewardError, match="nowhere"), _remote(server.url, token_file="nowhere"):
            pass
        monkeypatch.setenv("UNIGRPO_REWARD_TOKEN", "s3cret")
        with _remote(server.url) as rewards:
            assert _ask(rewards, samples).valid.all()
        for path in ("/v1/score", "/v1/check"):
            assert httpx2.post(server.url + path, json={"protocol": 1}, trust_env=False).status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1", "example.org", "::"])
def test_no_address_but_our_own_without_a_token(host: str) -> None:
    with pytest.raises(UsageError, match=r"reached from other machines: give a --token-file"):
        RewardServer(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_our_own_addresses_need_none(host: str) -> None:
    RewardServer(host, 0).server_close()


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="give another --host or --port"):
            RewardServer("127.0.0.1", other.getsockname()[1])


def _png(size: tuple[int, int] = (4, 4), mode: str = "RGB", kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


SAMPLE = {"prompt": "a red circle", "image": _png(), "metadata": {"include": [{"class": "circle", "count": 1}]}}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"protocol": 2, "samples": []}, 400, "has protocol 1, the request 2"),
        ({"samples": []}, 400, "protocol"),
        ([], 400, "JSON object"),
        ({"protocol": 1}, 400, "`samples` must be a list"),
        ({"protocol": 1, "samples": [{}]}, 400, "samples[0] must be an object with a text `prompt`"),
        ({"protocol": 1, "samples": [SAMPLE | {"image": "%%%"}]}, 400, "not a base64 PNG"),
        ({"protocol": 1, "samples": [SAMPLE | {"image": 7}]}, 400, "not a base64 PNG"),
        ({"protocol": 1, "samples": [SAMPLE | {"image": _png(kind="BMP")}]}, 400, "not a base64 PNG"),
        ({"protocol": 1, "samples": [SAMPLE | {"image": _png(mode="L")}]}, 400, "send RGB"),
        ({"protocol": 1, "samples": [SAMPLE | {"image": _png((9000, 9000), "1")}]}, 413, "more than 25000 pixels"),
        (
            {"protocol": 1, "samples": [SAMPLE | {"image": _png((120, 120))}] * 2},
            413,
            "samples[1]: the request has more",
        ),
        ({"protocol": 1, "samples": [SAMPLE] * 3 + [SAMPLE | {"image": _png((160, 160))}]}, 413, "samples[3]"),
        ({"protocol": 1, "samples": [SAMPLE | {"metadata": [1]}]}, 400, "`metadata` an object"),
        ({"protocol": 1, "samples": [SAMPLE], "split": "test"}, 400, "`split`"),
        ({"protocol": 1, "samples": [SAMPLE, SAMPLE | {"prompt": "x" * 60_000}]}, 413, "see --max-mb"),
        ({"protocol": 1, "samples": [SAMPLE | {"metadata": {"include": [math.nan]}}]}, 400, "not JSON"),
    ],
)
def test_what_the_server_refuses(body: Any, status: int, says: str) -> None:
    with _served("geneval", max_bytes=50_000) as server:
        content, head = json.dumps(body), {"Content-Type": "application/json"}
        answer = httpx2.post(f"{server.url}/v1/score", content=content, headers=head, trust_env=False)
        assert (answer.status_code, says in answer.json()["error"]) == (status, True), answer.text
        good = {"protocol": 1, "samples": [SAMPLE]}
        assert httpx2.post(f"{server.url}/v1/score", json=good, trust_env=False).json()["scores"] == [0.0]


def test_pictures_are_counted_before_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve small files of 8000 x 8000 took 14 GB."""
    decoded: list[Any] = []
    monkeypatch.setattr(PngImageFile, "load", lambda self: decoded.append(self.size))
    many = {"samples": [SAMPLE] * 8 + [SAMPLE | {"image": _png((8000, 8000), "1")}] * 12}
    with pytest.raises(HttpError, match=r"samples\[9\].*pixels"):
        read_samples(many, 64 * 2**20)
    assert decoded == []


def test_a_client_cuts_its_requests_by_pixels() -> None:
    """Eight pictures of 48 x 48 where a request may have five."""
    sizes: list[int] = []

    @reward("shade", batch_size=2)
    def shade(images, batch):
        sizes.append(len(images))
        return [image.getpixel((0, 0))[0] / 255 for image in images]

    samples = example_samples(8)
    with _served("shade", shade, max_bytes=5 * 48 * 48 * 2) as server, _remote(server.url) as rewards:
        assert _ask(rewards, samples).scores.tolist() == _local("shade", samples, shade).scores.tolist()
        assert server.max_pixels == 5 * 48 * 48


def _raw(server: RewardServer, *headers: str, body: str = "") -> int:
    """The status of a request that is written header by header."""
    method, path = ("POST", "/v1/score") if body else ("GET", "/v1/info")
    with socket.create_connection(server.server_address[:2]) as wire:
        head = "\r\n".join([f"{method} {path} HTTP/1.1", "Connection: close", *headers])
        wire.sendall(f"{head}\r\n\r\n{body}".encode())
        return int(wire.makefile("rb").readline().split()[1])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Host: 127.0.0.1"], 200),
        (["Host: localhost:9000"], 200),  # a tunnel
        (["Host: LOCALHOST."], 200),
        (["Host: [::1]:80"], 200),
        (["Host: evil.example"], 403),
        (["Host: evil.example:80"], 403),
        (["Host: 127.0.0.1.evil.example"], 403),
        (["Host: 127.0.0.1@evil.example"], 403),
        (["Host: "], 403),
        ([], 403),
        (["Host: 127.0.0.1", "Origin: http://localhost:9000"], 200),
        (["Host: 127.0.0.1", "Origin: https://evil.example"], 403),
        (["Host: 127.0.0.1", "Origin: null"], 403),
        (["Host: 127.0.0.1", "Host: evil.example"], 400),
    ],
)
def test_without_a_token_web_pages_are_refused(headers: list[str], status: int) -> None:
    """A page whose name resolves to 127.0.0.1 (DNS rebinding) sends that name as Host."""
    with _served("geneval") as server:
        assert _raw(server, *headers) == status


def test_with_a_token_the_name_does_not_matter() -> None:
    with _served("geneval", token="s3cret") as server:
        assert _raw(server, "Host: judge.example", "Authorization: Bearer s3cret") == 200
        assert _raw(server, "Host: judge.example", "Authorization: Bearer no", "Authorization: Bearer s3cret") == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Content-Length: 2", "Content-Length: 2"], 400),
        (["Content-Length: 2", "content-length: 9"], 400),
        (["Content-Length: 2, 2"], 411),
        (["Content-Length: +2"], 411),
        (["Content-Length: 2", "Transfer-Encoding: chunked"], 411),
        (["Content-Length: 2", "Content-Type: text/plain"], 400),
    ],
)
def test_requests_of_ambiguous_length_or_type_are_refused(headers: list[str], status: int) -> None:
    with _served("geneval") as server:
        assert _raw(server, "Host: localhost", "Content-Type: application/json", *headers, body="{}") == status


def test_requests_that_are_no_json_requests() -> None:
    with _served("geneval") as server, httpx2.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/v2/info").status_code == 404
        assert client.post("/v1/score", content=b"{", headers={"Content-Type": "text/plain"}).status_code == 415
        head = {"Content-Type": "application/json"}
        assert client.post("/v1/score", content=b"{no", headers=head).status_code == 400
        assert client.post("/v1/score", content=iter([b"{}"]), headers=head).status_code == 411  # chunked
        assert client.post("/v1/score", content=b"[" * 100_000, headers=head).status_code == 400
        assert client.get("/v1/info").json()["name"] == "geneval", "and the server lives on"


def test_a_refused_giant_hears_why() -> None:
    """The refusal of a body that is still being sent must arrive, not a reset connection."""
    with _served("geneval", max_bytes=1000) as server:
        head = {"Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
        connection.request("POST", "/v1/score", b" " * 2**24, head)  # which raises where a reset overtakes it
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["kind"]) == (413, "size")
        connection.close()


# ----- failing


def test_one_scoring_at_a_time_and_waiting_for_it_is_no_timeout() -> None:
    busy, most = [], []

    @reward("slow")
    def slow(prompts):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.08)
        busy.pop()
        return [float(len(p)) for p in prompts]

    with _served("slow", slow, policy=RewardLimits(timeout_s=0.4)) as server:
        found: dict[int, Any] = {}

        def post(k: int) -> None:
            body = {"protocol": 1, "samples": [{"prompt": "x" * k}]}
            found[k] = httpx2.post(f"{server.url}/v1/score", json=body, trust_env=False, timeout=60).json()

        threads = [threading.Thread(target=post, args=(k,)) for k in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1] * 8
    assert {k: answer.get("scores") for k, answer in found.items()} == {k: [float(k)] for k in range(1, 9)}


def test_a_server_that_goes_and_comes_back() -> None:
    samples = example_samples(4)
    with _served("geneval") as server:
        port = server.server_address[1]
        rewards_open = _remote(server.url)
        rewards = rewards_open.__enter__()
        before = _ask(rewards, samples)

    def return_later() -> None:
        time.sleep(0.15)
        with _served("geneval", port=port):
            done.wait(20)

    done = threading.Event()
    thread = threading.Thread(target=return_later)
    thread.start()
    try:
        assert np.array_equal(_ask(rewards, samples).scores, before.scores)
    finally:
        done.set()
        thread.join()
        rewards_open.__exit__(None, None, None)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_what_passes_is_tried_again(status: int) -> None:
    with _served("geneval") as server:
        tries: Counter[str] = Counter()

        def proxy(path: str, body: bytes | None) -> tuple[int, bytes]:
            """One whose server is away for the first two tries of each call."""
            tries[path] += 1
            if tries[path] <= 2:
                return status, b"<html>away</html>"
            head = {"Content-Type": "application/json"}
            method = "GET" if body is None else "POST"
            answer = httpx2.request(method, server.url + path, content=body, headers=head, trust_env=False)
            return answer.status_code, answer.content

        with _answering(proxy) as url, _remote(url) as rewards:
            assert _ask(rewards, example_samples(2)).valid.all()
    assert tries == {"/v1/info": 3, "/v1/score": 3}


def test_a_dead_server_stops_the_run_or_abstains_and_is_never_zero() -> None:
    for policy in (RewardLimits(), ABSTAIN):
        with _served("geneval") as server:
            opened = _remote(server.url, policy, deadline_s=0.3)
            rewards = opened.__enter__()
        if policy is ABSTAIN:
            scored = _ask(rewards, example_samples(4))
            assert not scored.valid.any()
            assert np.isnan(scored.scores).all()
        else:
            with pytest.raises(RewardError, match=r"gave no answer in \d+ tries and 0.3 s.*rewards serve"):
                _ask(rewards, example_samples(4))
        opened.__exit__(None, None, None)


def test_a_reward_that_fails_there_fails_as_it_would_here() -> None:
    @reward("broken")
    def broken(prompts):
        raise ValueError("no judge today")

    @reward("short")
    def short(prompts):
        return [1.0]

    samples = example_samples(4)
    with _served("broken", broken) as server:
        with _remote(server.url) as rewards, pytest.raises(RewardError, match=r"no judge today.*on_error=abstain"):
            _ask(rewards, samples)
        with _remote(server.url, ABSTAIN) as rewards:
            assert not _ask(rewards, samples).valid.any()
    with _served("short", short) as server, _remote(server.url, ABSTAIN) as rewards:
        with pytest.raises(RewardError, match="1 scores for 4 samples"):
            _ask(rewards, samples)


def test_a_reward_that_hangs_ends_its_server() -> None:
    @reward("stuck")
    def stuck(prompts):
        time.sleep(60)

    with _served("stuck", stuck, policy=RewardLimits(timeout_s=0.2)) as server, _remote(server.url) as rewards:
        with pytest.raises(RewardError, match=r"no answer in score within 0\.2 s"):
            _ask(rewards, example_samples(2))
        assert "stuck" in server.lost


# ----- servers of another kind


@contextmanager
def _answering(answer: Any) -> Iterator[str]:
    """A server that answers as told: `answer(path, body)` gives a status and a content."""

    class Told(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            status, content = answer(self.path, self.rfile.read(length) if length else None)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Told)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


INFO = {
    "protocol": 1,
    "name": "told",
    "summary": "",
    "licence": "",
    "range": [0, 1],
    "needs": [],
    "sends": [],
    "scope": "sample",
    "batch_size": None,
    "higher_is_better": True,
    "max_bytes": 10**6,
}


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (b"hello", "did not answer as a reward server does"),
        (b"[1]", "did not answer as a reward server does"),
        (b"\xff\xfe", "did not answer as a reward server does"),
        (
            json.dumps(INFO | {"protocol": 2}).encode(),
            r"speaks protocol 2 and this unigrpo 1; run the same version",
        ),
        (json.dumps({k: v for k, v in INFO.items() if k != "needs"}).encode(), "did not answer.*needs"),
        (json.dumps(INFO | {"range": 3}).encode(), "did not answer"),
        (json.dumps(INFO | {"range": ["a", "b"]}).encode(), "did not answer"),
        (json.dumps(INFO | {"range": [1, 0]}).encode(), "declares range"),
        (json.dumps(INFO | {"range": ["0", "1"]}).encode(), "did not answer.*range"),
        (json.dumps(INFO | {"higher_is_better": "false"}).encode(), "did not answer.*higher_is_better"),
        (json.dumps(INFO | {"higher_is_better": 0}).encode(), "did not answer.*higher_is_better"),
        (json.dumps(INFO | {"needs": "image"}).encode(), "did not answer.*needs"),
        (json.dumps(INFO | {"sends": ["image", 1]}).encode(), "did not answer.*sends"),
        (json.dumps(INFO | {"batch_size": True}).encode(), "did not answer.*batch_size"),
        (json.dumps(INFO | {"scope": "batch"}).encode(), "declares scope = 'batch'"),
    ],
)
def test_information_that_is_none(info: bytes, says: str) -> None:
    with _answering(lambda path, body: (200, info)) as url:
        with pytest.raises(RewardError, match=says), _remote(url):
            pass


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"scores": [1.0]}, "not one score, component and info row for each of 2"),
        ({"scores": 1.0}, "not one score"),
        ({}, "not one score"),
        ({"scores": [1.0, 1.0], "components": {"part": [1.0]}}, "not one score"),
        ({"scores": [1.0, 1.0], "components": [1]}, "not one score"),
        ({"scores": [1.0, 1.0], "info": [{}]}, "not one score"),
        ({"scores": ["a", "b"]}, "the text 'a'"),
        ({"scores": [[1.0], [1.0]]}, r"shape \[2, 1\]"),
        ({"scores": [1.0, 1.0], "info": [1, 2]}, "cannot be read"),
        ({"protocol": 3, "scores": [1.0, 1.0]}, "speaks protocol 3"),
    ],
)
def test_malformed_scores_stop_whatever_the_policy(answer: dict, says: str) -> None:
    content = json.dumps({"protocol": 1} | answer).encode()
    with _answering(lambda path, body: (200, json.dumps(INFO).encode() if body is None else content)) as url:
        with _remote(url, ABSTAIN) as rewards, pytest.raises(RewardError, match=says):
            _ask(rewards, example_samples(2))


def test_an_address_that_cannot_be_used_says_where_to_find_it() -> None:
    with (
        pytest.raises(RewardError, match=r"give the address that `unigrpo rewards serve` prints"),
        _remote("127.0.0.1:80"),
    ):
        pass


# ----- the command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_where_and_ends_when_told(number: signal.Signals, tmp_path: Path) -> None:
    """A process of its own: one line, scores, 0 on SIGTERM and on Ctrl-C."""
    said = tmp_path / "said"
    command = ("rewards", "serve", "plan")
    process = Process(command_line, *command, stdout=said, UNIGRPO_REWARD_TOKEN="abc")
    while process.code is None and not (said.is_file() and said.read_text().endswith("\n")):
        time.sleep(0.01)
    line = said.read_text()
    assert line.startswith("serving plan (unigrpo-cli/plan "), line
    url = line.split()[-1]
    assert httpx2.get(f"{url}/v1/info", trust_env=False).status_code == 401
    process.send(number)
    assert process.ended(30) == (0, line, "")


@pytest.mark.parametrize("token", ["two words", "a\nb", "schlüssel"])
def test_a_token_that_cannot_be_sent_is_not_repeated(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from unigrpo_plugins.remote import RemoteReward

    monkeypatch.setenv("UNIGRPO_REWARD_TOKEN", token)
    reward = RemoteReward(RemoteReward.Options(url="http://127.0.0.1:9"))
    with pytest.raises(RewardError, match="UNIGRPO_REWARD_TOKEN is not one word") as caught:
        reward.setup(RewardContext("cpu", 0, False, True))
    assert token not in str(caught.value)
