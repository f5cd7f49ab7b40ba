"""One reward of a run: its setup, its calls with a deadline, and the checks of its answers.

A failure never becomes a number. A wrong count stops the run. An exception stops the run, or abstains with
`reward.on_error=abstain`. NaN and None abstain. A call that does not return in time stops the run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from unigrpo_cli.errors import RewardError, suggest
from unigrpo_cli.io.json import to_json
from unigrpo_cli.io.secrets import from_environment, names_secret
from unigrpo_cli.parallel.workers import Worker
from unigrpo_cli.rewards.batch import (
    SEGMENT_KINDS,
    Names,
    RewardBatch,
    RewardContext,
    RewardOutput,
    RewardResult,
    abstained,
    numbers_of,
    segment_scores,
)
from unigrpo_cli.rewards.function import Options
from unigrpo_cli.rewards.registry import Plugins, RewardEntry, WorkingDirectory, message_of
from unigrpo_cli.rewards.spec import RewardSpec

SMALLEST_SPREAD = 1e-5
"""Ten times what is added to a group's deviation before it divides (`algo.advantage.EPS`)."""
STANDING = re.compile(r"abstained|spread|(round|text|image)_\d+")
"""Metrics of every reward, `reward/NAME/...`, which no component may replace."""
RECENT = 512
"""Samples over which the share of abstentions is taken."""

Call = tuple[list[Names], Future]
"""A call of `score` under way, with the names of each sample's segments."""


class FailedCallError(RewardError):
    """An exception in a reward's own code: the kind that `reward.on_error` covers."""


@dataclass(frozen=True)
class RewardLimits:
    """How strictly rewards are run; see the `reward` section of the configuration."""

    timeout_s: float | None = 120.0  # None: no limit
    setup_timeout_s: float = 1800.0
    max_abstain: float = 0.25
    on_error: str = "raise"
    strict: bool = False
    offload: bool = False


DEFAULT_LIMITS = RewardLimits()


@dataclass(frozen=True)
class RewardIdentity:
    """What decides a reward's scores, as far as it can be named.

    Args:
        address: `origin/name (module:class)`.
        version: of its distribution; for a loose file the first digits of its sha256.
        options: as given.
    """

    alias: str
    address: str
    version: str
    options: dict[str, Any]
    weight: float
    range: list[float]


