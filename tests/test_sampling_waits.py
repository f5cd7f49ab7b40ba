"""How often the host waits for the device while episodes are sampled: once per token, never per denoising call.

Counted on a CPU: operations whose result, or whose number of results, the host must know before it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_rollout import SAMPLING
from unigrpo_cli.algo.flow import Window
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rollout import sample_image, sample_text

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh")


class Waits(TorchDispatchMode):
    """Counts waits; `lift_fresh` is `torch.tensor` of numbers from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1]
        )
        self.count += name in WAITS or by_mask
        return func(*args, **kwargs or {})


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    waits, tolist = Waits(), torch.Tensor.tolist

    def counted(self: torch.Tensor) -> Any:
        waits.count += 1
        return tolist(self)

    with monkeypatch.context() as patch, waits:
        patch.setattr(torch.Tensor, "tolist", counted)
        yield waits


@torch.no_grad()
def test_one_wait_per_token_and_none_per_denoising_call(tiny: MoTPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    never = tiny.logits
    monkeypatch.setattr(MoTPolicy, "logits", lambda self, hidden: never(hidden).index_fill(-1, stop, -torch.inf))
    stop = torch.tensor([tiny.stop_id])
    rows = 3

    def text(budget: int) -> int:
        context = tiny.empty_context(rows)
        with _counted(monkeypatch) as waits:
            sample_text(tiny, context, replace(SAMPLING, max_new_tokens=budget), range(rows))
        return waits.count

    def image(steps: int) -> int:
        context = tiny.empty_context(rows)
        with _counted(monkeypatch) as waits:
            sample_image(tiny, context, replace(SAMPLING, steps=steps), Window(0, 0), range(rows))
        return waits.count

    text(2), image(2)  # token ids and tables are made once
    assert text(12) - text(4) == 8
    assert image(9) == image(3)
