"""Run rewards over samples: set up, call, check, and never let a failure become a number.

A wrong shape always stops. An exception stops the run, naming reward and remedy, or abstains where the user
chose so. NaN and None abstain. A call that does not come back in time stops. Nothing becomes 0.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from unigrpo_cli.errors import RewardError, suggest
from unigrpo_cli.io.json import to_json
from unigrpo_cli.io.secrets import from_environment, names_secret
from unigrpo_cli.parallel.workers import Worker
from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardOutput, Sample
from unigrpo_cli.rewards.function import Options
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.spec import RewardSpec

RECENT = 512  # samples over which the share of abstentions is taken


@dataclass(frozen=True)
class RewardResult:
    """One reward's answer for B samples: fp64 scores (NaN where it abstained), validity, parts, remarks."""

    scores: NDArray[np.float64]
    valid: NDArray[np.bool_]
    components: dict[str, NDArray[np.float64]]
    info: list[dict[str, Any]]

    @property
    def mean(self) -> float | None:
        """Mean over valid samples; None when there is none."""
        return float(self.scores[self.valid].mean()) if self.valid.any() else None


class FailedCallError(RewardError):
    """An exception of a reward's own code, which `reward.on_error` is about; broken promises always stop."""


@dataclass
class LoadedReward:
    """A reward that is set up for a run."""

    choice: RewardSpec
    address: str
    reward: Any
    range: tuple[float, float]
    worker: Worker
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))
    warned_range: bool = False

    @property
    def alias(self) -> str:
        return self.choice.alias


@dataclass(frozen=True)
class RewardIdentity:
    """What decides a reward's scores, as far as it can be named.

    Args:
        address: `origin/name (module:class)`.
        version: of its distribution; of a loose file the beginning of its sha256.
        options: as given.
    """

    alias: str
    address: str
    version: str
    options: dict[str, Any]
    weight: float
    range: list[float]


@dataclass(frozen=True)
class Policy:
    """How strictly rewards are run; see the `reward` section of the configuration."""

    timeout_s: float | None = 120.0  # None waits for ever
    setup_timeout_s: float = 1800.0
    max_abstain: float = 0.25
    on_error: str = "raise"
    strict: bool = False
    offload: bool = False


