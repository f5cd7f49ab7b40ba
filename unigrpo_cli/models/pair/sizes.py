"""Sizes of a pair that memory depends on: from the headers of its files, or as released. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from unigrpo_cli.models.pair.facts import KLEIN, TARGETS_LM, Z_IMAGE, PainterFacts
from unigrpo_cli.models.pair.pipeline import Network, Pipeline


@dataclass(frozen=True)
class NetworkSizes:
    """One network.

    Args:
        parameters: all numbers; `trained` are those of the matrices that are trained.
        sides: rows and columns of those matrices, added up: numbers of adapters of rank 1.
        largest: numbers of the largest of them.
        inner: width inside an MLP.
    """

    parameters: int
    trained: int
    sides: int
    largest: int
    layers: int
    width: int
    inner: int


@dataclass(frozen=True)
class PairSizes:
    """Both networks, and what passes between them.

    Args:
        queries, keys: widths of the reasoner's queries and keys.
        states: width of what conditions the painter.
        autoencoder: its parameters, and `widths` of its levels.
        token_dim, pixels_per_token: of the painter's tokens.
    """

    facts: PainterFacts
    reasoner: NetworkSizes
    painter: NetworkSizes
    vocab_size: int
    queries: int
    keys: int
    autoencoder: int
    widths: tuple[int, ...]
    token_dim: int
    pixels_per_token: int

    @property
    def states(self) -> int:
        return self.reasoner.width * len(self.facts.layers)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of an image.

        Raises:
            ValueError: when the size is no multiple of a token.
        """
        unit = self.pixels_per_token
        if height % unit or width % unit:
            raise ValueError(f"this painter's images have sides that are multiples of {unit}, not {height} x {width}")
        return height // unit, width // unit


def sizes_of(pipeline: Pipeline) -> PairSizes:
    """Sizes by the headers of the files and their configurations."""
    lm, painter, vae = pipeline.reasoner.config, pipeline.painter.config, pipeline.autoencoder.config
    heads = int(lm["num_attention_heads"])
    head = int(lm.get("head_dim") or lm["hidden_size"] // heads)
    if pipeline.facts.name == Z_IMAGE.name:
        width = int(painter["dim"])
        layers, inner = int(painter["n_layers"]) + 2 * int(painter["n_refiner_layers"]), width * 8 // 3
        token_dim = int(painter["in_channels"]) * pipeline.facts.patch**2
    else:
        width = int(painter["num_attention_heads"]) * int(painter["attention_head_dim"])
        layers = int(painter["num_layers"]) + int(painter["num_single_layers"])
        inner, token_dim = int(width * float(painter.get("mlp_ratio", 3.0))), int(painter["in_channels"])
    widths = tuple(int(w) for w in vae["block_out_channels"])
    return PairSizes(
        pipeline.facts,
        _network(pipeline.reasoner, TARGETS_LM, int(lm["num_hidden_layers"]), int(lm["hidden_size"]),
                 int(lm["intermediate_size"])),
        _network(pipeline.painter, pipeline.facts.targets, layers, width, inner),
        vocab_size=int(lm["vocab_size"]),
        queries=heads * head,
        keys=int(lm.get("num_key_value_heads", heads)) * head,
        autoencoder=pipeline.autoencoder.parameters,
        widths=widths,
        token_dim=token_dim,
        pixels_per_token=2 ** (len(widths) - 1) * pipeline.facts.patch,
    )  # fmt: skip


def _network(network: Network, targets: str, layers: int, width: int, inner: int) -> NetworkSizes:
    shapes: list[Any] = list(network.matrices(targets).values())
    return NetworkSizes(
        network.parameters, sum(map(prod, shapes)), sum(map(sum, shapes)), max(map(prod, shapes)), layers, width, inner
    )


QWEN3_4B = NetworkSizes(4_022_468_096, 3_633_315_840, 2_064_384, 24_903_680, 36, 2560, 9728)
VAE_LEVELS = (128, 256, 512, 512)
KLEIN_4B = PairSizes(
    KLEIN,
    QWEN3_4B,
    NetworkSizes(3_875_544_576, 3_680_501_760, 1_505_280, 84_934_656, 25, 3072, 9216),
    vocab_size=151_936,
    queries=4096,
    keys=1024,
    autoencoder=84_000_000,
    widths=VAE_LEVELS,
    token_dim=128,
    pixels_per_token=16,
)
PUBLISHED = {
    "z-image": PairSizes(
        Z_IMAGE,
        QWEN3_4B,
        NetworkSizes(6_154_908_736, 6_016_204_800, 2_480_640, 39_321_600, 34, 3840, 10240),
        vocab_size=151_936,
        queries=4096,
        keys=1024,
        autoencoder=83_819_683,
        widths=VAE_LEVELS,
        token_dim=64,
        pixels_per_token=16,
    ),
    "klein-4b": KLEIN_4B,
    "klein-base-4b": KLEIN_4B,
}
"""Released sizes by a part of the hub id, counted from the released configurations."""
