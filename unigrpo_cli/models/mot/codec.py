"""Images to latents and back: FLUX's autoencoder, or none for a model that paints pixels.

Shape letters: B images, H and W pixels, C latent channels on a grid of h by w.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from unigrpo_cli.models.files import refuse_non_finite
from unigrpo_cli.models.mot.config import AutoencoderConfig
from unigrpo_cli.models.mot.tiled_decode import decode_tiled


class Codec(Protocol):
    """Turns uint8 images [B, H, W, 3] into latents [B, C, h, w], fp32, and back."""

    def encode(self, pixels_BHWC: Tensor, noise_BChw: Tensor | None = None) -> Tensor: ...

    def decode(self, latent_BChw: Tensor) -> Tensor: ...


class PixelCodec:
    """No autoencoder: a latent pixel is an image pixel in [-1, 1]. Decoding inverts encoding exactly."""

    def encode(self, pixels_BHWC: Tensor, noise_BChw: Tensor | None = None) -> Tensor:
        return pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, latent_BChw: Tensor) -> Tensor:
        return ((latent_BChw.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


class Autoencoder:
    """diffusers' `AutoencoderKL` with the weights and the standardisation of a release. Always fp32.

    Images pass one at a time: one of 1024 px takes gigabytes, and an image does not depend on its batch.
    """

    def __init__(
        self, path: Path, config: AutoencoderConfig, device: torch.device | str = "cpu", vae_tile_rows: int = 0
    ):
        """Weights by FLUX's names, which diffusers converts.

        Args:
            vae_tile_rows: rows of pixels that are decoded at a time; 0 for all.
        """
        from diffusers import AutoencoderKL

        self.config, self.vae_tile_rows = config, vae_tile_rows
        levels = len(config.widths)
        form = {
            "_class_name": "AutoencoderKL",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": config.widths,
            "layers_per_block": config.blocks,
            "latent_channels": config.latent_channels,
            "norm_num_groups": config.groups,
            "scaling_factor": config.scale,
            "shift_factor": config.shift,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
        with tempfile.TemporaryDirectory() as directory:  # diffusers takes the form as a file alone
            (Path(directory) / "config.json").write_text(json.dumps(form))
            network = AutoencoderKL.from_single_file(str(path), config=directory, local_files_only=True)
        self.network = network.to(device).requires_grad_(False)
        for name, tensor in self.network.named_parameters():
            refuse_non_finite(tensor, name, path)
        self.network.eval()

    @torch.no_grad()
    def moments(self, pixels_BHWC: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, [B, 2 C, h, w], not standardised."""
        x = pixels_BHWC.to(self.network.device).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        return torch.cat([self.network.encode(one[None]).latent_dist.parameters for one in x])

    def encode(self, pixels_BHWC: Tensor, noise_BChw: Tensor | None = None) -> Tensor:
        """Standardised latents: the posterior's mean, or with a standard normal `noise` that draw of it."""
        mean, log_variance = self.moments(pixels_BHWC).chunk(2, dim=1)
        if noise_BChw is not None:
            mean = mean + (log_variance.clamp(-30, 20) / 2).exp() * noise_BChw.to(mean.device)
        return self.config.scale * (mean - self.config.shift)

    @torch.no_grad()
    def raw(self, latent_BChw: Tensor) -> Tensor:
        """The decoder's own output [B, 3, H, W], about -1 to 1, not clamped."""
        z = latent_BChw.to(self.network.device).float() / self.config.scale + self.config.shift
        if not self.vae_tile_rows:
            return torch.cat([self.network.decode(one[None]).sample for one in z])
        return torch.cat([decode_tiled(self.network.decoder, one[None], self.vae_tile_rows) for one in z])

    def decode(self, latent_BChw: Tensor) -> Tensor:
        """uint8 images; fractions of a grey level are cut off, as the official code does."""
        return ((self.raw(latent_BChw) * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