class RewardSet:
    """The rewards of one run. Use as a context manager: leaving it tears them down."""

    def __init__(
        self,
        choices: Sequence[RewardSpec],
        plugins: Plugins,
        context: RewardContext,
        policy: Policy = Policy(),
        *,
        on_first: bool = False,
        here: bool = True,
    ):
        """Find, configure and set up every reward.

        Args:
            on_first: of several processes the first judges for all.
            here: set them up; False for a process that leaves judging to the first and only knows their names.

        Raises:
            RewardError: on an unknown reward, a wrong option, or a failing setup.
        """
        self.plugins, self.context, self.policy = plugins, context, policy
        self.on_first, self.here = on_first, here
        self._resting = False
        self.rewards: list[LoadedReward] = []
        made = [(choice, *_construct(choice, plugins)) for choice in choices]
        try:
            for choice, address, reward in made:
                opened = LoadedReward(
                    choice, address, reward, _range_of(choice, reward), Worker(f"reward {choice.alias}")
                )
                if here and hasattr(reward, "setup"):
                    self._call(opened, partial(reward.setup, context), "setup")
                    opened.range = _range_of(choice, reward)  # some learn it there, e.g. from a server
                self.rewards.append(opened)
                if here:
                    plugins.call("unigrpo_reward_setup", name=choice.alias, reward=reward, context=context)
        except BaseException:
            self.__exit__(None)
            raise

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Tear down all but those left hanging; what goes wrong now is a warning. After an error nobody waits for
        judgements that have not begun.
        """
        opened_rewards, self.rewards = self.rewards, []
        for opened in opened_rewards:
            if kind is not None:
                opened.worker.cancel_queued()
            for close in (self._say_farewell, self._tear_down) if self.here else ():
                try:
                    close(opened)
                except RewardError as error:  # the work is done: said, not raised
                    warnings.warn(str(error), stacklevel=2)
            opened.worker.close()

    def _say_farewell(self, opened: LoadedReward) -> None:
        self.plugins.call("unigrpo_reward_teardown", name=opened.alias, reward=opened.reward)

    def _tear_down(self, opened: LoadedReward) -> None:
        if hasattr(opened.reward, "teardown") and not opened.worker.hung:
            self._call(opened, opened.reward.teardown, "teardown")

    @property
    def weights(self) -> dict[str, float]:
        """Weight in training by alias, its sign flipped for rewards where lower is better."""
        return {
            r.alias: r.choice.weight * (1 if getattr(r.reward, "higher_is_better", True) else -1)
            for r in self.asked("train")
        }

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Declared range by alias, of the rewards asked in training."""
        return {r.alias: r.range for r in self.asked("train")}

    def declare(self, ranges: Sequence[tuple[float, float]]) -> None:
        """Take over ranges that were learnt where the rewards are set up."""
        for opened, (low, high) in zip(self.rewards, ranges, strict=True):
            opened.range = (low, high)

    def identities(self) -> tuple[RewardIdentity, ...]:
        """Which rewards these are, to be told from others later; options and ranges as JSON has them."""
        return tuple(
            RewardIdentity(
                alias=r.alias,
                address=f"{r.address} ({type(r.reward).__module__}:{type(r.reward).__qualname__})",
                version=_version_of(self.plugins.rewards.find(r.choice.name).version, r.reward),
                options=json.loads(json.dumps(r.choice.options, default=str)),
                weight=r.choice.weight,
                range=list(r.range),
            )
            for r in self.rewards
        )

    def recent(self) -> dict[str, list[bool]]:
        """Which of the last samples each reward abstained on, by alias."""
        return {r.alias: list(r.recent) for r in self.rewards}

    def remember(self, recent: dict[str, list[bool]]) -> None:
        """The same, as an earlier process left it; rewards that it did not have begin with nothing."""
        for opened in self.rewards:
            opened.recent.extend(recent.get(opened.alias, ()))

    def asked(self, split: str) -> list[LoadedReward]:
        """The rewards that are asked in "train" or "eval"."""
        return [r for r in self.rewards if split == "eval" or not r.choice.eval_only]

    def check_needs(self, metadata: Sequence[Any], *, has_reasoning: bool, split: str) -> None:
        """Before sampling: does every prompt carry what the rewards of a split need?

        Raises:
            RewardError: naming the reward, what it lacks and for how many prompts.
        """
        for opened in self.asked(split):
            for need in sorted(getattr(opened.reward, "needs", ())):
                kind, _, key = need.partition(":")
                if kind == "metadata":
                    lacking = [m for m in metadata if key not in m]
                    if lacking:
                        raise RewardError(
                            f"reward {opened.alias!r} needs metadata {key!r}, which {len(lacking)} of "
                            f"{len(metadata)} prompts lack; give a .jsonl file with it in every row"
                        )
                elif kind == "reasoning" and not has_reasoning:
                    raise RewardError(
                        f"reward {opened.alias!r} needs reasoning, but the policy does not think "
                        "(sampling.think is false)"
                    )
            if self.here and hasattr(opened.reward, "check_metadata"):
                self._call(opened, partial(opened.reward.check_metadata, metadata), "check_metadata")

    def score(
        self, samples: Sequence[Sample], *, step: int = 0, split: str = "train", watched: bool = True
    ) -> dict[str, RewardResult]:
        """Scores of every reward that is asked in this split, by alias. Those that wait for others wait together.

        Args:
            watched: False leaves it to the caller to `watch`, when it has the scores of all ranks.

        Raises:
            RewardError: when a reward fails, breaks its contract or abstains too often.
        """
        batch = self.prepare(samples, step=step, split=split)
        asked = self.asked(split)
        waiting = {r.alias: self.submit(r, batch) for r in asked if waits_elsewhere(r)}
        results = {r.alias: self.collect(r, waiting.get(r.alias) or self.submit(r, batch)) for r in asked}
        if watched:
            self.watch({alias: scored.valid for alias, scored in results.items()})
        self.announce(batch, results)
        self.rest(self.rewards)
        return results

    def prepare(self, samples: Sequence[Sample], *, step: int, split: str) -> RewardBatch:
        """Samples as rewards get them, after whoever changes them by hook."""
        self.wake()
        batch = RewardBatch(tuple(samples), step, split, self.context.device)
        changed = self.plugins.call("unigrpo_before_score", batch=batch)
        if changed is None:
            return batch
        if not isinstance(changed, RewardBatch) or len(changed) != len(batch):
            raise RewardError(f"unigrpo_before_score must give a RewardBatch of the same {len(batch)} samples")
        return changed

    def announce(self, batch: RewardBatch, results: dict[str, RewardResult]) -> None:
        """Tell observers."""
        for alias, scored in results.items():
            try:
                self.plugins.call("unigrpo_after_score", name=alias, batch=batch, scored=scored)
            except RewardError as error:  # an observer's fault is not the run's
                warnings.warn(str(error), stacklevel=2)

    def rest(self, those: Sequence[LoadedReward]) -> None:
        """Give the device back until the next scoring where that is asked for."""
        if self.policy.offload:
            self._resting = True
            for opened in those:
                if hasattr(opened.reward, "offload"):
                    self._call(opened, opened.reward.offload, "offload")
            self.context.shared.move("cpu")

    def wake(self) -> None:
        """Bring what rests in host memory back to the device."""
        if not self._resting:
            return
        self._resting = False
        self.context.shared.move(self.context.device)
        for opened in self.rewards:
            if hasattr(opened.reward, "reload"):
                self._call(opened, opened.reward.reload, "reload")

    def submit(self, opened: LoadedReward, batch: RewardBatch) -> list[tuple[int, Future]]:
        """Hand a batch to a reward in pieces of its size, without waiting: how many samples, and the call."""
        batch = replace(batch, samples=tuple(map(_for_one_reward, batch.samples)))
        size = _batch_size_of(opened) or len(batch) or 1  # without samples nobody is asked
        pieces = [batch[at : at + size] for at in range(0, len(batch), size)]
        return [(len(p), opened.worker.submit(partial(opened.reward.score, p))) for p in pieces]

    def collect(self, opened: LoadedReward, calls: Sequence[tuple[int, Future]]) -> RewardResult:
        """What a reward said of the batches it was handed, checked.

        Raises:
            RewardError: when it failed or broke its contract.
        """
        return _join([self._read(opened, self._wait(opened, call, "score", n), n) for n, call in calls])

    def _call(self, opened: LoadedReward, function: Callable[[], Any], what: str) -> Any:
        return self._wait(opened, opened.worker.submit(function), what)

    def _wait(self, opened: LoadedReward, call: Future, what: str, count: int | None = None) -> Any:
        """The answer of a call into a plugin, with a deadline.

        Raises:
            RewardError: naming the reward and what to do, when it fails or does not come back.
        """
        where = f"reward {opened.alias!r} ({opened.address})"
        limit = "setup_timeout_s" if what == "setup" else "timeout_s"
        try:
            error = opened.worker.wait(call, getattr(self.policy, limit))
        except TimeoutError:
            raise RewardError(
                f"{where} gave no answer in {what} within {getattr(self.policy, limit):g} s; "
                f"raise reward.{limit} if it is only slow"
            ) from None
        if error is None:
            return call.result()
        if isinstance(error, RewardError):
            raise error
        if count is not None and self.policy.on_error == "abstain":
            return [math.nan] * count
        remedy = (
            f"try it alone with `unigrpo rewards test {opened.choice.name}`, "
            "or let failures abstain with --set reward.on_error=abstain"
            if what == "score"
            else f"see `unigrpo rewards info {opened.choice.name}`"
        )
        raise FailedCallError(f"{where} failed in {what}: {type(error).__name__}: {error}; {remedy}") from error

    def _read(self, opened: LoadedReward, result: Any, count: int) -> RewardResult:
        """A reward's answer, whatever it is: what cannot be read is the reward's fault, by name."""
        try:
            return self._checked(opened, result, count)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {opened.alias!r} ({opened.address}) gave an answer that cannot be read: "
                f"{type(error).__name__}: {error}; it must give one number per sample, or a RewardOutput"
            ) from error

    def _checked(self, opened: LoadedReward, result: Any, count: int) -> RewardResult:
        """A reward's answer as `Scored`.

        Raises:
            RewardError: when it is not one number per sample.
        """
        where = f"reward {opened.alias!r} ({opened.address})"
        output = result if isinstance(result, RewardOutput) else RewardOutput(result)
        scores = _numbers(output.scores, count, f"{where} gave")
        valid = np.isfinite(scores)
        components = {
            name: _numbers(values, count, f"{where} component {name!r} has")
            for name, values in output.components.items()
        }
        info = [json.loads(to_json(dict(row))) for row in output.info or [{} for _ in range(count)]]
        if len(info) != count:
            raise RewardError(f"{where} gave {len(info)} info rows for {count} samples")
        low, high = opened.range
        outside = scores[valid & ((scores < low - 1e-6) | (scores > high + 1e-6))]
        if len(outside):
            worst = outside[np.abs(outside - np.clip(outside, low, high)).argmax()]
            message = f"{where} gave {worst:g}, outside its declared range [{low:g}, {high:g}]"
            if self.policy.strict:
                raise RewardError(f"{message}; mend the reward or its range")
            if not opened.warned_range:
                opened.warned_range = True
                warnings.warn(message, stacklevel=2)
        return RewardResult(np.where(valid, scores, math.nan), valid, components, info)

    def watch(self, valid: Mapping[str, NDArray[np.bool_]]) -> None:
        """Count on which samples rewards abstained, by alias; ranks count each other's too, so all stop as one.

        Raises:
            RewardError: when one abstained too often.
        """
        for opened in self.rewards:
            opened.recent.extend((~valid.get(opened.alias, np.ones(0, dtype=bool))).tolist())
            share = sum(opened.recent) / max(len(opened.recent), 1)
            if opened.alias in valid and share > self.policy.max_abstain:
                raise RewardError(
                    f"reward {opened.alias!r} ({opened.address}) abstained (NaN) on {share:.0%} of the last "
                    f"{len(opened.recent)} samples, more than reward.max_abstain={self.policy.max_abstain:g}; "
                    f"look into it with `unigrpo rewards test {opened.choice.name}`"
                )


