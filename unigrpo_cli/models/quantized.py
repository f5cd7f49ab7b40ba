"""Matrices of a frozen base in int8 or nf4, made whole again where they are used.

One matrix is whole at a time, in the dtype of its input: sampling, replay and update multiply by the same numbers.

* int8: each row has a scale, its largest magnitude over 127.
* nf4: each block of 64 numbers has a scale, its largest magnitude, and each number is the nearest of 16 levels,
  quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E). A byte holds two, the first
  one high.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unigrpo_cli.models.base_options import BLOCK, PLAIN
from unigrpo_cli.models.mot.layers import Linear, cast, linear

LEVELS = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
    + (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)


def quantized(weight_OI: Tensor, kind: str) -> dict[str, Tensor]:
    """`codes` and `scales` of a matrix, the scales in its dtype."""
    if kind == "int8":
        scale_O1 = _above_zero(weight_OI.abs().amax(1, keepdim=True) / 127)
        codes = (weight_OI.float() / scale_O1.float()).round_().clamp_(-127, 127)
        return {"codes": codes.to(torch.int8), "scales": scale_O1}
    flat = weight_OI.reshape(-1)
    blocks_NK = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale_N1 = _above_zero(blocks_NK.abs().amax(1, keepdim=True))
    levels = torch.tensor(LEVELS, device=flat.device)
    between = (levels[1:] + levels[:-1]) / 2
    index_NK = torch.bucketize(blocks_NK.float() / scale_N1.float(), between, out_int32=True).to(torch.uint8)
    return {"codes": index_NK[:, 0::2] * 16 + index_NK[:, 1::2], "scales": scale_N1}


def _above_zero(scale: Tensor) -> Tensor:
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


@functools.cache
def _levels_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Both levels of each byte, [256, 2]; made once, as each copy to the device makes the host wait."""
    levels = torch.tensor(LEVELS, dtype=dtype, device=device)
    return torch.cartesian_prod(levels, levels)


class QuantizedLinear(nn.Linear):
    """A frozen layer whose matrix is kept as `codes` and `scales`; PEFT puts adapters on it as on any `nn.Linear`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, plain: nn.Linear, kind: str, device: torch.device | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = plain.in_features, plain.out_features, kind
        self.register_parameter("bias", plain.bias)
        for name, tensor in quantized(plain.weight.detach().to(device or plain.weight.device), kind).items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.whole(self.scales.dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The matrix in that dtype."""
        if self.kind == "int8":
            return self.codes.to(dtype).mul_(self.scales.to(dtype))
        levels = _levels_of_bytes(dtype, self.codes.device)
        blocks = nn.functional.embedding(self.codes.int(), levels).flatten(1).mul_(self.scales.to(dtype))
        return blocks.view(-1)[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self) if torch.is_grad_enabled() else _product(x, self)

    def plain(self) -> Linear:
        """The layer with its matrix whole."""
        return Linear.of(nn.Parameter(self.weight, requires_grad=False), self.bias)


def _product(x: Tensor, layer: QuantizedLinear) -> Tensor:
    return linear(x, layer.whole(x.dtype), None if layer.bias is None else cast(layer.bias, x.dtype))


class _Product(torch.autograd.Function):
    """The layer's product. Its matrix is made again for the gradient, so autograd keeps none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return _product(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return linear(grad, ctx.layer.whole(grad.dtype).t(), None), None


def quantize_layers(network: nn.Module, targets: str, kind: str, device: torch.device | None = None) -> None:
    """Keep the matrices that `targets` matches (a regular expression) in that kind, on `device`."""
    if kind == PLAIN:
        return
    pattern = re.compile(targets)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and pattern.fullmatch(name):
            network.set_submodule(name, QuantizedLinear(module, kind, device))


def make_plain(network: nn.Module) -> None:
    """Keep whole what was quantised."""
    for name, module in list(network.named_modules()):
        if isinstance(module, QuantizedLinear):
            network.set_submodule(name, module.plain())


def kind_of(network: nn.Module) -> str:
    """How the matrices of a network's layers are kept."""
    return next((m.kind for m in network.modules() if isinstance(m, QuantizedLinear)), PLAIN)
