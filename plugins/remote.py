"""The client of `unigrpo rewards serve`: a reward of another process or machine. Protocol 1, docs/rewards.md."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import time
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput, Sample
from unigrpo_cli.errors import RewardError
from unigrpo_plugins.http_client import AnswerTooLargeError, HttpClient, Limits, NoAnswerError, checked_url

PROTOCOL = 1
TOKEN_ENV = "UNIGRPO_REWARD_TOKEN"
RETRIED = (502, 503, 504)  # a proxy without its server, or a server that is stopping or full
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
CONNECT_S = 5.0
MAX_ANSWER_BYTES = 64 << 20  # a score with its info is a few hundred
EXAMPLE = "the address that `unigrpo rewards serve` prints, e.g. http://127.0.0.1:8700"


class RemoteOptions(Options):
    url: str = Field("", description="address of the server, as `unigrpo rewards serve` prints it")
    token_file: str | None = Field(None, description=f"file with the server's token; default ${TOKEN_ENV}")
    deadline_s: float = Field(100.0, gt=0, description="limit of seconds for one call with its retries")


class ServedFacts(BaseModel):
    """What `/v1/info` says of the served reward. Strict: the text "false" would count as true."""

    model_config = ConfigDict(strict=True)

    name: str
    summary: str
    licence: str
    range: tuple[float | None, float | None]
    needs: frozenset[str]
    sends: frozenset[str]
    segments: frozenset[str] = frozenset()
    scope: str
    batch_size: int | None
    higher_is_better: bool
    max_bytes: int
    max_pixels: int = 2**62


class RemoteReward:
    """A reward of another process or machine; range and needs are those of the served reward."""

    name = "remote"
    summary = "a reward of another process or machine, by `unigrpo rewards serve`"
    range = (-math.inf, math.inf)
    needs: frozenset[str] = frozenset()
    licence = "that of the served reward"
    Options = RemoteOptions

    def __init__(self, options: RemoteOptions):
        self.options = options
        address, self.local = checked_url("remote", options.url, EXAMPLE, f"{TOKEN_ENV} or a @token_file")
        self.url = address.removesuffix("/v1")

    def setup(self, context: RewardContext) -> None:
        """Ask the server what it serves.

        Raises:
            RewardError: when it wants another token or speaks another protocol.
            ConnectionError: without an answer.
        """
        self.token = self._token()
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self.client = HttpClient(self.url, local=self.local, headers=headers)
        self.jitter = random.Random()  # its own: waiting must not move the run's random numbers
        answer = self._ask("GET", "/v1/info")
        try:
            facts = ServedFacts.model_validate_json(json.dumps(answer))
        except ValidationError as error:
            first = error.errors()[0]
            raise self._malformed(f"/v1/info: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        low, high = facts.range
        self.range = (-math.inf if low is None else low, math.inf if high is None else high)
        self.name, self.summary, self.licence = facts.name, facts.summary, facts.licence
        self.needs, self.sends, self.segments = facts.needs, facts.sends, facts.segments
        self.scope, self.unit = facts.scope, facts.batch_size or 1
        # A reward that needs the whole rollout in one call cannot score a part of it early.
        self.concurrency = 1 if facts.batch_size else 0
        self.max_bytes, self.max_pixels = facts.max_bytes, facts.max_pixels
        self.higher_is_better = facts.higher_is_better

    def check_metadata(self, metadata: list[Any]) -> None:
        rows = [dict(row) for row in metadata] if "metadata" in self.sends else [{} for _ in metadata]
        # this side has checked the reasoning already, by the same `needs`
        self._ask("POST", "/v1/check", {"metadata": rows, "has_reasoning": True})

    def score(self, batch: RewardBatch) -> RewardOutput:
        scores: list[Any] = []
        components: dict[str, list[Any]] = {}
        info: list[Any] = []
        segments: list[Any] = []
        for rows in self._requests(batch):
            body = {"samples": rows, "step": batch.step, "split": batch.split}
            answer = self._ask("POST", "/v1/score", body)
            parts = answer.get("components", {})
            remarks = answer.get("info") or [{}] * len(rows)
            shaped = isinstance(parts, dict) and (not scores or parts.keys() == components.keys())
            lists = [answer.get("scores"), remarks, *(parts.values() if shaped else [None])]
            by_segment: Any = answer.get("segments") if self.segments else [{}] * len(rows)
            lists.append(by_segment)
            if not all(isinstance(values, list) and len(values) == len(rows) for values in lists):
                raise self._malformed(f"not one score, component and info row for each of {len(rows)} samples")
            scores += answer["scores"]
            info += remarks
            segments += by_segment
            for name, values in parts.items():
                components.setdefault(name, []).extend(values)
        return RewardOutput(scores, components, info, segments if self.segments else None)

    def teardown(self) -> None:
        self.client.close()

    def _requests(self, batch: RewardBatch) -> Iterator[list[dict[str, Any]]]:
        """The batch in as few requests as the server's limit allows, cut between the server's own batches."""
        rows: list[dict[str, Any]] = []
        held = pixels = 0
        step = max(1, len(batch)) if self.scope == "group" else self.unit
        for at in range(0, len(batch), step):
            unit = [self._row(sample) for sample in batch.samples[at : at + step]]
            size = sum(len(json.dumps(row)) + 2 for row in unit)
            if size + 1024 > self.max_bytes:
                raise RewardError(
                    f"reward 'remote': {len(unit)} samples that belong together make {size} bytes, and {self.url} "
                    f"takes {self.max_bytes}; serve it with a larger --max-mb"
                )
            shown = sum(self._shown(s) for s in batch.samples[at : at + step])
            if shown > self.max_pixels:
                raise RewardError(
                    f"reward 'remote': {len(unit)} samples that belong together have {shown} pixels, and {self.url} "
                    f"takes {self.max_pixels}; serve it with a larger --max-mb"
                )
            if rows and (held + size + 1024 > self.max_bytes or pixels + shown > self.max_pixels):
                yield rows
                rows, held, pixels = [], 0, 0
            rows += unit
            held += size
            pixels += shown
        if rows:
            yield rows

    def _shown(self, sample: Sample) -> int:
        """The pixels of a sample that are sent."""
        sent = [sample.pixels] if "image" in self.sends else []
        sent += [sample.source] if self.sends & {"source", "pictures"} and sample.source is not None else []
        sent += sample.pictures if "pictures" in self.sends else ()
        return sum(math.prod(pixels.shape[:2]) for pixels in sent)

    def _row(self, sample: Sample) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": sample.prompt, "id": sample.id, "group_id": sample.group_id}
        if "image" in self.sends:
            row["image"] = _png(sample.pixels)
        if self.sends & {"source", "pictures"} and sample.source is not None:
            row["source"] = _png(sample.source)
        if self.sends & {"texts", "pictures"}:
            row["segments"] = [self._segment(part) for part in sample.acted]
        if "reasoning" in self.sends:
            row["reasoning"] = sample.reasoning
        if "metadata" in self.sends:
            row["metadata"] = dict(sample.metadata)
        return row

    def _segment(self, part: Any) -> dict[str, str | None]:
        """A text or a picture of an episode; null for a picture that the reward does not read."""
        if isinstance(part, str):
            return {"text": part if "texts" in self.sends else ""}
        return {"image": _png(part) if "pictures" in self.sends else None}

    def _token(self) -> str | None:
        """The token, one word. Errors name its source and never show it."""
        where, token = TOKEN_ENV, os.environ.get(TOKEN_ENV, "").strip()
        if self.options.token_file is not None:
            where = f"@token_file={self.options.token_file}"
            try:
                with open(self.options.token_file, encoding="utf-8") as file:
                    token = file.read().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise RewardError(f"reward 'remote': {where}: {type(error).__name__}") from error
        if token and (not token.isascii() or not token.isprintable() or " " in token):
            raise RewardError(f"reward 'remote': the token of {where} is not one word of printable ASCII")
        return token or None

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer; faults that may pass are retried until the deadline.

        Raises:
            ConnectionError: without an answer in time; see `reward.on_error`.
            RuntimeError: when the served reward failed; see `reward.on_error`.
            RewardError: on a fault that a retry cannot change.
        """
        content = json.dumps({"protocol": PROTOCOL} | body, allow_nan=False).encode() if body is not None else None
        until = time.monotonic() + self.options.deadline_s
        wait, tries = FIRST_WAIT_S, 0
        while True:
            tries += 1
            left = max(0.05, until - time.monotonic())
            try:
                answer = self.client.request(method, path, content, Limits(left, CONNECT_S, left, MAX_ANSWER_BYTES))
                if answer.status not in RETRIED:
                    return self._read(path, answer.status, answer.body)
                failure = f"HTTP {answer.status}: {self._without_token(answer.body[:200].decode(errors='replace'))}"
            except AnswerTooLargeError as error:
                raise self._malformed(f"{path}: {error}") from None
            except NoAnswerError as error:
                failure = str(error)
            pause = wait * (0.5 + self.jitter.random() / 2)
            if time.monotonic() + pause >= until:
                raise ConnectionError(
                    f"{self.url} gave no answer in {tries} tries and {self.options.deadline_s:g} s ({failure}); "
                    "start it with `unigrpo rewards serve`, or set a larger @deadline_s"
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
                f"reward 'remote': {self.url} speaks protocol {answer['protocol']!r} and this unigrpo {PROTOCOL}; "
                "run the same version of unigrpo on both sides"
            )
        if status == 200:
            return answer
        message, kind = f"{self.url}: {answer.get('error')}", answer.get("kind")
        if kind == "failed":
            raise RuntimeError(message)
        remedy = {
            401: f"; set {TOKEN_ENV} or @token_file= to the token that the server was given",
            404: "; is @url= the address that `unigrpo rewards serve` printed?",
            413: "; serve it with a larger --max-mb",
        }.get(status, "" if kind == "needs" else "; try `unigrpo rewards test` on the server")
        raise RewardError(f"reward 'remote': {message}{remedy}")

    def _without_token(self, text: str) -> str:
        return text.replace(self.token, "[token]") if self.token else text

    def _malformed(self, what: str) -> RewardError:
        return RewardError(
            f"reward 'remote': {self.url} did not answer as a reward server does ({what}); is @url= the address that "
            "`unigrpo rewards serve` printed, with the same version of unigrpo?"
        )


def _png(pixels: Any) -> str:
    """The pixels as base64 PNG, lossless; little compression, because the network is rarely the slow part."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