def waits_elsewhere(opened: LoadedReward) -> bool:
    """Whether a reward mostly waits for another machine, so that it costs nothing to ask it early."""
    return int(getattr(opened.reward, "concurrency", 0) or 0) > 0


def _construct(choice: RewardSpec, plugins: Plugins) -> tuple[str, Any]:
    """Find a reward's class and make it with its validated options."""
    entry = plugins.rewards.find(choice.name)
    factory = entry.factory()
    accepted: type[BaseModel] = getattr(factory, "Options", Options)
    for key in choice.options:
        if key not in accepted.model_fields:
            fields = accepted.model_fields
            raise RewardError(f"reward {choice.alias!r} has no option {key!r}: {suggest(key, fields)}")
    given = _with_secrets(choice, accepted)
    try:
        options = accepted.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        secret = given != choice.options  # pydantic's own error shows values, so that one is left behind
        shown = "" if secret else f"={first['input']!r}"
        said = first["msg"][:1].lower() + first["msg"][1:]
        raise RewardError(
            f"reward {choice.alias!r}: option {key}{shown}: {said}; see `unigrpo rewards info {choice.name}`"
        ) from (None if secret else error)
    try:
        return entry.address, factory(options)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {choice.alias!r} ({entry.address}) cannot be made: {error!r}") from error


