"""The linear layer: oneDNN's product is `F.linear` in all but speed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unigrpo_cli.models import layers
from unigrpo_cli.models.layers import Linear, linear

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture(autouse=True)
def _by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "onednn_is_faster", lambda: True)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 5), (7, 5), (2, 3, 5), (2, 1, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_linear(shape: tuple[int, ...], bias: bool) -> None:
    """Against fp64: sums of five products of numbers around 1, so a few fp32 roundings."""
    x, w, b = _random(*shape), _random(11, 5, seed=1), _random(11, seed=2) if bias else None
    given = [t for t in (x, w, b) if t is not None]
    upstream = _random(*shape[:-1], 11, seed=3).detach()
    found = linear(x, w, b)
    assert "OneDNN" in type(found.grad_fn).__name__
    wide = [t.detach().double().requires_grad_() for t in given]
    expected = F.linear(*wide)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)
    gradients = torch.autograd.grad(found, given, upstream)
    for own, other in zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_holds_no_memory(frozen: str) -> None:
    tensors = {"x": _random(7, 5), "weight": _random(11, 5, seed=1), "bias": _random(11, seed=2)}
    tensors[frozen].requires_grad_(False)
    out = linear(**tensors)
    kept = [t for t in out.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert len(kept) == {"x": 1, "weight": 1, "bias": 2}[frozen]
    out.sum().backward()
    assert [name for name, t in tensors.items() if t.grad is None] == [frozen]


def test_views_transposed_and_strided_inputs() -> None:
    x, w = _random(2, 5, 3), _random(11, 10, seed=1)
    turned, sliced = x.transpose(1, 2), w[:, ::2]
    torch.testing.assert_close(linear(turned, sliced, None), F.linear(turned, sliced), rtol=0, atol=3e-6)


def test_rows_do_not_depend_on_how_many_come_together() -> None:
    """So that decoding and replay agree: from two rows on to the bit, alone to rounding."""
    layer, x = Linear(128, 344), _random(300, 128).detach()
    with torch.no_grad():
        together = layer(x)
        for rows in (2, 3, 17, 150):
            assert torch.equal(layer(x[:rows]), together[:rows])
        torch.testing.assert_close(layer(x[:1]), together[:1], rtol=0, atol=1e-5)


def test_nothing_to_multiply() -> None:
    assert linear(torch.zeros(2, 0, 5), _random(11, 5), None).shape == (2, 0, 11)


def test_other_dtypes_go_the_common_way() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert (
            "OneDNN" not in type(linear(_random(7, 5).to(dtype), _random(11, 5).to(dtype), None).grad_fn).__name__
        )
