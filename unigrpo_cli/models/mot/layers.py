"""Layers that keep their weights in one dtype and compute in another. No autocast: every cast is written here."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unigrpo_cli.models.mot.config import TIME_WAVES


def widen(x: Tensor) -> Tensor:
    """fp32 for anything narrower; fp64 stays, so that tests can look closer."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype. Checking first is ten times faster than `Tensor.to` when nothing changes."""
    return x if x.dtype == dtype else x.to(dtype)


class Linear(nn.Linear):
    """Computes in its input's dtype, whatever its weights are kept in.

    So a bf16 network trains fp32 masters: the cast is part of the graph, and gradients come back in fp32.
    """

    @classmethod
    def of(cls, weight_OI: Tensor, bias: nn.Parameter | None) -> Linear:
        """A layer with these parameters themselves."""
        own = cls(weight_OI.shape[1], weight_OI.shape[0], bias=bias is not None, device="meta")
        own.weight = weight_OI
        own.register_parameter("bias", bias)
        return own

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else cast(self.bias, x.dtype)
        return linear(x, cast(self.weight, x.dtype), bias)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than MKL, which torch takes: on AMD's processors with AVX-512.

    There MKL uses AVX2 only, at less than half the speed (docs/performance.md). A rule, not a timing, so that a run
    repeats with the same arithmetic.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _onednn(a_MK: Tensor, b_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias."""
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """`F.linear` by oneDNN, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        gradient = None
        if of_weight:
            rows = x.flatten(0, -2)
            if rows.shape[1] < flat.shape[1]:  # oneDNN lays out its first factor anew: let it be the smaller one
                gradient = _onednn(rows.t(), flat.t()).t()
            else:
                gradient = _onednn(flat.t(), rows.t())
        return _onednn(grad, weight.t()) if of_x else None, gradient, flat.sum(0) if of_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by the faster of torch's two libraries; `F.linear` in all but speed."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim > 1 and x.numel() > 0
    if plain and not torch.compiler.is_compiling() and onednn_is_faster():
        if not torch.is_grad_enabled():
            return _onednn(x, weight, bias)
        return _OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square along the last axis, and one over that."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


def _rotated(normed: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Times the weight, then rotated as `rotate` does it; weight and angles are multiplied first, being small."""
    if cos is None or sin is None:
        return normed * weight
    half = normed.shape[-1] // 2
    return (normed * (cos * weight)).addcmul_(normed.roll(half, -1), sin * weight.roll(half))


class _RMSNorm(torch.autograd.Function):
    """Norm over the last axis, then optionally a rotation, in few passes over memory, which limits a CPU.

    Torch has no CPU kernel for either. All gradients follow from the normed numbers, so nothing else of that size is
    kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
        normed, scale = _normed(x, eps)
        ctx.save_for_backward(normed, scale, weight, cos, sin)
        return _rotated(normed, weight, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        normed, scale, weight, cos, sin = ctx.saved_tensors
        of_x, of_weight, *_ = ctx.needs_input_grad
        if cos is not None:  # back by the same angle: the sine of the other half has the other sign
            grad = (grad * cos).addcmul_(grad.roll(grad.shape[-1] // 2, -1), sin.to(grad.dtype), value=-1)
        product = grad * normed
        gradient = None
        if of_x:
            along = (product @ weight).mul_(1 / normed.shape[-1]).unsqueeze(-1)
            gradient = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return gradient, product.flatten(0, -2).sum(0) if of_weight else None, None, None, None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32, returned in the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, rotated: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The norm of x [..., size]; with `rotated` (see `rotation`) of heads [B, L, H, size], then rotated."""
        wide, weight = widen(x), widen(self.weight)
        if x.device.type == "cpu":
            angles = rotated or (None, None)
            if torch.is_grad_enabled():
                return cast(_RMSNorm.apply(wide, weight, *angles, self.eps), x.dtype)
            return cast(_rotated(_normed(wide, self.eps)[0], weight, *angles), x.dtype)
        normed = F.rms_norm(wide, x.shape[-1:], weight, self.eps)
        return (normed if rotated is None else rotate(normed, rotated)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, computed in fp32, returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(widen(x), self.normalized_shape, widen(self.weight), widen(self.bias), self.eps).to(x.dtype)


class _Gated(torch.autograd.Function):
    """silu(gate) * up in one piece of memory; the activation is made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Without gradients it is written into `gate`, which has no other user."""
    if not torch.is_grad_enabled():
        return F.silu(gate, inplace=True).mul_(up)
    return _Gated.apply(gate, up) if gate.device.type == "cpu" else F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def rotation(position_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, L, 1, head_dim] of the rotary embedding, in fp32, for every layer of a pass.

    Both halves of a head rotate by the same angles, so each number occurs twice, the sines with either sign.
    """
    half = head_dim // 2
    frequency = theta ** -(torch.arange(half, device=position_BL.device, dtype=torch.float32) / half)
    angle = position_BL[:, :, None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_BLHE: Tensor, rotated: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding on the two halves of each head: (a, b) to (a cos - b sin, b cos + a sin)."""
    cos, sin = rotated
    return x_BLHE * cos + x_BLHE.roll(x_BLHE.shape[-1] // 2, -1) * sin


class TimeEmbedder(nn.Module):
    """Sinusoids of t (256 numbers, cosines first) through a two-layer SiLU network, in t's dtype: fp32 or wider."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_WAVES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t_R: Tensor) -> Tensor:
        waves = time_waves(t_R.float(), TIME_WAVES)
        return self.mlp(waves.to(t_R.dtype))


def embedding(count: int, width: int) -> nn.Embedding:
    """A table of rows; on the meta device without first values, for which torch would import its compiler."""
    table = torch.empty(count, width)
    return nn.Embedding.from_pretrained(table, freeze=False) if table.is_meta else nn.Embedding(count, width)


# The two formulas are diffusers' (a test compares them): importing it would take most of a short command's time.


def time_waves(t_R: Tensor, count: int) -> Tensor:
    """Cosines, then sines, of times at count / 2 frequencies that fall from 1 to nearly 1 / 10,000: [R, count]."""
    k = torch.arange(count // 2, dtype=torch.float32, device=t_R.device)
    angles = t_R[:, None] * torch.exp(-math.log(10_000) * k / (count // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the column, then of the row, of each position of a square: [side * side, width], fp64."""
    k = torch.arange(width // 4, dtype=torch.float64)
    angles = torch.outer(torch.arange(side, dtype=torch.float64), 1 / 10_000 ** (k / (width // 4)))
    one = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns, rows = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, width)


class PositionTable(nn.Module):
    """A fixed 2-D sine-cosine table, one row per token of the largest image, kept in the network's dtype.

    Given by a formula, but a checkpoint's rounded table takes precedence: its weights were trained with it. Never
    trained.
    """

    def __init__(self, side: int, width: int):
        super().__init__()
        table = torch.empty(side * side, width)
        if not table.is_meta:  # there torch would import its compiler to compute nothing
            table = position_waves(side, width).float()
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.side = side

    def forward(self, rows: int, columns: int) -> Tensor:
        table = self.pos_embed.view(self.side, self.side, -1)
        return table[:rows, :columns].reshape(rows * columns, -1)


def is_on_host(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("cpu", copy=True), requires_grad=False)


ALIGNMENT = 256
"""Bytes at which a tensor in a buffer begins, as a device's allocator has it."""


def packed(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """One flat buffer of bytes that holds all tensors, and where each begins."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8)
    for view, tensor in zip(unpacked(buffer, offsets, tensors), tensors, strict=True):
        view.copy_(tensor)
    return buffer, offsets


def unpacked(buffer: Tensor, offsets: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Views into a buffer, of the dtypes and shapes of `like`."""
    return [buffer[at : at + x.nbytes].view(x.dtype).view(x.shape) for at, x in zip(offsets, like, strict=True)]


def stream_from_host(layer: nn.Module, device: torch.device) -> None:
    """Copy the layer's host weights to `device` for each forward pass, and drop the copies after it.

    They are one flat buffer, copied in one transfer. It is pinned in place: torch's allocator of pinned memory would
    round its size up to a power of two. For weights that are not trained: nothing is copied back.
    """
    parameters = [p for p in layer.parameters() if p.device.type == "cpu"]
    if not parameters:
        return
    buffer, offsets = packed([p.data for p in parameters])
    on_host = unpacked(buffer, offsets, [p.data for p in parameters])
    if device.type == "cuda":
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
        weakref.finalize(layer, lambda: runtime.cudaHostUnregister(buffer.data_ptr()))

    def use(tensors: Sequence[Tensor]) -> None:
        for parameter, data in zip(parameters, tensors, strict=True):
            parameter.data = data

    def load(_layer: nn.Module, _arguments: tuple) -> None:
        use(unpacked(buffer.to(device, non_blocking=True), offsets, on_host))

    def unload(_layer: nn.Module, _arguments: tuple, _result: object) -> None:
        use(on_host)

    use(on_host)
    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(unload)