def _with_secrets(choice: RewardSpec, accepted: type[BaseModel]) -> dict[str, Any]:
    """The options as the reward gets them: `env:NAME` replaced where an option is a secret, by name or by type.

    Raises:
        RewardError: when one is written out, or its variable is not set.
    """
    options = dict(choice.options)
    for key, value in options.items():
        secret = names_secret(key) or "SecretStr" in str(accepted.model_fields[key].annotation)
        if secret and value is not None:
            try:
                options[key] = from_environment(str(value))
            except ValueError as error:
                raise RewardError(f"reward {choice.alias!r}: option {key}: {error}") from None
    return options


def _for_one_reward(sample: Sample) -> Sample:
    """A sample that a reward cannot spoil for others: metadata of its own, pixels that refuse to be written."""
    pixels = sample.pixels.view()
    pixels.setflags(write=False)
    return replace(sample, pixels=pixels, metadata=copy.deepcopy(sample.metadata))


def _range_of(choice: RewardSpec, reward: Any) -> tuple[float, float]:
    """The declared range; none declared is the whole line."""
    declared = getattr(reward, "range", (-math.inf, math.inf))
    try:
        low, high = map(float, declared)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low <= high:
        raise RewardError(f"reward {choice.alias!r} declares range = {declared!r}; two numbers are needed, (low, high)")
    return low, high


