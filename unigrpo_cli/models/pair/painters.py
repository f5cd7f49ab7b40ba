"""Velocities and latents of each painter as `models.policy` has them: t = 1 noise, t = 0 data, v = noise - data.

Shape letters: B rows, K noisy copies of each row's image, N image tokens of D numbers, T states of C numbers that
condition a row, h by w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.pair.facts import KLEIN, Z_IMAGE, PainterFacts
from unigrpo_cli.models.sharding import most_passes

Condition = Sequence[Tensor]
"""The states [T, C] that condition each row's image."""


@dataclass(frozen=True)
class Painter:
    """A diffusers transformer and what its pipeline is known to do with it."""

    network: nn.Module
    facts: PainterFacts

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def token_dim(self) -> int:
        """Z-Image makes tokens of its latents inside, FLUX.2's pipeline outside of the network."""
        inside = self.facts.patch**2 if self.facts.name == Z_IMAGE.name else 1
        return int(self.config.in_channels) * inside

    def velocity(self, x_BKND: Tensor, t_BK: Tensor, grid: tuple[int, int], condition: Condition) -> Tensor:
        """fp32 velocities [B, K, N, D]."""
        call = {Z_IMAGE.name: _z_image, KLEIN.name: _klein}[self.facts.name]
        dtype = condition[0].dtype
        rows = [row for row in condition for _ in range(x_BKND.shape[1])]
        v_MND = call(self.network, x_BKND.flatten(0, 1).to(dtype), t_BK.flatten(), grid, rows)
        return v_MND.float().unflatten(0, x_BKND.shape[:2])


def _z_image(network: Any, x_MND: Tensor, t_M: Tensor, grid: tuple[int, int], rows: Condition) -> Tensor:
    """Z-Image's time runs the other way and its velocity is data - noise. Rows may differ in length."""
    longest, limit = max(len(row) for row in rows), network.config.axes_lens[0] - 2
    if -(-longest // 32) * 32 > limit:
        raise UsageError(
            f"a prompt and its reasoning have {longest} tokens and the painter takes at most {limit}; shorten the "
            "prompt, or reduce sampling.max_new_tokens"
        )
    images = unpatchify(x_MND, grid, channels_last=True)[:, :, None]
    out = network(list(images.unbind()), 1 - t_M, list(rows), return_dict=False)[0]
    return -patchify(torch.stack(list(out))[:, :, 0], channels_last=True)


def _klein(network: Any, x_MND: Tensor, t_M: Tensor, grid: tuple[int, int], rows: Condition) -> Tensor:
    """FLUX.2 has no mask over the text, so rows of one length pass together; sharded, on all ranks equally often."""
    device, lengths = x_MND.device, [len(row) for row in rows]
    groups = sorted(set(lengths))
    groups += groups[:1] * (most_passes(network, len(groups)) - len(groups))
    zero = torch.zeros(1, device=device)
    image_ids = torch.cartesian_prod(zero, *(torch.arange(n, device=device).float() for n in grid), zero)
    out = torch.empty_like(x_MND)
    for length in groups:
        at = torch.tensor([k for k, n in enumerate(lengths) if n == length], device=device)
        text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(length, device=device).float())
        found = network(
            hidden_states=x_MND[at],
            encoder_hidden_states=torch.stack([rows[k] for k in at.tolist()]),
            timestep=t_M[at],
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=None,
            return_dict=False,
        )[0]
        out = out.index_copy(0, at, found)
    return out


def patchify(latent_Mchw: Tensor, channels_last: bool) -> Tensor:
    """Latents as tokens of 2 x 2 latent pixels, row by row; inside a token channels come last or first."""
    x = latent_Mchw.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # M c rows 2 columns 2
    x = x.permute(0, 2, 4, 3, 5, 1) if channels_last else x.permute(0, 2, 4, 1, 3, 5)
    return x.flatten(3).flatten(1, 2)


def unpatchify(x_MND: Tensor, grid: tuple[int, int], channels_last: bool) -> Tensor:
    """The inverse of `patchify`."""
    x = x_MND.unflatten(1, grid)
    if channels_last:
        x = x.unflatten(3, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
    else:
        x = x.unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class Autoencoder:
    """The pipeline's autoencoder. Always fp32, one picture at a time."""

    network: Any
    facts: PainterFacts

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @torch.no_grad()
    def latents(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens as the pipeline's latents [B, c, h, w]; FLUX.2's are standardised, its autoencoder's are not."""
        if self.facts.name != KLEIN.name:
            return unpatchify(x_BND.float(), grid, channels_last=True)
        statistics, config = self.network.bn, self.network.config
        deviation = (statistics.running_var + config.batch_norm_eps).sqrt()
        return unpatchify(x_BND.float() * deviation + statistics.running_mean, grid, channels_last=False)

    @torch.no_grad()
    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Tokens of uint8 images, fp32: the mean of the autoencoder's posterior, as the pipeline scales it."""
        network, config = self.network, self.network.config
        x = pixels_BHWC.to(network.device).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        latent = torch.cat([network.encode(one[None]).latent_dist.mode() for one in x])
        if self.facts.name != KLEIN.name:
            return patchify((latent - (config.shift_factor or 0)) * config.scaling_factor, channels_last=True)
        deviation = (network.bn.running_var + config.batch_norm_eps).sqrt()
        return (patchify(latent, channels_last=False) - network.bn.running_mean) / deviation

    @torch.no_grad()
    def decode(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """uint8 images [B, height, width, 3] on the CPU, rounded as diffusers rounds them."""
        latent = self.latents(x_BND.to(self.network.device), grid)
        if self.facts.name != KLEIN.name:
            config = self.network.config
            latent = latent / config.scaling_factor + (config.shift_factor or 0)
        pixels = torch.cat([self.network.decode(one[None], return_dict=False)[0] for one in latent])
        return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
