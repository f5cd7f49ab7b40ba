"""The same algorithm as one would write it first: what the package is compared with.

One episode at a time, as BAGEL's official inference does it: the prompt is read into a key-value cache of the
episode's own, words are drawn and fed one by one, and each denoising step is one call for one image in that cache.
For that, nothing of `rollout.py`, `context.py` or of the network's `forward` is used: only the layers' weights by
their names, in torch's own `F.linear` and `F.rms_norm`, and the functions that say what an action is (`algo`,
`seeds`), so that both draw the same episodes.

Shape letters: L tokens of a text, S slots of the cache, N image tokens of D numbers, H heads of E numbers, C width.
A leading 1 is the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.rng import derive, normal, uniform
from unigrpo_cli.algo.text import token
from unigrpo_cli.episode import Episode, GivenText, ImageActions, Prompt, TextActions
from unigrpo_cli.models.mot.config import MoTConfig
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.rollout import Sampling

# ----- the network, one episode at a time


class Cache:
    """Keys and values [1, H, S, E] of one episode's text, layer by layer; `length` is S."""

    def __init__(self, config: MoTConfig):
        blank = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
        self.keys = [blank] * config.num_hidden_layers
        self.values = [blank] * config.num_hidden_layers
        self.length = 0


def _rotation(config: MoTConfig, position_L: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, E / 2] of the rotary embedding."""
    half = config.head_dim // 2
    angle = position_L[:, None].float() * config.rope_theta ** -(torch.arange(half) / half)
    return angle.cos(), angle.sin()


def _rotate(x_1HLE: Tensor, rotated: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotated
    a, b = x_1HLE.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _times(matrix: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, matrix.weight, matrix.bias)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def _projected(
    layer: nn.Module, x_1LC: Tensor, rotated: tuple[Tensor, Tensor], expert: str, head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, H, L, E] of one expert ("" for words, "_moe_gen" for latents)."""
    own = layer.self_attn
    normed = _normed(getattr(layer, f"input_layernorm{expert}"), x_1LC)
    q, k, v = (
        _times(getattr(own, f"{name}_proj{expert}"), normed).unflatten(-1, (-1, head)).transpose(1, 2) for name in "qkv"
    )
    q, k = _normed(getattr(own, f"q_norm{expert}"), q), _normed(getattr(own, f"k_norm{expert}"), k)
    return _rotate(q, rotated), _rotate(k, rotated), v


def _after(layer: nn.Module, x_1LC: Tensor, attended_1HLE: Tensor, expert: str) -> Tensor:
    """The rest of a layer after its attention."""
    merged = attended_1HLE.transpose(1, 2).flatten(2)
    x_1LC = x_1LC + _times(getattr(layer.self_attn, f"o_proj{expert}"), merged)
    norm, mlp = getattr(layer, f"post_attention_layernorm{expert}"), getattr(layer, f"mlp{expert}")
    normed = _normed(norm, x_1LC)
    return x_1LC + _times(mlp.down_proj, F.silu(_times(mlp.gate_proj, normed)) * _times(mlp.up_proj, normed))


def read(network: MoT, cache: Cache, ids: Sequence[int]) -> Tensor:
    """Feed tokens, which join the cache; their final states [L, C]."""
    model, config, past, new = network.language_model.model, network.config, cache.length, len(ids)
    x_1LC = model.embed_tokens(torch.tensor([ids]))
    rotated = _rotation(config, torch.arange(past, past + new))
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past) if past and new > 1 else None
    for index, layer in enumerate(model.layers):
        q, k, v = _projected(layer, x_1LC, rotated, "", config.head_dim)
        cache.keys[index] = torch.cat([cache.keys[index], k], dim=2)
        cache.values[index] = torch.cat([cache.values[index], v], dim=2)
        attended = F.scaled_dot_product_attention(
            q,
            cache.keys[index],
            cache.values[index],
            attn_mask=mask,
            is_causal=not past and new > 1,
            enable_gqa=True,
        )
        x_1LC = _after(layer, x_1LC, attended, "")
    cache.length += new
    return _normed(model.norm, x_1LC)[0]


