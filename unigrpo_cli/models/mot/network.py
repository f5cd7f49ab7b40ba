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

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.mot.config import MoTConfig
from unigrpo_cli.models.mot.context import Context, append
from unigrpo_cli.models.mot.layers import MLP, Linear, PositionTable, RMSNorm, TimeEmbedder, rotation, widen
from unigrpo_cli.models.mot.vision import Connector, VisionTower


class Attention(nn.Module):
    """Projections of both experts around one attention; `expert` is "" (text) or "_moe_gen" (image)."""

    def __init__(self, config: MoTConfig):
        super().__init__()
        self.config = config
        width, head = config.hidden_size, config.head_dim
        inner, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        for expert in ("", "_moe_gen"):
            self.add_module(f"q_proj{expert}", Linear(width, inner))
            self.add_module(f"k_proj{expert}", Linear(width, kv))
            self.add_module(f"v_proj{expert}", Linear(width, kv))
            self.add_module(f"o_proj{expert}", Linear(inner, width, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(head, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", RMSNorm(head, config.rms_norm_eps))

    def project(self, x_BLC: Tensor, rotated: tuple[Tensor, Tensor], expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, L, E] of one expert, normalised and rotated."""

        def heads(name: str) -> Tensor:
            flat = getattr(self, f"{name}_proj{expert}")(x_BLC)
            return flat.unflatten(-1, (-1, self.config.head_dim))

        q = getattr(self, f"q_norm{expert}")(heads("q"), rotated)
        k = getattr(self, f"k_norm{expert}")(heads("k"), rotated)
        return q.transpose(1, 2), k.transpose(1, 2), heads("v").transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
        """Softmax attention over keys, heads merged: [B, L, H*E]. Scores scaled by 1/sqrt(E)."""
        heads, shared = q.shape[1], k.shape[1]
        if mask is None or heads == shared:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=heads != shared)
        elif mask.shape[2] == 1:
            # A GPU's fused kernel that takes a mask takes no grouped heads. Where the mask is one for all queries,
            # those of a group can come one after the other as one head's: the same sums, nothing repeated.
            folded = q.unflatten(1, (shared, -1)).flatten(2, 3)
            out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
            out = out.unflatten(2, (heads // shared, -1)).flatten(1, 2)
        else:
            k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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

    def _qkv(self, x: Tensor, rotated: tuple[Tensor, Tensor], expert: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(getattr(self, f"input_layernorm{expert}")(x), rotated, expert)

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
        keep_image: bool,
        last: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Both streams through one layer.

        Returns the new text, latent and edge states, the context keys and values with the text appended,
        and with `keep_image` the image's own keys and values. After the last layer nobody reads the edges: there
        they say what they have to say to the latents, and have no states.
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
            if keep_image:
                own_k, own_v = torch.cat([k, k_edge], dim=2), torch.cat([v, v_edge], dim=2)
            attended = self.self_attn.attend(
                q if last else torch.cat([q, q_edge], dim=2),
                _after(past_k, k, k_edge),
                _after(past_v, v, v_edge),
                causal=False,
                mask=masks.image,
            )
            latent_RNC = self._residual(latent_RNC, attended[:, :latents], "_moe_gen")
            edge_REC = None if last else self._residual(edge_REC, attended[:, latents:], "")
        return text_BLC, latent_RNC, edge_REC, keys, values, own_k, own_v


KINDS = 64
"""Kinds of passes for which layers are compiled, more than torch's own limit: words or images, with a mask or
without, one row or several, the last layer. Lengths and numbers of rows are inputs, and so are weights.
"""


@cache
def _compiled_forward() -> Callable[..., Any]:
    """One for all layers of all networks."""
    return torch.compile(MoTLayer.forward, fullgraph=True, dynamic=True)


def _by_compiled(layer: nn.Module, *given: Any) -> Any:
    from torch._dynamo import config, exc  # takes a second to import

    if config.recompile_limit < KINDS:  # each thread has a limit of its own
        config.recompile_limit = KINDS
    try:
        return _compiled_forward()(layer, *given)
    except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"layers cannot be compiled here ({reason}); give sampling.compile=false") from error


def _after(past: Tensor, *own: Tensor) -> Tensor:
    """Keys or values [R, H, S + N, E] that an image's copies see: their row's past [B, H, S, E], then their own."""
    copies = own[0].shape[0] // past.shape[0]
    if copies == 1:
        return torch.cat([past, *own], dim=2)
    shared = past[:, None].expand(-1, copies, -1, -1, -1)
    return torch.cat([shared, *(x.unflatten(0, (-1, copies)) for x in own)], dim=3).flatten(0, 1)


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
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)


@dataclass(frozen=True)
class _Read:
    """What the text expert reads in one pass: states, rotation, what each may see, and the counters afterwards."""

    states_BLC: Tensor
    rotated: tuple[Tensor, Tensor]
    causal: bool
    mask: Tensor | None
    valid_BS: Tensor | None
    used: int
    position_B: Tensor


class MoT(nn.Module):
    """The network. Prefill, decode, denoise and replay are four argument patterns of `forward`.

    It computes in `dtype`, that of its fixed tables; trained weights may be kept wider. Norms, rotations, times,
    the projections from and to latents, and the head over the vocabulary are fp32.
    """

    def __init__(self, config: MoTConfig, boundary_ids: tuple[int, ...]):
        """`edge_ids`: token ids of the image boundaries, <|vision_start|> and <|vision_end|>; () for none."""
        super().__init__()
        self.config = config
        self.boundary_ids = boundary_ids
        self.activation_checkpointing = False
        width = config.hidden_size
        self.language_model = LanguageModel(config)
        self.time_embedder = TimeEmbedder(width)
        self.vae2llm = Linear(config.token_dim, width)
        self.llm2vae = Linear(width, config.token_dim)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width)
        if config.vision is not None:
            self.vit_model = VisionTower(config.vision)
            self.connector = Connector(config.vision.hidden_size, width, width)
            self.vit_pos_embed = PositionTable(config.vision.side, width)

    @property
    def device(self) -> torch.device:
        return self.latent_pos_embed.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.latent_pos_embed.pos_embed.dtype

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

    def see(self, patches_BNP: Tensor, grid: tuple[int, int]) -> Tensor:
        """Given pictures as the text expert reads them: [B, N, C] from fp32 patches that share one grid."""
        features = self.vit_model(patches_BNP.to(self.dtype), grid)
        return self.connector(features) + self.vit_pos_embed(*grid)

    def forward(
        self,
        context: Context,
        ids_BL: Tensor | None = None,
        length_B: list[int] | None = None,
        image: NoisyImage | None = None,
        *,
        seen_BNC: Tensor | None = None,
        detach_context: bool = False,
        keep_image: bool = False,
        compiled: bool = False,
    ) -> MoTOutput:
        """Read text or a given picture into the context, then look at images in it.

        Args:
            context: what came before; not changed (its spare capacity may be written).
            ids_BL: text tokens, right-padded with any id; None for no text.
            length_B: valid tokens per row; None when all L are.
            image: noisy images that see the context including the new text; None for none.
            seen_BNC: instead of text, one given picture per row, from `see`.
            detach_context: no gradient from images into the text expert, neither through the context nor through
                the boundary tokens.
            keep_image: append the image (K = 1, clean, t = 0) to the context and advance its position by one.
            compiled: take compiled layers, where no gradient is asked for.

        Returns:
            Hidden states of the text, velocities v = noise - data of the images (fp32), the new context.

        Raises:
            UsageError: when layers cannot be compiled here.
        """
        model = self.language_model.model
        read = None
        if ids_BL is not None:
            read = self._words(context, ids_BL, length_B)
        elif seen_BNC is not None:
            read = self._picture(context, seen_BNC)
        text, text_turned = (None, None) if read is None else (read.states_BLC, read.rotated)
        after = context if read is None else read

        latent = edge = image_turned = image_mask = None
        if image is not None:
            latent, edge, image_turned = self._image_stream(image, after.position_B)
            if after.valid_BS is not None:
                own = latent.shape[1] + edge.shape[1]
                seen = after.valid_BS.repeat_interleave(image.x_BKND.shape[1], 0)
                image_mask = torch.cat([seen, seen.new_ones(len(seen), own)], dim=1)[:, None, None, :]

        masks = _Masks(read is not None and read.causal, None if read is None else read.mask, image_mask)
        keys, values, kept = [], [], []
        for index, layer in enumerate(model.layers):
            given = (text, text_turned, latent, edge, image_turned, *context.layer(index), context.used, masks)
            how = (detach_context, keep_image, index + 1 == len(model.layers))
            if self.activation_checkpointing and torch.is_grad_enabled():
                out = checkpoint(layer, *given, *how, use_reentrant=False)
            elif compiled and not torch.is_grad_enabled():
                out = _by_compiled(layer, *given, *how)
            else:
                out = layer(*given, *how)
            text, latent, edge, k, v, own_k, own_v = out
            keys.append(k)
            values.append(v)
            kept.append((own_k, own_v))

        grown = Context(tuple(keys), tuple(values), after.used, after.valid_BS, after.position_B)
        if keep_image:
            grown = self._with_image(grown, kept)
        hidden = None if text is None else model.norm(text)
        velocity = None if image is None else self._velocity(image, model.norm_moe_gen(latent))
        return MoTOutput(grown, hidden, velocity)

    def _words(self, context: Context, ids_BL: Tensor, length_B: list[int] | None) -> _Read:
        """Text after the context: every token sees all before it."""
        rows, new = ids_BL.shape
        ragged = length_B is not None and any(n != new for n in length_B)
        step = torch.arange(new, device=self.device)
        if ragged:
            length = torch.tensor(length_B, device=self.device)
        else:
            length = torch.full((rows,), new, device=self.device)
        valid_BS = None
        if ragged or context.valid_BS is not None:
            valid_BS = torch.cat([context.validity(), step < length[:, None]], dim=1)
        # Right padding comes after every valid token of its row, so causality alone hides it.
        mask = None
        if context.used and (new > 1 or context.valid_BS is not None):
            past = context.validity()[:, None, None, :].expand(-1, 1, new, -1)
            causal = (step[:, None] >= step)[None, None].expand(rows, 1, -1, -1)
            mask = torch.cat([past, causal], dim=-1)
        return _Read(
            self._embed(ids_BL),
            self._rotation(context.position_B[:, None] + step),
            context.used == 0,
            mask,
            valid_BS,
            context.used + new,
            context.position_B + length,
        )

    def _picture(self, context: Context, seen_BNC: Tensor) -> _Read:
        """A given picture between its boundary tokens: all see each other, at one position for all of them."""
        rows = len(seen_BNC)
        edges = self._edges(rows)
        states = torch.cat([edges[:, :1], seen_BNC.to(self.dtype), edges[:, 1:]], dim=1)
        new, mask, valid_BS = states.shape[1], None, None
        if context.valid_BS is not None:
            valid_BS = torch.cat([context.valid_BS, context.valid_BS.new_ones(rows, new)], dim=1)
            mask = valid_BS[:, None, None, :]
        rotated = self._rotation(context.position_B[:, None])
        return _Read(states, rotated, False, mask, valid_BS, context.used + new, context.position_B + 1)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.language_model.model.embed_tokens(ids).to(self.dtype)

    def _edges(self, rows: int) -> Tensor:
        """States of the boundary tokens, [rows, 2, C]."""
        return self._embed(torch.tensor(self.boundary_ids, dtype=torch.long, device=self.device)).expand(rows, -1, -1)

    def _rotation(self, position_BL: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(position_BL, self.config.head_dim, self.config.rope_theta)

    def _image_stream(self, image: NoisyImage, position_B: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Input states of latents [R, N, C] and edges [R, 2, C], and the rotation that all of an image shares."""
        copies = image.x_BKND.shape[1]
        x_RND = image.x_BKND.flatten(0, 1)
        wide = torch.promote_types(self.dtype, torch.float32)
        latent = self.vae2llm(x_RND.to(wide)) + self.time_embedder(image.t_BK.flatten().to(wide))[:, None]
        latent = (latent + self.latent_pos_embed(*image.grid)).to(self.dtype)
        rotated = self._rotation(position_B.repeat_interleave(copies, 0)[:, None])
        return latent, self._edges(len(x_RND)), rotated

    def _velocity(self, image: NoisyImage, hidden_RNC: Tensor) -> Tensor:
        """fp32 velocities [B, K, N, D] from final image states."""
        out = self.llm2vae(widen(hidden_RNC)).view_as(image.x_BKND)
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
        return self.language_model.lm_head(widen(hidden))
