"""The files of a run as a report reads them: checked, so that a damaged one is an error with its path."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.limits import read_text, reason_of
from unigrpo_cli.run.config_diff import flat

LARGEST_CURVES = 2**32
"""Bytes of a metrics.jsonl."""


def _finite(value: Any) -> Any:
    json.dumps(value, allow_nan=False)
    return value


Setting = Annotated[JsonValue, AfterValidator(_finite)]
"""A value that a page can hold: no date, no number that is not finite."""


class _File(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Row(_File):
    """A line of metrics.jsonl; what is not named here are metrics, null where they were not measured."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat | bool | str | None] = Field(init=False)

    step: Annotated[int, Field(ge=0, lt=2**53)]
    time: FiniteFloat | None = None
    warnings: list[str] = []
    skipped: str | None = None


class Interval(_File):
    """A mean with its 95 % interval."""

    mean: FiniteFloat
    ci95: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]


class Comparison(_File):
    """Another model of an evaluation, and its paired difference from the first."""

    model: str
    scores: dict[str, Interval]
    n: int
    difference: dict[str, Interval]


class EvalFile(_File):
    """eval_before.json, eval_after.json or eval.json."""

    scores: dict[str, Interval]
    n: int
    model: str | None = None
    compare: list[Comparison] = []


class SummaryFile(_File):
    """summary.json."""

    difference: dict[str, Interval] = {}


class _Settings(_File):
    """config.toml by dotted keys; keys of other versions are shown too."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting] = Field(init=False)

    steps: Annotated[int, Field(alias="train.steps")] = 0


def read_settings(path: Path) -> dict[str, Any]:
    """A configuration by dotted keys; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        settings = flat(tomllib.loads(read_text(path)))
        _Settings.model_validate(settings)
        return settings
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not readable: {reason_of(error)}; copy it from another run of this setting"
        ) from error


def read_json(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    try:
        return kind.model_validate_json(read_text(path)).model_dump()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable: {reason_of(error)}") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl. The last one may be half written: the run may still train."""
    try:
        text = read_text(path, LARGEST_CURVES)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable: {error}") from error
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            yield Row.model_validate_json(line).model_dump(exclude_unset=True)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number}: {reason_of(error)}; `unigrpo train --resume` repairs it"
            ) from error
