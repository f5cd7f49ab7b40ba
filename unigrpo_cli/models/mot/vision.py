"""How the network reads a given picture: SigLIP's encoder on patches of any grid, and a connector.

Patches are not resized to a square: a picture of rows x columns patches takes the upper left part of a square
table of positions. A patch is its pixels in the order row, column, channel, in [-1, 1]; so the first layer is a
linear one.

Shape letters: B pictures, N patches of P numbers, E width of the tower, C width of the network, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigrpo_cli.models.mot.config import VisionConfig
from unigrpo_cli.models.mot.layers import LayerNorm, Linear, embedding


def patchify(pixels_BHWC: Tensor, patch: int) -> Tensor:
    """uint8 pictures to patches [B, N, P] in fp32, row by row.

    Raises:
        ValueError: when a side is no multiple of `patch`.
    """
    height, width = pixels_BHWC.shape[1:3]
    if height % patch or width % patch:
        raise ValueError(f"a picture of {height}x{width} does not divide into patches of {patch}")
    x = pixels_BHWC.float() / 127.5 - 1
    return x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3).flatten(3).flatten(1, 2)


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x_BNE: Tensor) -> Tensor:
        q, k, v = (
            project(x_BNE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Feed(nn.Module):
    """Two linear layers with tanh's GELU between: the tower's MLP, and the connector."""

    def __init__(self, into: int, inner: int, out: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(into, inner), Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.self_attn = _Attention(config)
        self.mlp = _Feed(width, config.intermediate_size, width)

    def forward(self, x_BNE: Tensor) -> Tensor:
        x_BNE = x_BNE + self.self_attn(self.layer_norm1(x_BNE))
        return x_BNE + self.mlp(self.layer_norm2(x_BNE))


class _Layers(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x_BNE: Tensor) -> Tensor:
        for layer in self.layers:
            x_BNE = layer(x_BNE)
        return x_BNE


class _Encoder(nn.Module):
    """`vision_model` of the release: embeddings, layers, one norm."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.side = config.side
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": Linear(config.patch_dim, width),
                "position_embedding": embedding(config.side**2, width),
            }
        )
        self.encoder = _Layers(config)
        self.post_layernorm = LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, patches_BNP: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = (torch.arange(n, device=patches_BNP.device) for n in grid)
        at_N = (rows[:, None] * self.side + columns).flatten()
        x = self.embeddings["patch_embedding"](patches_BNP)
        x = x + self.embeddings["position_embedding"](at_N).to(x.dtype)
        return self.post_layernorm(self.encoder(x))


class VisionTower(nn.Module):
    """Patches of given pictures to features [B, N, E]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = _Encoder(config)

    def forward(self, patches_BNP: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of pictures that share one grid of patches.

        Raises:
            ValueError: when the grid is larger than the table of positions.
        """
        if max(grid) > self.config.side:
            raise ValueError(f"a picture of {grid[0]}x{grid[1]} patches: the tower has room for {self.config.side}")
        return self.vision_model(patches_BNP, grid)


Connector = _Feed