def velocity(network: MoT, cache: Cache, x_ND: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
    """v_ND of one noisy image after the text in the cache, which stays as it is."""
    model, config = network.language_model.model, network.config
    latent = network.vae2llm(x_ND) + network.time_embedder(t[None]) + network.latent_pos_embed(*grid)
    latent, edges = latent[None], model.embed_tokens(torch.tensor([network.boundary_ids]))
    rotated = _rotation(config, torch.tensor([cache.length]))
    tokens = len(x_ND)
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        q, k, v = _projected(layer, latent, rotated, "_moe_gen", config.head_dim)
        q_edge, k_edge, v_edge = _projected(layer, edges, rotated, "", config.head_dim)
        attended = F.scaled_dot_product_attention(
            torch.cat([q, q_edge], dim=2),
            torch.cat([keys, k, k_edge], dim=2),
            torch.cat([values, v, v_edge], dim=2),
            enable_gqa=True,
        )
        latent = _after(layer, latent, attended[:, :, :tokens], "_moe_gen")
        edges = _after(layer, edges, attended[:, :, tokens:], "")
    out_ND = network.llm2vae(_normed(model.norm_moe_gen, latent))[0]
    return out_ND if config.prediction == "velocity" else (x_ND - out_ND) / t.clamp_min(1e-3)


# ----- sampling


@torch.no_grad()
def rollout(
    policy: MoTPolicy, prompt: Prompt, members: int, sampling: Sampling, window: flow.Window, seed: int
) -> list[Episode]:
    """`members` episodes of a prompt, one after the other; the same that the package's `rollout` draws."""
    return [_episode(policy, prompt, member, sampling, window, seed) for member in range(members)]


def _episode(
    policy: MoTPolicy, prompt: Prompt, member: int, sampling: Sampling, window: flow.Window, seed: int
) -> Episode:
    own, cache = derive(seed, prompt.id, member), Cache(policy.network.config)
    given = policy.preamble(prompt, sampling.think)
    read(policy.network, cache, [i for s in given if isinstance(s, GivenText) for i in s.ids.tolist()])
    text = (write(policy, cache, sampling, own),) if sampling.think else ()
    return Episode(prompt, member, own, (*given, *text, paint(policy, cache, sampling, window, own)))


def write(policy: MoTPolicy, cache: Cache, sampling: Sampling, seed: int) -> TextActions:
    """One text, word by word, until the stop token or the end of the budget."""
    draws = uniform(derive(seed, "text"), sampling.max_new_tokens)
    hidden_LC = read(policy.network, cache, [policy.open_id])
    ids: list[int] = []
    log_probs = []
    while len(ids) < sampling.max_new_tokens and policy.stop_id not in ids[-1:]:
        drawn = token(policy.logits(hidden_LC[-1]), temperature=sampling.temperature, uniform=draws[len(ids)])
        ids.append(int(drawn.id))
        log_probs.append(drawn.log_prob)
        hidden_LC = read(policy.network, cache, [ids[-1]])
    finished = ids[-1] == policy.stop_id
    closing = () if finished else (policy.stop_id,)
    if closing:
        read(policy.network, cache, closing)
    return TextActions(
        ids=torch.tensor(ids),
        log_prob=torch.stack(log_probs),
        finished=finished,
        temperature=sampling.temperature,
        opening=(policy.open_id,),
        closing=closing,
        text=policy.decode_text(torch.tensor(ids)),
    )


def paint(policy: MoTPolicy, cache: Cache, sampling: Sampling, window: flow.Window, seed: int) -> ImageActions:
    """One image, step by step, and its pixels."""
    grid = policy.grid(sampling.height, sampling.width)
    shape = (grid[0] * grid[1], policy.token_dim)
    times = flow.time_grid(sampling.steps, sampling.shift)
    noise_KND, x = normal(derive(seed, "steps"), window.size, *shape), normal(derive(seed, "start"), *shape)
    before, after, log_probs = [], [], []
    for k, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(policy.network, cache, x, t, grid)
        if k not in window.steps:
            x = flow.euler(x, v, t, t_next)
            continue
        own = {"noise_level": sampling.noise_level, "t_second": times[1], "noise": noise_KND[k - window.start]}
        action = flow.step(sampling.sde, x, v, t, t_next, **own)
        before.append(x)
        after.append(action.x_next)
        log_probs.append(action.log_prob)
        x = action.x_next
    return ImageActions(
        grid=grid,
        times=times,
        window=window,
        sde=sampling.sde,
        noise_level=sampling.noise_level,
        before=torch.stack(before),
        after=torch.stack(after),
        log_prob=torch.stack(log_probs),
        latent=x,
        pixels=policy.decode_pixels(x[None], grid)[0],
    )
