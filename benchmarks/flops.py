"""Work of a pass in floating-point operations and bytes, from shapes alone.

A linear layer is 2 operations per weight and token; attention is 4 * width per query, key and layer, masked or not,
causal or not: what a dense kernel does. Norms, rotations and activations are left out. `tests/test_benchmark.py`
counts the same with torch's own counter.
"""

from __future__ import annotations

from dataclasses import dataclass

from unigrpo_cli.models.mot.config import TIME_WAVES, MoTConfig

BOUNDARY = 2  # boundary tokens around an image; the text expert's
FUSED_BACKWARD = 2.5  # of attention's forward: four products, and the scores once more


@dataclass(frozen=True)
class Pass:
    """One call of the network, and the head on some of its states.

    Args:
        rows: episodes.
        text: tokens that each of them reads.
        past: tokens of context before those.
        copies, image: noisy images per row, and latent tokens of each.
        scored: states of all rows together that the head over the vocabulary is applied to.
        rank: of the adapters on attention and MLP; 0 for none.
    """

    rows: int
    text: int = 0
    past: int = 0
    copies: int = 0
    image: int = 0
    scored: int = 0
    rank: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * (self.text + self.copies * (self.image + BOUNDARY * bool(self.copies)))

    @property
    def edges(self) -> int:
        """Boundary tokens of all images."""
        return self.rows * self.copies * BOUNDARY

    @property
    def seen(self) -> int:
        """Keys that a token of an image sees."""
        return self.past + self.text + self.image + BOUNDARY

    @property
    def pairs(self) -> int:
        """Queries times keys, in one layer."""
        latents = self.rows * self.copies * self.image
        return self.rows * self.text * (self.past + self.text) + (latents + self.edges) * self.seen


def products(config: MoTConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one expert in one layer: (numbers in, numbers out)."""
    width, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    return {
        "q": (width, width),
        "k": (width, kv),
        "v": (width, kv),
        "o": (width, width),
        "gate": (width, inner),
        "up": (width, inner),
        "down": (inner, width),
    }


def expert_weights(config: MoTConfig) -> int:
    """Weights of one expert's matrices in one layer."""
    return sum(into * out for into, out in products(config).values())


def adapter_weights(config: MoTConfig, rank: int) -> int:
    """Weights of one expert's adapters in one layer."""
    return rank * sum(into + out for into, out in products(config).values())


def after_attention(config: MoTConfig, rank: int) -> tuple[int, int]:
    """Weights of one expert's matrices that follow attention in a layer, and of their adapters."""
    own = [shape for name, shape in products(config).items() if name not in ("q", "k", "v")]
    return sum(into * out for into, out in own), rank * sum(into + out for into, out in own)


def layers_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of all layers. The last one makes nothing of boundary tokens but their keys and values."""
    layer = expert_weights(config) + adapter_weights(config, p.rank)
    all_layers = config.num_hidden_layers * (2 * p.tokens * layer + attention_flops(config, p))
    return all_layers - 2 * p.edges * sum(after_attention(config, p.rank)) - edge_attention_flops(config, p)


def edge_attention_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of the boundary tokens' attention, in one layer."""
    return 4 * config.hidden_size * p.edges * p.seen


def forward_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of a pass without gradients."""
    return layers_flops(config, p) + head_flops(config, p) + latent_flops(config, p)


def attention_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of one layer's attention."""
    return 4 * config.hidden_size * p.pairs


def head_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of the head over the vocabulary."""
    return 2 * p.scored * config.hidden_size * config.vocab_size


def latent_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of the projections from and to latents and of the time embedding."""
    images, width = p.rows * p.copies, config.hidden_size
    return 4 * images * p.image * config.token_dim * width + 2 * images * width * (TIME_WAVES + width)


def update_flops(config: MoTConfig, p: Pass) -> int:
    """Operations of a pass whose adapters get gradients, its layers recomputed in the backward pass.

    The layers run twice. Backward, a frozen matrix passes one gradient on, an adapter's makes two; what goes into
    the first layer needs none.
    """
    frozen, adapters = expert_weights(config), adapter_weights(config, p.rank)
    first = sum(into * (out + p.rank) for into, out in (products(config)[name] for name in ("q", "k", "v")))
    after, after_adapters = after_attention(config, p.rank)
    backward = config.num_hidden_layers * (
        2 * p.tokens * (frozen + 2 * adapters) + int(FUSED_BACKWARD * attention_flops(config, p))
    )
    backward -= 2 * p.edges * (after + 2 * after_adapters) + int(FUSED_BACKWARD * edge_attention_flops(config, p))
    ends = 2 * head_flops(config, p) + latent_flops(config, p) * 3 // 2
    return 2 * layers_flops(config, p) + backward - 2 * p.tokens * first + ends


def decode_bytes(config: MoTConfig, rows: int, past: int, bytes_each: int, rank: int) -> int:
    """The least that writing one token in every row must read: the text expert, its fp32 adapters, the head, the
    context's keys and values; bytes.
    """
    weights = config.num_hidden_layers * expert_weights(config) + config.vocab_size * config.hidden_size
    kv = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * rows * past
    return bytes_each * (weights + kv) + 4 * config.num_hidden_layers * adapter_weights(config, rank)