@dataclass
class LoadedReward:
    """A reward of a run, with a thread of its own for all its calls."""

    spec: RewardSpec
    entry: RewardEntry
    reward: Any
    limits: RewardLimits
    range: tuple[float, float] = (-math.inf, math.inf)
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Whether it abstained, for each of the last samples."""

    def __post_init__(self) -> None:
        self.worker = Worker(f"reward {self.alias}")
        self._directory = WorkingDirectory()
        self._read_declarations()
        self._warned: set[str] = set()

    @property
    def alias(self) -> str:
        return self.spec.alias

    @property
    def label(self) -> str:
        return f"reward {self.alias!r} ({self.entry.address})"

    @property
    def sign(self) -> int:
        """-1 where lower scores are better."""
        return 1 if getattr(self.reward, "higher_is_better", True) else -1

    @property
    def is_remote(self) -> bool:
        """Whether it mostly waits for another machine: calling it early costs this machine nothing."""
        return int(getattr(self.reward, "concurrency", 0) or 0) > 0

    @property
    def scores_alone(self) -> bool:
        """Whether each sample is scored by itself, not against the others of its group."""
        return getattr(self.reward, "scope", "sample") == "sample"

    @property
    def segments(self) -> frozenset[str]:
        """Kinds of segments that the reward scores by themselves; empty for a reward of whole episodes."""
        return frozenset(self._declared("segments", ()))

    def begins_early(self, overlap: str) -> bool:
        """Whether it may be given a part of a rollout while the rest is sampled.

        `auto`: remote rewards. `all`: also local ones with a batch size; one without gets the whole rollout in one
        call. Rewards that compare a group never begin early.
        """
        if overlap == "none" or not self.scores_alone:
            return False
        return self.is_remote or (overlap == "all" and getattr(self.reward, "batch_size", None) is not None)

    def identity(self) -> RewardIdentity:
        """What later tells this reward from another; options and range as JSON has them."""
        kind = type(self.reward)
        return RewardIdentity(
            alias=self.alias,
            address=f"{self.entry.address} ({kind.__module__}:{kind.__qualname__})",
            version=_version_of(self.entry.version, self.reward),
            options=json.loads(json.dumps(self.spec.options, default=str)),
            weight=self.spec.weight,
            range=list(self.range),
        )

    # ----- calls

    def setup(self, context: RewardContext) -> None:
        """Load what it needs. Some rewards learn their range here, e.g. from a server."""
        if hasattr(self.reward, "setup"):
            self.call("setup", context)
            self._read_declarations()

    def teardown(self) -> None:
        if hasattr(self.reward, "teardown") and not self.worker.hung:
            self.call("teardown")

    def call(self, method: str, *arguments: Any) -> Any:
        if hasattr(self.reward, method):
            return self._wait(self._start(getattr(self.reward, method), *arguments), method)
        return None

    def submit(self, batch: RewardBatch) -> list[Call]:
        """Start scoring a batch, in pieces of the reward's batch size, without waiting."""
        size = getattr(self.reward, "batch_size", None)
        if size is not None and (type(size) is not int or size < 1):
            raise RewardError(f"{self.label} has batch_size = {size!r}; give None or a whole number above 0")
        own = replace(batch, samples=tuple(replace(s, metadata=copy.deepcopy(s.metadata)) for s in batch.samples))
        step = size or max(1, len(own))
        pieces = [own[at : at + step] for at in range(0, len(own), step)]
        return [([s.names for s in piece.samples], self._start(self.reward.score, piece)) for piece in pieces]

    def collect(self, calls: Sequence[Call]) -> RewardResult:
        """The checked answers of submitted calls."""
        answers = [(self._wait(call, "score", names), names) for names, call in calls]
        return RewardResult.join([self._checked(answer, names) for answer, names in answers])

    def raw_score(self, batch: RewardBatch) -> Any:
        """The unchecked answer of `score`, or its exception, returned."""
        call = self._start(self.reward.score, batch)
        error = call.exception()
        return call.result() if error is None else error

    def close(self) -> None:
        self._directory.release()
        self.worker.close()

    def _start(self, function: Callable[..., Any], *arguments: Any) -> Future:
        def call() -> Any:
            with self._directory.entered():
                return function(*arguments)

        return self.worker.submit(call)

    def _wait(self, call: Future, what: str, names: list[Names] | None = None) -> Any:
        """The answer of a call; for a failed scoring of samples with these segments that may abstain, NaN."""
        option = "setup_timeout_s" if what == "setup" else "timeout_s"
        limit = getattr(self.limits, option)
        try:
            error = self.worker.wait(call, limit)
        except TimeoutError:
            raise RewardError(
                f"{self.label} gave no answer in {what} within {limit:g} s; raise reward.{option} if it is only slow"
            ) from None
        if error is None:
            return call.result()
        if isinstance(error, RewardError):
            raise error
        if names is not None and self.limits.on_error == "abstain":
            return abstained(names, self.segments)
        remedy = (
            f"try it alone with `unigrpo rewards test {self.spec.name}`, "
            "or let failures abstain with --set reward.on_error=abstain"
            if what == "score"
            else f"see `unigrpo rewards info {self.spec.name}`"
        )
        raise FailedCallError(f"{self.label} failed in {what}: {message_of(error)}; {remedy}") from error

    # ----- answers

    def _checked(self, answer: Any, names: list[Names]) -> RewardResult:
        """An answer as a result, for samples with segments of these names."""
        try:
            return self._read(answer, names)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"{self.label} gave an answer that cannot be read: {message_of(error)}; "
                "it must give one number per sample, or a RewardOutput"
            ) from error

    def _read(self, answer: Any, names: list[Names]) -> RewardResult:
        count = len(names)
        output = answer if isinstance(answer, RewardOutput) else RewardOutput(answer)
        scores = numbers_of(output.scores, count, f"{self.label} gave")
        valid = np.isfinite(scores)
        components = {
            self._component_name(name): numbers_of(values, count, f"{self.label} component {name!r} has")
            for name, values in output.components.items()
        }
        rows = list(output.info or ()) or [{}] * count
        if len(rows) != count:
            raise RewardError(f"{self.label} gave {len(rows)} info rows for {count} samples")
        info = [json.loads(to_json(dict(row))) if row else {} for row in rows]
        self._check_range(scores[valid])
        segments = segment_scores(output.segments, names, self.segments, self.label)
        self._check_range(np.array([x for row in segments for x in row.values() if x == x]))
        return RewardResult(np.where(valid, scores, math.nan), valid, components, info, segments)

    def _component_name(self, name: Any) -> str:
        if not isinstance(name, str) or not name.isprintable() or not name.strip():
            raise RewardError(f"{self.label} has a component named {name!r}; give it a printable text as its name")
        if STANDING.fullmatch(name):
            raise RewardError(
                f"{self.label} has a component named {name!r}, but reward/{self.alias}/{name} is the metric of all "
                "rewards; choose another name"
            )
        return name

    def _check_range(self, scores: NDArray[np.float64]) -> None:
        low, high = self.range
        outside = scores[(scores < low - 1e-6) | (scores > high + 1e-6)]
        if not len(outside):
            return
        worst = outside[np.abs(outside - np.clip(outside, low, high)).argmax()]
        message = f"{self.label} gave {worst:g}, outside its declared range [{low:g}, {high:g}]"
        if self.limits.strict:
            raise RewardError(f"{message}; fix the reward or its range")
        self.warn_once("range", message)

    def check_spread(self, scores_PG: NDArray[np.float64], factor: float) -> None:
        """Warn once when scores, times `factor`, differ inside groups but by too little to become an advantage."""
        known_PG = scores_PG[np.isfinite(scores_PG).any(axis=1)]
        spread = float((np.nanmax(known_PG, axis=1) - np.nanmin(known_PG, axis=1)).max()) if len(known_PG) else 0.0
        if 0 < spread * factor < SMALLEST_SPREAD:
            self.warn_once(
                "spread",
                f"{self.label}: scores inside a group differ by at most {spread:.2g} (weight {self.spec.weight:g}), "
                "too little for an advantage; rescale the reward or set advantage.combine=rank",
            )

    def warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    def record_abstentions(self, valid: NDArray[np.bool_]) -> None:
        self.recent.extend((~valid).tolist())
        share = sum(self.recent) / max(len(self.recent), 1)
        if share > self.limits.max_abstain:
            raise RewardError(
                f"{self.label} abstained (NaN) on {share:.0%} of the last {len(self.recent)} samples, more than "
                f"reward.max_abstain={self.limits.max_abstain:g}; try it with `unigrpo rewards test {self.spec.name}`"
            )

    def _read_declarations(self) -> None:
        """Check what the reward declares of itself, and take its range; without one, all numbers."""
        higher, scope = self._declared("higher_is_better", True), self._declared("scope", "sample")
        if not isinstance(higher, bool):
            self._refuse("higher_is_better", higher, "True or False")
        if scope not in ("sample", "group"):
            self._refuse("scope", scope, '"sample" or "group"')
        concurrency = self._declared("concurrency", None)
        if concurrency is not None and (type(concurrency) is not int or concurrency < 0):
            self._refuse("concurrency", concurrency, "None or a whole number")
        needs = self._declared("needs", ())
        if not isinstance(needs, set | frozenset | list | tuple) or not all(isinstance(n, str) for n in needs):
            self._refuse("needs", needs, 'a set of texts, e.g. {"image"}')
        segments = self._declared("segments", ())
        if not isinstance(segments, set | frozenset | list | tuple) or not set(segments) <= set(SEGMENT_KINDS):
            self._refuse("segments", segments, 'kinds of segments that it scores, e.g. {"text"}; kinds: text, image')
        declared = self._declared("range", (-math.inf, math.inf))
        try:
            low, high = map(float, declared)
        except (TypeError, ValueError):
            low, high = math.nan, math.nan
        if isinstance(declared, str) or not low <= high:
            self._refuse("range", declared, "two numbers, (low, high)")
        self.range = (low, high)

    def _declared(self, name: str, default: Any) -> Any:
        return getattr(self.reward, name, default)

    def _refuse(self, name: str, value: Any, accepted: str) -> NoReturn:
        raise RewardError(f"{self.label} declares {name} = {value!r}; give {accepted}")


