"""A picture decoded in strips is the picture decoded at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unigrpo_cli.config import load_config
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.codec import Autoencoder
from unigrpo_cli.models.mot.tiled_decode import _activated
from unigrpo_cli.run.setup import load_policy

TINY = Path(__file__).parent / "golden" / "bagel_tiny"


@pytest.fixture(scope="module")
def codec() -> Autoencoder:
    found = load_model(str(TINY)).codec
    assert isinstance(found, Autoencoder)
    return found


@pytest.mark.parametrize("size", [(2, 3), (7, 5)])
@pytest.mark.parametrize("strip", [1, 8, 24, 4096])
def test_strips_change_no_picture(
    codec: Autoencoder, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], strip: int
) -> None:
    """To rounding, whatever the height of strips: ones that do not divide the picture, of a row, of all of it."""
    latent = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(0))
    whole, shown = codec.raw(latent), codec.decode(latent)
    monkeypatch.setattr(codec, "vae_tile_rows", strip)
    assert (codec.raw(latent) - whole).abs().max() < 1e-5
    assert (codec.decode(latent).int() - shown.int()).abs().max() <= 1


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_rows_are_normalised_by_the_whole_map(order: torch.memory_format) -> None:
    """Also of a map whose numbers lie in another order, which convolutions may choose."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(2, 6)
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(1, 6, 5, 4, generator=generator).to(memory_format=order)
    rows = _activated(norm, x)(1, 3)
    assert torch.allclose(rows, torch.nn.functional.silu(norm(x))[:, :, 1:3], atol=1e-6)


def test_the_setting_reaches_the_decoder() -> None:
    own = [f"sampling.{key}" for key in ("vae_tile_rows=8", "height=32", "width=32")]
    policy = load_policy(str(TINY), None, load_config(preset="paper", overrides=[*own, "device=cpu"]))
    assert isinstance(policy.codec, Autoencoder)
    assert policy.codec.vae_tile_rows == 8


def test_tiles_would_change_it(codec: Autoencoder) -> None:
    """Why strips: diffusers' tiles are pictures with statistics of their own, here grey levels off in the mean."""
    latent = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    whole, network = codec.raw(latent), codec.network
    network.enable_tiling()
    network.tile_latent_min_size, network.tile_sample_min_size = 8, 64
    tiled = codec.raw(latent)
    network.disable_tiling()
    assert (tiled - whole).abs().mean() > 0.01
