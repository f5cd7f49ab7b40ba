"""The mixture-of-transformers network in BAGEL's form, with BAGEL's tensor names.

Two sets of weights per layer, one attention. Text tokens, and the two boundary tokens around an image, go
through the text expert (no suffix); image latents go through the image expert (suffix `_moe_gen`).
A position sees

    text token        all earlier text and clean images, itself        (causal)
    image token       the whole context before it, its own image       (full)

and nobody outside a noisy image ever sees it. So K noisy copies of an image after one context are K
ordinary *unmasked* attentions over `cat(context, own)`: each layer runs a text stream and an image stream,
and sampling with a cache and training replay are the same operations on the same tensors.

Every token of an image, boundaries included, has the RoPE position of the text length so far.
Time: t = 1 is noise, t = 0 is data, given to the network raw (not times 1000).

Shape letters: B rows (episodes), K noisy copies per row, R = B*K, L text tokens, S context slots,
N image tokens of D latent numbers each, C hidden width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unigrpo_cli.models.context import Context, append
from unigrpo_cli.models.sizes import MoTConfig


def widen(x: Tensor) -> Tensor:
    """fp32 for anything narrower; fp64 stays, so that tests can look closer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32, returned in the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(widen(x), x.shape[-1:], widen(self.weight), self.eps).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotation(position_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, L, head_dim / 2] of the rotary embedding, in fp32, for every layer of a pass."""
    half = head_dim // 2
    frequency = theta ** -(torch.arange(half, device=position_BL.device, dtype=torch.float32) / half)
    angle = position_BL[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x_BHLE: Tensor, turned: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding on the two halves of each head, in fp32."""
    cos, sin = turned
    a, b = widen(x_BHLE).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BHLE.dtype)


