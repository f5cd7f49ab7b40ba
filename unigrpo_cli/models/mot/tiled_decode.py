"""FLUX's decoder a strip of rows at a time: the same picture, but for rounding, from half the memory.

A convolution needs one row more on either side, and a group's mean and variance are taken over the whole map before
it is convolved; so unlike tiles, which are decoded as pictures of their own, strips have no seams. What is kept
whole is a block's input and one map of its output; the maps between them are never there as a whole.

Shape letters: C channels, H and W rows and columns of a map. All maps are of one picture, fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

Rows = Callable[[int, int], Tensor]
"""Rows `first` to `end` of a map, [1, C, end - first, W]."""


@torch.no_grad()
def decode_tiled(decoder: Any, latent_1Chw: Tensor, pixel_rows: int) -> Tensor:
    """What diffusers' `Decoder` makes of a latent, [1, 3, H, W].

    Args:
        pixel_rows: of the picture in a strip; maps of fewer rows have strips of fewer.
    """
    per_latent = 2 ** (len(decoder.up_blocks) - 1)

    def height(x: Tensor) -> int:
        return max(1, pixel_rows * x.shape[2] // (latent_1Chw.shape[2] * per_latent))

    x = decoder.conv_in(latent_1Chw)
    first, *others = decoder.mid_block.resnets
    x = _residual(first, x, height(x))
    for attention, block in zip(decoder.mid_block.attentions, others, strict=True):
        x = attention(x)
        x = _residual(block, x, height(x))
    for level in decoder.up_blocks:
        for block in level.resnets:
            x = _residual(block, x, height(x))
        for upsampler in level.upsamplers or ():
            x = _twice_as_large(upsampler.conv, x, 2 * height(x))
    pixels = x.new_empty(1, decoder.conv_out.out_channels, *x.shape[2:])
    return _convolved(decoder.conv_out, _activated(decoder.conv_norm_out, x), pixels, height(x))


def _residual(block: Any, x: Tensor, height: int) -> Tensor:
    """A residual block; its second convolution overwrites the map of its first."""
    inner = x.new_empty(1, block.conv1.out_channels, *x.shape[2:])
    _convolved(block.conv1, _activated(block.norm1, x), inner, height)
    shortcut = block.conv_shortcut or nn.Identity()

    def passed(first: int, end: int) -> Tensor:
        return shortcut(x[:, :, first:end])

    return _convolved(block.conv2, _activated(block.norm2, inner), inner, height, passed)


def _activated(norm: nn.GroupNorm, x: Tensor) -> Rows:
    """Normalisation over the whole map, then SiLU, of the rows that are asked for."""
    variance_G, mean_G = torch.var_mean(x[0].unflatten(0, (norm.num_groups, -1)), dim=(1, 2, 3), correction=0)
    each = x.shape[1] // norm.num_groups
    scale_C = norm.weight * (variance_G + norm.eps).rsqrt().repeat_interleave(each)
    shift_C = norm.bias - mean_G.repeat_interleave(each) * scale_C

    def rows(first: int, end: int) -> Tensor:
        own = x[:, :, first:end] * scale_C[:, None, None]
        return silu(own.add_(shift_C[:, None, None]), inplace=True)

    return rows


def _twice_as_large(conv: nn.Conv2d, x: Tensor, height: int) -> Tensor:
    """Each pixel four times, then the convolution."""

    def rows(first: int, end: int) -> Tensor:
        above = first // 2
        own = interpolate(x[:, :, above : (end + 1) // 2], scale_factor=2.0, mode="nearest")
        return own[:, :, first - 2 * above : end - 2 * above]

    larger = x.new_empty(1, conv.out_channels, 2 * x.shape[2], 2 * x.shape[3])
    return _convolved(conv, rows, larger, height)


def _convolved(conv: nn.Conv2d, rows: Rows, into: Tensor, height: int, added: Rows | None = None) -> Tensor:
    """A 3 x 3 convolution, written into `into`, which may be the map that `rows` reads.

    For that a strip is written only when the next one has been read, which needs the last row of it.
    """
    last, done = into.shape[2], None
    for first in range(0, last, height):
        end = min(first + height, last)
        above, below = max(first - 1, 0), min(end + 1, last)
        strip = conv(rows(above, below))[:, :, first - above : end - above]  # not the rows that lack a neighbour
        if added is not None:
            strip += added(first, end)
        if done is not None:
            into[:, :, done[0] : first] = done[1]
        done = first, strip
    assert done is not None
    into[:, :, done[0] :] = done[1]
    return into
