"""Options of a pair, as `model_options.KEY`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unigrpo_cli.models.base_options import BaseOptions


class PairOptions(BaseOptions):
    """Options of a pair, given as `model_options.KEY`."""

    reasoner: str = Field("", description="directory of another causal LM of the same width, with its tokenizer")
    conditioning: Literal["same-pass", "re-encoded"] | None = Field(
        None,
        description="what the painter is conditioned on: states of the pass that wrote the text, or the written text "
        "read anew as a user's words; default: as the weights were trained, else same-pass",
    )
    instruction: str | None = Field(
        None, description="system turn before the prompt when the model thinks; default: as trained, else none"
    )
