"""A reward from a plain function: its parameter names select the columns it gets."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, create_model

from unigrpo_cli.errors import RewardError, suggest
from unigrpo_cli.rewards.batch import COLUMNS, RewardBatch

NAME = r"[A-Za-z_][\w.-]*"
"""Names of rewards: `--reward` must tell a name from weight and options."""
MARK = "__unigrpo_reward__"


class Options(BaseModel):
    """Options of a reward: subclass it with the fields a user may set as `name@key=value`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def reward(
    name: str,
    *,
    range: tuple[float, float] = (float("-inf"), float("inf")),
    summary: str = "",
    batch_size: int | None = None,
    segments: tuple[str, ...] = (),
) -> Callable[[Callable], Callable]:
    """Make a function a reward.

        @reward("brightness", range=(0, 1))
        def brightness(images):
            return [sum(image.convert("L").getdata()) / 255 / image.width / image.height for image in images]

    Parameters named like a column (images, pixels, tensors, prompts, reasoning, texts, pictures, sources, metadata,
    ids, group_ids, step, split, batch) get it; parameters with a default are options (`brightness@gamma=2`). It may
    be async. It returns one number per sample; None or NaN abstains.

    Args:
        range: limits of the scores, for checks and for `advantage.combine=auto`.
        summary: one line for listings; by default the docstring's first line.
        batch_size: largest batch per call; None for the whole rollout.
        segments: kinds of segments, "text" or "image", that it scores by themselves in `RewardOutput.segments`.
    """

    if not re.fullmatch(NAME, name):
        raise RewardError(f"reward {name!r} has a name that --reward cannot read: use letters, digits and _ . -")

    def decorate(function: Callable) -> Callable:
        setattr(function, MARK, _as_class(function, name, range, summary, batch_size, segments))
        return function

    return decorate


class FunctionReward:
    """A reward around a function; `reward` makes a subclass for each function."""

    name: ClassVar[str]
    summary: ClassVar[str]
    range: ClassVar[tuple[float, float]]
    needs: ClassVar[frozenset[str]]
    batch_size: ClassVar[int | None]
    segments: ClassVar[tuple[str, ...]]
    licence = "that of its file"
    Options: ClassVar[type[BaseModel]]
    columns: ClassVar[tuple[str, ...]]
    function: ClassVar[Callable]

    def __init__(self, options: BaseModel):
        self.options = options

    def score(self, batch: RewardBatch) -> Any:
        given = {c: batch if c == "batch" else getattr(batch, c) for c in self.columns}
        result = type(self).function(**given, **self.options.model_dump())
        return asyncio.run(result) if inspect.iscoroutine(result) else result


def _as_class(
    function: Callable,
    name: str,
    range_: tuple[float, float],
    summary: str,
    batch_size: int | None,
    segments: tuple[str, ...],
) -> type[FunctionReward]:
    parameters = inspect.signature(function).parameters.values()
    columns = tuple(p.name for p in parameters if p.name in COLUMNS)
    options: dict[str, Any] = {}
    for p in parameters:
        if p.name in COLUMNS:
            continue
        if p.default is inspect.Parameter.empty:
            from unigrpo_cli.config.elsewhere import PARAMETERS

            stars = "**" if p.kind is p.VAR_KEYWORD else "*" if p.kind is p.VAR_POSITIONAL else ""
            shown = stars + p.name
            hint = f"use {PARAMETERS[p.name]}" if p.name in PARAMETERS else suggest(p.name, COLUMNS)
            raise RewardError(
                f"reward {name!r}: parameter {shown!r} is neither a column nor an option with a default; {hint} "
                f"(columns: {', '.join(COLUMNS)})"
            )
        annotated = p.annotation is not inspect.Parameter.empty and not isinstance(p.annotation, str)
        kind = p.annotation if annotated else type(p.default) if p.default is not None else Any
        options[p.name] = (kind, p.default)
    read = set(columns)
    needs: set[str] = {name for name in ("reasoning", "texts", "pictures") if name in read}
    needs |= {"image"} if read & {"images", "pixels", "tensors"} else set()
    needs |= {"source"} if "sources" in read else set()
    attributes = {
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "name": name,
        "summary": summary or (inspect.getdoc(function) or "").split("\n")[0],
        "range": range_,
        "needs": frozenset(needs),
        "batch_size": batch_size,
        "segments": segments,
        "Options": create_model(f"{function.__name__}_options", __base__=Options, **options),
        "columns": columns,
        "function": staticmethod(function),
    }
    return type(function.__name__, (FunctionReward,), attributes)
