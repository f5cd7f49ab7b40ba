"""A reward that runs elsewhere: the client of `unigrpo rewards serve`. Protocol 1, docs/rewards.md."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput, Sample
from unigrpo_cli.errors import RewardError

PROTOCOL = 1
TOKEN_ENV = "UNIGRPO_REWARD_TOKEN"
AGAIN = (502, 503, 504)  # a proxy whose server is away, or a server that is stopping or full
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
CONNECT_S = 5.0
LARGEST_ANSWER = 64 * 2**20  # bytes; a score with its remarks is a few hundred


class RemoteOptions(Options):
    url: str = Field("", description="of the server, as `unigrpo rewards serve` prints it")
    token_file: str | None = Field(None, description=f"file with the server's token; default ${TOKEN_ENV}")
    deadline_s: float = Field(100.0, gt=0, description="seconds for one call, further tries included")


class RemoteReward:
    """A reward of another process or machine, served by `unigrpo rewards serve`; range and needs are its own."""

    name = "remote"
    summary = "a reward served elsewhere by `unigrpo rewards serve`"
    range = (-math.inf, math.inf)
    needs: frozenset[str] = frozenset()
    batch_size = None
    licence = "that of the reward served"
    Options = RemoteOptions

    def __init__(self, options: RemoteOptions):
        self.options = options
        if not options.url.startswith(("http://", "https://")):
            raise RewardError(
                f"reward remote: @url={options.url!r}; give the address that `unigrpo rewards serve` prints, e.g. "
                "remote@url=http://127.0.0.1:8700"
            )
        if "@" in options.url.partition("//")[2].partition("/")[0] or "?" in options.url or "#" in options.url:
            raise RewardError(
                "reward remote: @url must hold no user, password, query or fragment, for it is printed and logged; "
                f"put the token in {TOKEN_ENV} or a @token_file"
            )
        self.url = options.url.rstrip("/").removesuffix("/v1")

    def setup(self, context: RewardContext) -> None:
        """Ask the server what it serves.

        Raises:
            RewardError: when it wants another token or speaks another protocol.
            ConnectionError: when nobody answers.
        """
        import httpx2

        try:
            place = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise RewardError(f"reward remote: @url={self.url} cannot be read ({error})") from error
        if not re.fullmatch(r"[\w.:-]+", place.host) or not 0 < (place.port or 80) < 2**16:
            raise RewardError(
                f"reward remote: @url={self.url} has no host or port that can be; write it as http://host:port"
            )
        local = place.host in ("127.0.0.1", "::1", "localhost")
        self.token = self._token()
        self.client = httpx2.Client(
            headers={"Authorization": f"Bearer {self.token}"} if self.token else {},
            trust_env=not local,  # a proxy for the web cannot reach this machine's loopback
        )
        self.jitter = random.Random()  # of its own: waiting must not move the run's random numbers
        facts = self._ask("GET", "/v1/info")
        try:
            low, high = facts["range"]
            self.range = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
            self.name = str(facts["name"])
            self.needs = frozenset(map(str, facts["needs"]))
            self.sends = frozenset(map(str, facts["sends"]))
            self.scope = str(facts["scope"])
            self.unit = int(facts["batch_size"] or 1)
            # One that wants the whole rollout in one call must not be asked while it is still sampled.
            self.concurrency = 1 if facts["batch_size"] else 0
            self.max_bytes = int(facts["max_bytes"])
            self.higher_is_better = bool(facts["higher_is_better"])
            self.summary, self.licence = str(facts["summary"]), str(facts["licence"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._malformed(f"/v1/info: {type(error).__name__}: {error}") from error

    def check_metadata(self, metadata: list[Any]) -> None:
        """Let the server look at the prompts before anything is sampled."""
        rows = [dict(row) for row in metadata] if "metadata" in self.sends else [{} for _ in metadata]
        # what the policy thinks has been looked at here, by the same `needs`
        self._ask("POST", "/v1/check", {"metadata": rows, "has_reasoning": True})

    def score(self, batch: RewardBatch) -> RewardOutput:
        scores: list[Any] = []
        components: dict[str, list[Any]] = {}
        info: list[Any] = []
        for rows in self._requests(batch):
            body = {"samples": rows, "step": batch.step, "split": batch.split}
            answer = self._ask("POST", "/v1/score", body)
            parts = answer.get("components", {})
            remarks = answer.get("info") or [{}] * len(rows)
            shaped = isinstance(parts, dict) and (not scores or parts.keys() == components.keys())
            lists = [answer.get("scores"), remarks, *(parts.values() if shaped else [None])]
            if not all(isinstance(values, list) and len(values) == len(rows) for values in lists):
                raise self._malformed(f"not one score, component and remark for each of {len(rows)} samples")
            scores += answer["scores"]
            info += remarks
            for name, values in parts.items():
                components.setdefault(name, []).extend(values)
        return RewardOutput(scores, components, info)

    def teardown(self) -> None:
        self.client.close()

    def _requests(self, batch: RewardBatch) -> Iterator[list[dict[str, Any]]]:
        """The batch in as few requests as the server's limit allows, cut where the server would cut it anyway."""
        rows: list[dict[str, Any]] = []
        held = 0
        step = max(1, len(batch)) if self.scope == "group" else self.unit
        for at in range(0, len(batch), step):
            unit = [self._row(sample) for sample in batch.samples[at : at + step]]
            size = sum(len(json.dumps(row)) + 2 for row in unit)
            if size + 1024 > self.max_bytes:
                raise RewardError(
                    f"reward remote: {len(unit)} samples that belong together make {size} bytes, and {self.url} "
                    f"takes {self.max_bytes}; serve it with a larger --max-mb"
                )
            if rows and held + size + 1024 > self.max_bytes:
                yield rows
                rows, held = [], 0
            rows += unit
            held += size
        if rows:
            yield rows

    def _row(self, sample: Sample) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": sample.prompt, "id": sample.id, "group_id": sample.group_id}
        if "image" in self.sends:
            row["image"] = _png(sample)
        if "reasoning" in self.sends:
            row["reasoning"] = sample.reasoning
        if "metadata" in self.sends:
            row["metadata"] = dict(sample.metadata)
        return row

    def _token(self) -> str | None:
        """The token, one word: errors must say where it is from and never what it is."""
        where, token = TOKEN_ENV, os.environ.get(TOKEN_ENV, "").strip()
        if self.options.token_file is not None:
            where = f"@token_file={self.options.token_file}"
            try:
                with open(self.options.token_file, encoding="utf-8") as file:
                    token = file.read().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise RewardError(f"reward remote: {where}: {type(error).__name__}") from error
        if token and (not token.isascii() or not token.isprintable() or " " in token):
            raise RewardError(f"reward remote: the token of {where} is not one word of ASCII letters and signs")
        return token or None

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer; what may pass is tried again until the deadline.

        Raises:
            ConnectionError: when nobody answered in time; `reward.on_error` says what then.
            RuntimeError: when the reward itself failed there; the same.
            RewardError: on anything that another try would not mend.
        """
        import httpx2

        content = json.dumps({"protocol": PROTOCOL} | body, allow_nan=False).encode() if body is not None else None
        headers = {"Content-Type": "application/json"} if content is not None else {}
        until = time.monotonic() + self.options.deadline_s
        wait, tries = FIRST_WAIT_S, 0
        while True:
            tries += 1
            left = max(0.05, until - time.monotonic())
            limit = httpx2.Timeout(left, connect=min(CONNECT_S, left))
            try:
                with self.client.stream(
                    method, self.url + path, content=content, headers=headers, timeout=limit
                ) as response:
                    status, data = response.status_code, bytearray()
                    for chunk in response.iter_bytes():
                        data += chunk
                        if len(data) > LARGEST_ANSWER:
                            raise self._malformed(f"{path}: more than {LARGEST_ANSWER:,} bytes")
                        if time.monotonic() > until:  # each chunk may come in time and their sum never end
                            raise httpx2.ReadTimeout("an answer without end")
                if status not in AGAIN:
                    return self._read(path, status, data)
                trouble = f"HTTP {status}: {self._without_token(data[:200].decode(errors='replace'))}"
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
                raise RewardError(f"reward remote: @url={self.url} cannot be used ({type(error).__name__})") from error
            except httpx2.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            pause = wait * (0.5 + self.jitter.random() / 2)
            if time.monotonic() + pause >= until:
                raise ConnectionError(
                    f"{self.url} gave no answer in {tries} tries and {self.options.deadline_s:g} s ({trouble}); "
                    "start it with `unigrpo rewards serve`, or give it longer with @deadline_s="
                )
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _read(self, path: str, status: int, data: bytes | bytearray) -> dict[str, Any]:
        text = self._without_token(data.decode(errors="replace"))
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or "protocol" not in answer:
            raise self._malformed(f"{path}: HTTP {status}, {text[:80]!r}")
        if answer["protocol"] != PROTOCOL:
            raise RewardError(
                f"reward remote: {self.url} speaks protocol {answer['protocol']!r} and this unigrpo {PROTOCOL}; "
                "run the same version of unigrpo on both sides"
            )
        if status == 200:
            return answer
        said, kind = f"{self.url}: {answer.get('error')}", answer.get("kind")
        if kind == "failed":
            raise RuntimeError(said)
        remedy = {
            401: f"; set {TOKEN_ENV} or @token_file= to the token that the server was given",
            404: "; is @url= the address that `unigrpo rewards serve` printed?",
            413: "; serve it with a larger --max-mb",
        }.get(status, "" if kind == "needs" else "; try `unigrpo rewards test` beside the server")
        raise RewardError(f"reward remote: {said}{remedy}")

    def _without_token(self, text: str) -> str:
        return text.replace(self.token, "[token]") if self.token else text

    def _malformed(self, what: str) -> RewardError:
        return RewardError(
            f"reward remote: {self.url} did not answer as a reward server does ({what}); is @url= the address that "
            "`unigrpo rewards serve` printed, with the same version of unigrpo?"
        )


def _png(sample: Sample) -> str:
    """The pixels, bit for bit, as text; little compression, for the network is rarely the slow part."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sample.pixels).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
