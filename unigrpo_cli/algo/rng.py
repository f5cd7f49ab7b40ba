"""Randomness from keys. No generator is shared, so batch sizes, chunks and devices change no sample."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, *keys: object) -> int:
    """A 63-bit seed from a seed and what it is for, e.g. `derive(seed, prompt, member, "noise")`."""
    text = "\x1f".join([str(seed), *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def uniform(seed: int, count: int) -> Tensor:
    """`count` float64 numbers in [0, 1), on the CPU so that every device sees the same ones."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal fp32 numbers, on the CPU so that every device sees the same ones."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
