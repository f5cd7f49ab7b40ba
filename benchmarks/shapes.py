"""BAGEL's shape with random weights, in full size and in smaller ones, and what each is asked to do."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from unigrpo_cli.models.mot.codec import Autoencoder
from unigrpo_cli.models.mot.config import TABLES, AutoencoderConfig, MoTConfig, autoencoder_shapes
from unigrpo_cli.models.mot.layers import PositionTable
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.mot.tokenizer import BOUNDARY, CLOSE, OPEN, UNKNOWN, boundary_ids


@dataclass(frozen=True)
class Size:
    """A shape and its task.

    Args:
        pixels: side of the painted square.
        calls: denoising steps of the network per image.
        thinking: tokens of reasoning, the budget.
        given: words of the system prompt and of the prompt together.
        copies: recorded noisy states per image, K.
        groups: members of the groups that are rolled out, the smallest first; the last one is what goals are about.
        micro_batches: episodes of one backward pass that are tried, in order.
        rank: of the adapters.
    """

    network: MoTConfig
    autoencoder: AutoencoderConfig
    pixels: int
    calls: int
    thinking: int
    given: int
    copies: int
    groups: tuple[int, ...]
    micro_batches: tuple[int, ...]
    rank: int

    @property
    def image_tokens(self) -> int:
        return (self.pixels // self.network.pixels_per_token) ** 2

    def reading(self) -> int:
        """Tokens of context that an image is painted in: the texts, each with its two delimiters."""
        return self.given + 4 + self.thinking + 2


def bagel_shape(hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, side: int) -> MoTConfig:
    """A shape of BAGEL's form; `side` is that of the table of latent positions."""
    return MoTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=inner,
        vocab_size=vocabulary,
        latent_patch_size=2,
        latent_channels=16,
        pixels_per_latent=8,
        max_latent_size=side,
    )


SIZES = {
    "7b": Size(
        bagel_shape(3584, 28, 28, 4, 18944, 152064, 64),
        AutoencoderConfig((128, 256, 512, 512), 2, 16),
        pixels=512,
        calls=24,
        thinking=300,
        given=60,
        copies=3,
        groups=(8, 24),
        micro_batches=(4, 8),
        rank=64,
    ),
    "100m": Size(
        bagel_shape(512, 9, 4, 1, 2560, 16384, 64),
        AutoencoderConfig((64, 128, 256, 256), 2, 16),
        pixels=256,
        calls=24,
        thinking=100,
        given=60,
        copies=3,
        groups=(2, 4),
        micro_batches=(2,),
        rank=16,
    ),
    "tiny": Size(
        bagel_shape(64, 2, 4, 2, 192, 512, 8),
        AutoencoderConfig((32, 32, 32, 32), 1, 16),
        pixels=64,
        calls=6,
        thinking=12,
        given=10,
        copies=3,
        groups=(2, 4),
        micro_batches=(2,),
        rank=4,
    ),
}


def random_policy(size: Size, device: torch.device, dtype: torch.dtype) -> MoTPolicy:
    """A policy of that shape whose weights are drawn on the device: the host never holds them."""
    tokenizer = made_up_tokenizer(size.network.vocab_size)
    system = " ".join(f"w{k}" for k in range(size.given - size.given // 3))
    network = random_network(size.network, tokenizer, device, dtype)
    return MoTPolicy(network, tokenizer, random_autoencoder(size.autoencoder, device), system)


def prompt_text(size: Size) -> str:
    """A prompt of a third of the given words."""
    return " ".join(f"w{k}" for k in range(size.given // 3))


def made_up_tokenizer(vocabulary: int) -> Tokenizer:
    """One token per made-up word; some ids of the head stay without one, as some of BAGEL's do."""
    special = [OPEN, CLOSE, *BOUNDARY, UNKNOWN]
    count = vocabulary - max(1, vocabulary // 400) - len(special)
    words = {word: k for k, word in enumerate([*special, *(f"w{k}" for k in range(count))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def random_network(config: MoTConfig, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype) -> MoT:
    """Frozen weights scaled so that states keep their size through the layers."""
    with torch.device("meta"):
        network = MoT(config, boundary_ids(tokenizer)).to(dtype)
    network = network.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        if name in TABLES:
            parameter.copy_(PositionTable(config.max_latent_size, config.hidden_size).pos_embed)
        elif parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            residual = "o_proj" in name or "down_proj" in name  # what is added to the stream, once each per layer
            scale = parameter.shape[1] ** -0.5 / (math.sqrt(2 * config.num_hidden_layers) if residual else 1)
            parameter.normal_(0.0, scale, generator=generator)
    return network.eval()


def random_autoencoder(config: AutoencoderConfig, device: torch.device) -> Autoencoder:
    """The project's own autoencoder, from a file of random weights by the release's names."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in autoencoder_shapes(config).items():
        if len(shape) == 1:
            state[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            state[name] = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ae.safetensors"
        save_file(state, path)
        return Autoencoder(path, config, device)
