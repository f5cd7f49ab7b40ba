"""Operations as torch counts them, the same number on every torch that pyproject.toml allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Scores and their product with the values: two products over all pairs of a query and a key."""
    pairs = math.prod(query[:-1]) * key[-2]
    return 2 * pairs * (query[-1] + value[-1])


def attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """The scores once more, and the gradients of scores, values, queries and keys: five products."""
    pairs = math.prod(query[:-1]) * key[-2]
    return 2 * pairs * (3 * query[-1] + 2 * value[-1])


# torch has formulas for a GPU's fused attention. What it counts for a CPU's depends on its version.
FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_flops(run: Callable[[], object]) -> int:
    """What `run` computes in torch's own products: its counter does not know oneDNN's, and a GPU has no others."""
    with (
        patch("unigrpo_cli.models.mot.layers.onednn_is_faster", lambda: False),
        FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter,
    ):
        run()
    return counter.get_total_flops()
