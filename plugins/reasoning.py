"""Rewards on the reasoning: its length and its format."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput
from unigrpo_cli.errors import RewardError

OPEN, CLOSE = "<think>", "</think>"


class LengthOptions(Options):
    low: int = Field(1, ge=0, description="shortest length that scores 1")
    high: int = Field(128, ge=0, description="longest length that scores 1")
    slack: int = Field(32, ge=0, description="distance outside of that range at which the score is 0; linear between")
    unit: Literal["words", "tokens", "characters"] = Field("words", description="unit of the length")
    tokenizer: str | None = Field(
        None, description="for tokens: a tokenizer.json or a directory with it; default is the embedded model's"
    )

    @model_validator(mode="after")
    def _in_order(self) -> LengthOptions:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self


class LengthReward:
    """Length of the reasoning without its tags: 1 from `low` to `high`, falling to 0 over `slack` on both sides."""

    name = "length"
    summary = "length of the reasoning inside a range"
    range = (0.0, 1.0)
    needs = frozenset({"reasoning"})
    licence = "ours"
    Options = LengthOptions

    def __init__(self, options: LengthOptions):
        self.options = options

    def setup(self, context: RewardContext) -> None:
        if self.options.unit == "tokens":
            self.tokenizer = self._read_tokenizer(context)

    def _read_tokenizer(self, context: RewardContext) -> Any:
        from tokenizers import Tokenizer

        given = self.options.tokenizer
        if given is None and not context.embedded:
            raise RewardError(
                "reward 'length': tokens need a tokenizer; set @tokenizer=DIR to the model's directory with its "
                "tokenizer.json, or @unit=words"
            )
        path = Path(given or str(files("unigrpo_cli") / "toy" / "weights" / "model")).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises a bare Exception
            raise RewardError(f"reward 'length': cannot read a tokenizer from {file}: {error}") from error

    def score(self, batch: RewardBatch) -> RewardOutput:
        lengths = [None if text is None else self._count(inside(text)) for text in batch.reasoning]
        return RewardOutput(
            [None if n is None else self._value(n) for n in lengths], components={self.options.unit: lengths}
        )

    def _count(self, text: str) -> int:
        match self.options.unit:
            case "words":
                return len(text.split())
            case "tokens":
                return len(self.tokenizer.encode(text, add_special_tokens=False).ids)
            case _:
                return len(text)

    def _value(self, length: int) -> float:
        o = self.options
        outside = max(o.low - length, length - o.high, 0)
        return max(0.0, 1 - outside / o.slack) if o.slack else float(outside == 0)


def inside(text: str) -> str:
    """The reasoning without its tags."""
    return text.strip().removeprefix(OPEN).removesuffix(CLOSE).strip()


class FormatOptions(Options):
    pattern: str | None = Field(
        None,
        description="regular expression; default: one <think> at the start, one </think> at the end, and text between. "
        "With a comma or an @ in it: --reward-opt format.pattern=...",
    )
    match: Literal["full", "search"] = Field("full", description="full: the whole text; search: anywhere in it")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class FormatReward:
    """1 when the reasoning has the format: think tags around text, or a regular expression."""

    name = "format"
    summary = "1 when the reasoning has the format: think tags, or a regular expression"
    range = (0.0, 1.0)
    needs = frozenset({"reasoning"})
    licence = "ours"
    Options = FormatOptions

    def __init__(self, options: FormatOptions):
        self.options = options
        self.pattern = None if options.pattern is None else re.compile(options.pattern, re.DOTALL)

    def score(self, batch: RewardBatch) -> list[float | None]:
        return [None if text is None else float(self._fits(text)) for text in batch.reasoning]

    def _fits(self, text: str) -> bool:
        if self.pattern is None:
            stripped = text.strip()
            enclosed = stripped.startswith(OPEN) and stripped.endswith(CLOSE)
            once = stripped.count(OPEN) == 1 and stripped.count(CLOSE) == 1
            return enclosed and once and bool(inside(stripped))
        found = self.pattern.fullmatch(text) if self.options.match == "full" else self.pattern.search(text)
        return found is not None
