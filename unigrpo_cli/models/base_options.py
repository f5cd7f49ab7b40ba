"""How the frozen base of adapters is kept, and how many bytes that takes. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from unigrpo_cli.errors import UsageError

PLAIN = "none"
BLOCK = 64
"""Numbers of a matrix that share a scale in nf4; in int8 a row does."""


class BaseOptions(BaseModel):
    """Options of every family of ours, given as `model_options.KEY`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantize: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="keep the frozen matrices of the layers in 8 or 4 bits (int8, nf4); adapters and all else are as "
        "before. For train.finetune=lora and for sampling",
    )


def quantized_bytes(shape: Sequence[int], kind: str, number: int) -> int:
    """Bytes of a quantised matrix with its scales, which take `number` bytes each."""
    count = prod(shape)
    if kind == "int8":
        return count + shape[0] * number
    blocks = -(-count // BLOCK)
    return blocks * (BLOCK // 2 + number)


def refuse_full_tuning(kind: str, full: bool) -> None:
    """Quantised weights cannot be trained."""
    if full and kind != PLAIN:
        raise UsageError(
            f"model_options.quantize={kind} keeps the weights that train.finetune=full would train in less than 16 "
            "bits; give train.finetune=lora, or leave out model_options.quantize"
        )