def _version_of(version: str, reward: Any) -> str:
    """A distribution's version; without one, what tells this file from an edited one."""
    file = getattr(sys.modules.get(type(reward).__module__), "__file__", None)
    if version != "-" or file is None:
        return version
    return "sha256:" + hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


def _batch_size_of(opened: LoadedReward) -> int | None:
    size = getattr(opened.reward, "batch_size", None)
    if size is not None and (type(size) is not int or size < 1):
        raise RewardError(f"reward {opened.alias!r} has batch_size = {size!r}; None or a number above 0 is needed")
    return size


def _numbers(values: Any, count: int, what: str) -> NDArray[np.float64]:
    """One fp64 number per sample; None becomes NaN."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    single = isinstance(values, str | bytes | dict | set | frozenset) or not hasattr(values, "__len__")
    if single or getattr(values, "ndim", 1) == 0:
        raise RewardError(f"{what} one {type(values).__name__}; it must give a list of {count} numbers")
    values = [v.detach().cpu().numpy() if hasattr(v, "detach") else v for v in values]
    words = [v for v in values if isinstance(v, str | bytes)]
    if words:
        raise RewardError(f"{what} the text {words[0]!r}; it must give a list of {count} numbers")
    try:
        array = np.asarray([math.nan if v is None else v for v in values], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(
            f"{what} something that is no number: {error}; it must give a list of {count} numbers"
        ) from error
    if array.shape != (count,):
        shape = len(values) if array.ndim == 1 else f"shape {list(array.shape)}"
        raise RewardError(f"{what} {shape} scores for {count} samples; it must give one number per sample")
    return array


def _join(parts: Sequence[RewardResult]) -> RewardResult:
    names = parts[0].components.keys() if parts else ()
    return RewardResult(
        np.concatenate([p.scores for p in parts]) if parts else np.zeros(0),
        np.concatenate([p.valid for p in parts]) if parts else np.zeros(0, bool),
        {name: np.concatenate([p.components[name] for p in parts]) for name in names},
        [row for p in parts for row in p.info],
    )