class Attention(nn.Module):
    """Projections of both experts around one attention; `expert` is "" (text) or "_moe_gen" (image)."""

    def __init__(self, config: MoTConfig):
        super().__init__()
        self.config = config
        width, head = config.hidden_size, config.head_dim
        inner, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        for expert in ("", "_moe_gen"):
            self.add_module(f"q_proj{expert}", nn.Linear(width, inner))
            self.add_module(f"k_proj{expert}", nn.Linear(width, kv))
            self.add_module(f"v_proj{expert}", nn.Linear(width, kv))
            self.add_module(f"o_proj{expert}", nn.Linear(inner, width, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(head, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", RMSNorm(head, config.rms_norm_eps))

    def project(self, x_BLC: Tensor, turned: tuple[Tensor, Tensor], expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, L, E] of one expert, normalised and rotated."""

        def heads(name: str) -> Tensor:
            flat = getattr(self, f"{name}_proj{expert}")(x_BLC)
            return flat.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        q = rotate(getattr(self, f"q_norm{expert}")(heads("q")), turned)
        k = rotate(getattr(self, f"k_norm{expert}")(heads("k")), turned)
        return q, k, heads("v")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
        """Softmax attention over keys, heads merged: [B, L, H*E]. Scores scaled by 1/sqrt(E)."""
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(2)

    def attend_words(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
        """`attend` for the text stream; on a CPU in fp64.

        It is the one operation of that stream whose fp32 rounding depends on how many queries come together, and
        decoding brings one where replay brings all: nearly all drift between the two arose here (docs/log.md).
        """
        if q.device.type != "cpu":
            return self.attend(q, k, v, causal=causal, mask=mask)
        return self.attend(q.double(), k.double(), v.double(), causal=causal, mask=mask).to(q.dtype)

    def output(self, x: Tensor, expert: str) -> Tensor:
        return getattr(self, f"o_proj{expert}")(x)


@dataclass(frozen=True)
class _Masks:
    """Attention masks of one forward pass, shared by its layers; None means "attend to all"."""

    text_causal: bool
    text: Tensor | None
    image: Tensor | None


class MoTLayer(nn.Module):
    """One layer: a text stream that extends the context, then an image stream that looks at it."""

    def __init__(self, config: MoTConfig):
        super().__init__()
        self.self_attn = Attention(config)
        for expert in ("", "_moe_gen"):
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(f"{name}{expert}", RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(f"mlp{expert}", MLP(config.hidden_size, config.intermediate_size))

    def _qkv(self, x: Tensor, turned: tuple[Tensor, Tensor], expert: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(getattr(self, f"input_layernorm{expert}")(x), turned, expert)

    def _residual(self, x: Tensor, attended: Tensor, expert: str) -> Tensor:
        x = x + self.self_attn.output(attended, expert)
        normed = getattr(self, f"post_attention_layernorm{expert}")(x)
        return x + getattr(self, f"mlp{expert}")(normed)

    def forward(
        self,
        text_BLC: Tensor | None,
        text_turned: tuple[Tensor, Tensor] | None,
        latent_RNC: Tensor | None,
        edge_REC: Tensor | None,
        image_turned: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        values: Tensor,
        used: int,
        masks: _Masks,
        detach_context: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Both streams through one layer.

        Returns the new text, latent and edge states, the context keys and values with the text appended,
        and the image's own keys and values (which join the context only when the image is a clean one).
        """
        if text_BLC is not None:
            assert text_turned is not None
            q, k, v = self._qkv(text_BLC, text_turned, "")
            keys, values = append(keys, used, k), append(values, used, v)
            used += k.shape[2]
            attended = self.self_attn.attend_words(
                q, keys[:, :, :used], values[:, :, :used], causal=masks.text_causal, mask=masks.text
            )
            text_BLC = self._residual(text_BLC, attended, "")
        own_k = own_v = None
        if latent_RNC is not None:
            assert edge_REC is not None and image_turned is not None
            latents = latent_RNC.shape[1]
            q, k, v = self._qkv(latent_RNC, image_turned, "_moe_gen")
            q_edge, k_edge, v_edge = self._qkv(edge_REC, image_turned, "")
            past_k, past_v = keys[:, :, :used], values[:, :, :used]
            if detach_context:
                # The boundary tokens are the text expert's too, so all it says to the latents is cut here.
                past_k, past_v, k_edge, v_edge = (x.detach() for x in (past_k, past_v, k_edge, v_edge))
            # One position for the whole image, so the order of its keys does not matter: latents, then edges.
            own_k, own_v = torch.cat([k, k_edge], dim=2), torch.cat([v, v_edge], dim=2)
            copies = latent_RNC.shape[0] // past_k.shape[0]
            attended = self.self_attn.attend(
                torch.cat([q, q_edge], dim=2),
                torch.cat([past_k.repeat_interleave(copies, 0), own_k], dim=2),
                torch.cat([past_v.repeat_interleave(copies, 0), own_v], dim=2),
                causal=False,
                mask=masks.image,
            )
            latent_RNC = self._residual(latent_RNC, attended[:, :latents], "_moe_gen")
            edge_REC = self._residual(edge_REC, attended[:, latents:], "")
        return text_BLC, latent_RNC, edge_REC, keys, values, own_k, own_v


class TimeEmbedder(nn.Module):
    """Sinusoids of t (256 numbers, cosines first) through a two-layer SiLU network."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_R: Tensor) -> Tensor:
        waves = get_timestep_embedding(t_R.float(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LatentPositions(nn.Module):
    """Fixed 2-D sine-cosine table, one row per latent token of the largest image. Never trained."""

    def __init__(self, side: int, width: int):
        super().__init__()
        table = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
        self.pos_embed = nn.Parameter(table.float(), requires_grad=False)
        self.side = side

    def forward(self, rows: int, columns: int) -> Tensor:
        table = self.pos_embed.view(self.side, self.side, -1)
        return table[:rows, :columns].reshape(rows * columns, -1)


@dataclass(frozen=True)
class MoTOutput:
    """What one pass gives. `hidden_BLC` is final-normed text states; `velocity_BKND` is fp32."""

    context: Context
    hidden_BLC: Tensor | None = None
    velocity_BKND: Tensor | None = None


@dataclass(frozen=True)
class NoisyImage:
    """K noisy copies of each row's image: latents x_BKND in fp32, times t_BK, grid of tokens."""

    x_BKND: Tensor
    t_BK: Tensor
    grid: tuple[int, int] = field(default=(0, 0))  # token rows and columns; rows * columns = N


class Decoder(nn.Module):
    """Embeddings, layers and both final norms; a room of its own for the sake of the tensor names."""

    def __init__(self, config: MoTConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """The decoder and the head over the vocabulary, not tied to the embeddings."""

    def __init__(self, config: MoTConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class MoT(nn.Module):
    """The network. Prefill, decode, denoise and replay are four argument patterns of `forward`."""

    def __init__(self, config: MoTConfig, edge_ids: tuple[int, int]):
        """`edge_ids`: token ids of the image boundaries, <|vision_start|> and <|vision_end|>."""
        super().__init__()
        self.config = config
        self.edge_ids = edge_ids
        self.activation_checkpointing = False
        width = config.hidden_size
        self.language_model = LanguageModel(config)
        self.time_embedder = TimeEmbedder(width)
        self.vae2llm = nn.Linear(config.token_dim, width)
        self.llm2vae = nn.Linear(width, config.token_dim)
        self.latent_pos_embed = LatentPositions(config.max_latent_size, width)

    @property
    def device(self) -> torch.device:
        return self.vae2llm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae2llm.weight.dtype

    def empty_context(self, rows: int, capacity: int = 0) -> Context:
        """The context before anything was said."""
        config = self.config
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)

        def blank() -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(config.num_hidden_layers)
            )

        position = torch.zeros(rows, dtype=torch.long, device=self.device)
        return Context(blank(), blank(), 0, None, position)

    def forward(
        self,
        context: Context,
        ids_BL: Tensor | None = None,
        length_B: list[int] | None = None,
        image: NoisyImage | None = None,
        *,
        detach_context: bool = False,
        keep_image: bool = False,
    ) -> MoTOutput:
        """Read text into the context, then look at images in it.

        Args:
            context: what came before; not changed (its spare capacity may be written).
            ids_BL: text tokens, right-padded with any id; None for no text.
            length_B: valid tokens per row; None when all L are.
            image: noisy images that see the context including the new text; None for none.
            detach_context: no gradient from images into the text expert, neither through the context nor through
                the boundary tokens.
            keep_image: append the image (K = 1, clean, t = 0) to the context and advance its position by one.

        Returns:
            Hidden states of the text, velocities v = noise - data of the images (fp32), the new context.
        """
        model = self.language_model.model
        text = text_turned = valid_BS = None
        text_causal, text_mask = False, None
        used, position_B = context.used, context.position_B
        total = used
        if ids_BL is not None:
            rows, new = ids_BL.shape
            ragged = length_B is not None and any(n != new for n in length_B)
            step = torch.arange(new, device=self.device)
            text = model.embed_tokens(ids_BL)
            text_turned = self._rotation(position_B[:, None] + step)
            if ragged:
                length = torch.tensor(length_B, device=self.device)
            else:
                length = torch.full((rows,), new, device=self.device)
            if ragged or context.valid_BS is not None:
                valid_BS = torch.cat([context.validity(), step < length[:, None]], dim=1)
            # Right padding comes after every valid token of its row, so causality alone hides it.
            if used == 0:
                text_causal = True
            elif new > 1 or context.valid_BS is not None:
                past = context.validity()[:, None, None, :].expand(-1, 1, new, -1)
                causal = (step[:, None] >= step)[None, None].expand(rows, 1, -1, -1)
                text_mask = torch.cat([past, causal], dim=-1)
            total, position_B = used + new, position_B + length
        else:
            valid_BS = context.valid_BS

        latent = edge = image_turned = image_mask = None
        if image is not None:
            latent, edge, image_turned = self._image_stream(image, position_B)
            if valid_BS is not None:
                own = latent.shape[1] + edge.shape[1]
                seen = valid_BS.repeat_interleave(image.x_BKND.shape[1], 0)
                image_mask = torch.cat([seen, seen.new_ones(len(seen), own)], dim=1)[:, None, None, :]

        masks = _Masks(text_causal, text_mask, image_mask)
        keys, values, kept = [], [], []
        for index, layer in enumerate(model.layers):
            given = (text, text_turned, latent, edge, image_turned, *context.layer(index), used, masks)
            if self.activation_checkpointing and torch.is_grad_enabled():
                out = checkpoint(layer, *given, detach_context, use_reentrant=False)
            else:
                out = layer(*given, detach_context)
            text, latent, edge, k, v, own_k, own_v = out
            keys.append(k)
            values.append(v)
            kept.append((own_k, own_v))

        after = Context(tuple(keys), tuple(values), total, valid_BS, position_B)
        if keep_image:
            after = self._with_image(after, kept)
        hidden = None if text is None else model.norm(text)
        velocity = None if image is None else self._velocity(image, model.norm_moe_gen(latent))
        return MoTOutput(after, hidden, velocity)

    def _rotation(self, position_BL: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(position_BL, self.config.head_dim, self.config.rope_theta)

    def _image_stream(self, image: NoisyImage, position_B: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Input states of latents [R, N, C] and edges [R, 2, C], and the rotation that all of an image shares."""
        copies = image.x_BKND.shape[1]
        x_RND = image.x_BKND.flatten(0, 1).to(self.dtype)
        time_RC = self.time_embedder(image.t_BK.flatten())
        latent = self.vae2llm(x_RND) + time_RC[:, None] + self.latent_pos_embed(*image.grid).to(self.dtype)
        edge_ids = torch.tensor(self.edge_ids, device=self.device)
        edge = self.language_model.model.embed_tokens(edge_ids).expand(len(x_RND), -1, -1)
        return latent, edge, self._rotation(position_B.repeat_interleave(copies, 0)[:, None])

    def _velocity(self, image: NoisyImage, hidden_RNC: Tensor) -> Tensor:
        """fp32 velocities [B, K, N, D] from final image states."""
        out = widen(self.llm2vae(hidden_RNC)).view_as(image.x_BKND)
        if self.config.prediction == "velocity":
            return out
        return (image.x_BKND - out) / image.t_BK.clamp_min(1e-3)[..., None, None]

    def _with_image(self, context: Context, kept: list[tuple[Tensor, Tensor]]) -> Context:
        """The context with a clean image appended."""
        own = kept[0][0].shape[2]
        valid = context.valid_BS
        if valid is not None:
            valid = torch.cat([valid, valid.new_ones(context.rows, own)], dim=1)
        return Context(
            tuple(append(k, context.used, new) for k, (new, _) in zip(context.keys, kept, strict=True)),
            tuple(append(v, context.used, new) for v, (_, new) in zip(context.values, kept, strict=True)),
            context.used + own,
            valid,
            context.position_B + 1,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits over the vocabulary for the rows of `hidden` [..., C]."""
        return widen(self.language_model.lm_head(hidden))


def expert_of(name: str) -> str:
    """Which expert a parameter belongs to: "image" for `_moe_gen` and the latent projections, else "text".

    BAGEL's learning rates are per expert. The projections in and out of latent space and the time embedding
    touch image tokens only, so they go with the image expert.
    """
    image_only = ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")
    return "image" if "_moe_gen" in name or name.startswith(image_only) else "text"
