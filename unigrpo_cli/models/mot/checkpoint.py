"""A policy from a model directory. Names and shapes are checked before weights are read; no file can run code."""

from __future__ import annotations

from pathlib import Path

import torch

from unigrpo_cli.models.base_options import PLAIN
from unigrpo_cli.models.hub import locate
from unigrpo_cli.models.mot.bagel import AUTOENCODER, HUB_FILES, Release, read_release
from unigrpo_cli.models.mot.codec import Autoencoder, Codec, PixelCodec
from unigrpo_cli.models.mot.config import LORA_TARGETS, TABLES
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.mot.tokenizer import boundary_ids, load_tokenizer
from unigrpo_cli.models.mot.weights import network_weights
from unigrpo_cli.models.quantized import quantize_layers


def load_model(
    model: str | Path,
    weights_file: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_tile_rows: int = 0,
    quantize: str = PLAIN,
) -> MoTPolicy:
    """Load a policy from a model directory (or its weights file by path), a hub id, or `embedded`.

    Args:
        weights_file: name of the network's file where the directory holds several.
        vae_tile_rows: rows of pixels that the autoencoder decodes at a time; 0 for all.
        quantize: how the matrices of the layers are kept: none, int8 or nf4.
    """
    directory, own_file = locate(str(model), HUB_FILES)
    release = read_release(directory, weights_file or own_file).refuse_problems()
    tokenizer = load_tokenizer(release.directory)
    with torch.device("meta"):
        network = MoT(release.config, boundary_ids(tokenizer))
    quantize_layers(network, LORA_TARGETS, quantize)
    network.load_state_dict(network_weights(release, device, dtype, quantize), strict=True, assign=True)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in TABLES)
    codec = load_codec(release, device, vae_tile_rows)
    return MoTPolicy(network.eval(), tokenizer, codec, release.system_prompt, release=release)


def load_codec(release: Release, device: torch.device | str, vae_tile_rows: int = 0) -> Codec:
    """The release's autoencoder, or none for a model that paints pixels."""
    if release.autoencoder is None:
        return PixelCodec()
    return Autoencoder(release.directory / AUTOENCODER, release.autoencoder, device, vae_tile_rows)