def load_reward(spec: RewardSpec, plugins: Plugins, limits: RewardLimits) -> LoadedReward:
    entry, reward = make_reward(spec, plugins)
    return LoadedReward(spec, entry, reward, limits)


def make_reward(spec: RewardSpec, plugins: Plugins) -> tuple[RewardEntry, Any]:
    """Find a reward's class and construct it with its validated options."""
    entry = plugins.rewards.find(spec.name)
    factory = entry.factory()
    accepted: type[BaseModel] = getattr(factory, "Options", Options)
    for key in spec.options:
        if key not in accepted.model_fields:
            fields = accepted.model_fields
            raise RewardError(f"reward {spec.alias!r} has no option {key!r}: {suggest(key, fields)}")
    given = _with_secrets(spec, accepted)
    try:
        options = accepted.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        secret = given != spec.options  # pydantic's own error shows values, so that one is not chained
        shown = "" if secret else f"={first['input']!r}"
        said = first["msg"][:1].lower() + first["msg"][1:]
        raise RewardError(
            f"reward {spec.alias!r}: option {key}{shown}: {said}; see `unigrpo rewards info {spec.name}`"
        ) from (None if secret else error)
    try:
        with WorkingDirectory().entered():
            return entry, factory(options)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {spec.alias!r} ({entry.address}) cannot be made: {message_of(error)}") from error


def _with_secrets(spec: RewardSpec, accepted: type[BaseModel]) -> dict[str, Any]:
    """The options as the reward gets them: `env:NAME` replaced where an option is a secret, by name or by type."""
    options = dict(spec.options)
    for key, value in options.items():
        secret = names_secret(key) or "SecretStr" in str(accepted.model_fields[key].annotation)
        if secret and value is not None:
            try:
                options[key] = from_environment(str(value))
            except ValueError as error:
                raise RewardError(f"reward {spec.alias!r}: option {key}: {error}") from None
    return options


def _version_of(version: str, reward: Any) -> str:
    """A distribution's version; without one, a hash of the reward's file."""
    file = getattr(sys.modules.get(type(reward).__module__), "__file__", None)
    if version != "-" or file is None:
        return version
    return "sha256:" + hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
