"""The mixture-of-transformers network in BAGEL's form, with BAGEL's tensor names.

Two sets of weights per layer, one attention. Text tokens, and the two boundary tokens around an image, go
through the text expert (no suffix); image latents go through the image expert (suffix `_moe_gen`).
A position sees

    text token        all earlier text and clean images, itself        (causal)
    image token       the whole context before it, its own image       (full)

and nothing outside a noisy image attends to it. So K noisy copies of an image after one context are K
ordinary *unmasked* attentions over `cat(context, own)`: each layer runs a text stream and an image stream,
and sampling with a cache and training replay are the same operations on the same tensors.

Every token of an image, boundaries included, has the RoPE position of the text length so far.
Time: t = 1 is noise, t = 0 is data, given to the network raw (not times 1000).

Shape letters: B rows (episodes), K noisy copies per row, R = B*K, L text tokens, S context slots,
N image tokens of D latent numbers each, C hidden width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.mot.config import MoTConfig
from unigrpo_cli.models.mot.context import MoTContext, append
from unigrpo_cli.models.mot.layers import MLP, Linear, PositionTable, RMSNorm, TimeEmbedder, embedding, rotation, widen
from unigrpo_cli.models.mot.vision import Connector, VisionTower
from unigrpo_cli.models.policy import Lengths, NoisyImage, PolicyOutput

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, see `layers.rotation`."""


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

    def project(self, x_BLC: Tensor, rotation: Rotation, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, L, E] of one expert, normalised and rotated."""

        def heads(name: str) -> Tensor:
            flat = getattr(self, f"{name}_proj{expert}")(x_BLC)
            return flat.unflatten(-1, (-1, self.config.head_dim))

        q = getattr(self, f"q_norm{expert}")(heads("q"), rotation)
        k = getattr(self, f"k_norm{expert}")(heads("k"), rotation)
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

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
        """`attend` for the text stream; in fp64 on a CPU.

        It is the one operation of that stream whose fp32 rounding depends on how many queries come together, and
        decoding brings one where replay brings all: nearly all drift between the two arose here (docs/log.md).
        """
        if q.device.type != "cpu":
            return self.attend(q, k, v, causal=causal, mask=mask)
        return self.attend(q.double(), k.double(), v.double(), causal=causal, mask=mask).to(q.dtype)

    def output(self, x: Tensor, expert: str) -> Tensor:
        return getattr(self, f"o_proj{expert}")(x)


class Text(NamedTuple):
    """The text stream of a pass: states, their rotation, and which keys they attend to (no mask: all)."""

    states_BLC: Tensor
    rotation: Rotation
    causal: bool
    mask: Tensor | None


class Image(NamedTuple):
    """The image stream of a pass: latents, their two boundary tokens, one rotation for all, and a mask over keys."""

    latent_RNC: Tensor
    boundary_REC: Tensor | None
    rotation: Rotation
    mask: Tensor | None


class LayerCache(NamedTuple):
    """Keys and values [B, H, capacity, E] of one layer; `used` slots are filled."""

    keys: Tensor
    values: Tensor
    used: int


class PassOptions(NamedTuple):
    """See `MoT.forward`. In the last layer boundary tokens only supply keys and values."""

    detach_context: bool
    keep_image: bool
    last: bool


class LayerOutput(NamedTuple):
    """States after a layer, its cache with the text appended, and with `keep_image` the image's keys and values.

    Tuples of tensors all through: compiled layers and FSDP's hooks find the tensors in them.
    """

    text_BLC: Tensor | None
    latent_RNC: Tensor | None
    boundary_REC: Tensor | None
    keys: Tensor
    values: Tensor
    image_cache: tuple[Tensor, Tensor] | None


class MoTLayer(nn.Module):
    """One layer: a text stream that extends the context, then an image stream that attends to it."""

    def __init__(self, config: MoTConfig):
        super().__init__()
        self.self_attn = Attention(config)
        for expert in ("", "_moe_gen"):
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(f"{name}{expert}", RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(f"mlp{expert}", MLP(config.hidden_size, config.intermediate_size))

    def _qkv(self, x: Tensor, rotation: Rotation, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(getattr(self, f"input_layernorm{expert}")(x), rotation, expert)

    def _residual(self, x: Tensor, attended: Tensor, expert: str) -> Tensor:
        x = x + self.self_attn.output(attended, expert)
        normed = getattr(self, f"post_attention_layernorm{expert}")(x)
        return x + getattr(self, f"mlp{expert}")(normed)

    def forward(self, text: Text | None, image: Image | None, cache: LayerCache, options: PassOptions) -> LayerOutput:
        """Both streams through one layer."""
        keys, values, used = cache
        text_BLC = latent_RNC = boundary_REC = image_cache = None
        if text is not None:
            q, k, v = self._qkv(text.states_BLC, text.rotation, "")
            keys, values = append(keys, used, k), append(values, used, v)
            used += k.shape[2]
            attended = self.self_attn.attend_text(
                q, keys[:, :, :used], values[:, :, :used], causal=text.causal, mask=text.mask
            )
            text_BLC = self._residual(text.states_BLC, attended, "")
        if image is not None:
            assert image.boundary_REC is not None
            latents = image.latent_RNC.shape[1]
            q, k, v = self._qkv(image.latent_RNC, image.rotation, "_moe_gen")
            q_edge, k_edge, v_edge = self._qkv(image.boundary_REC, image.rotation, "")
            past_k, past_v = keys[:, :, :used], values[:, :, :used]
            if options.detach_context:  # the boundary tokens are the text expert's too
                past_k, past_v, k_edge, v_edge = (x.detach() for x in (past_k, past_v, k_edge, v_edge))
            # One position for the whole image, so the order of its keys does not matter: latents, then boundaries.
            if options.keep_image:
                image_cache = torch.cat([k, k_edge], dim=2), torch.cat([v, v_edge], dim=2)
            attended = self.self_attn.attend(
                q if options.last else torch.cat([q, q_edge], dim=2),
                _after(past_k, k, k_edge),
                _after(past_v, v, v_edge),
                causal=False,
                mask=image.mask,
            )
            latent_RNC = self._residual(image.latent_RNC, attended[:, :latents], "_moe_gen")
            if not options.last:
                boundary_REC = self._residual(image.boundary_REC, attended[:, latents:], "")
        return LayerOutput(text_BLC, latent_RNC, boundary_REC, keys, values, image_cache)


KINDS = 64
"""Kinds of passes for which layers are compiled, above torch's own limit: text or images, with or without a mask, one
row or several, the last layer. Lengths, numbers of rows and weights are inputs.
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


class Decoder(nn.Module):
    """Embeddings, layers and both final norms; a module of its own because of the tensor names."""

    def __init__(self, config: MoTConfig):
        super().__init__()
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """The decoder and the head over the vocabulary, not tied to the embeddings."""

    def __init__(self, config: MoTConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)


class _Read(NamedTuple):
    """What the text expert reads in one pass, and the context's counters afterwards."""

    text: Text
    used: int
    valid_BS: Tensor | None
    position_B: Tensor


@cache
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids, copied to a device once."""
    return torch.tensor(ids, dtype=torch.long, device=device)


class MoT(nn.Module):
    """The network. Prefill, decode, denoise and replay are four argument patterns of `forward`.

    It computes in `dtype`, that of its fixed tables; trained weights may be kept wider. Norms, rotations, times,
    the projections from and to latents, and the head over the vocabulary are fp32.
    """

    def __init__(self, config: MoTConfig, boundary_ids: tuple[int, ...]):
        """`boundary_ids`: token ids of the image boundaries, <|vision_start|> and <|vision_end|>; () for none."""
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

    def empty_context(self, rows: int, capacity: int = 0) -> MoTContext:
        """The context before anything was said."""
        config = self.config
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)

        def blank() -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(config.num_hidden_layers)
            )

        position = torch.zeros(rows, dtype=torch.long, device=self.device)
        return MoTContext(blank(), blank(), 0, None, position)

    def encode_view(self, patches_BNP: Tensor, grid: tuple[int, int]) -> Tensor:
        """Given images as the text expert reads them: [B, N, C] from fp32 patches that share one grid."""
        features = self.vit_model(patches_BNP.to(self.dtype), grid)
        return self.connector(features) + self.vit_pos_embed(*grid)

    def forward(
        self,
        context: MoTContext,
        ids_BL: Tensor | None = None,
        length_B: Lengths = None,
        image: NoisyImage | None = None,
        *,
        view_BNC: Tensor | None = None,
        detach_context: bool = False,
        keep_image: bool = False,
        compiled: bool = False,
    ) -> PolicyOutput:
        """Read text or a given image into the context, then attend to it from noisy images.

        Args:
            context: what came before; not changed (its spare capacity may be written).
            ids_BL: text tokens, right-padded with any id; None for no text.
            length_B: valid tokens per row; None when all L are.
            image: noisy images that see the context including the new text; None for none.
            view_BNC: instead of text, one given image per row, from `encode_view`.
            detach_context: no gradient from images into the text expert, neither through the context nor through
                the boundary tokens.
            keep_image: append the image (K = 1, clean, t = 0) to the context and advance its position by one.
            compiled: take compiled layers, where no gradient is asked for.

        Returns:
            The new context, final-normed states of the text, velocities of the images.
        """
        model = self.language_model.model
        read = None
        if ids_BL is not None:
            read = self._read_text(context, ids_BL, length_B)
        elif view_BNC is not None:
            read = self._read_view(context, view_BNC)
        after = context if read is None else read
        text = None if read is None else read.text
        stream = None if image is None else self._image_stream(image, after.position_B, after.valid_BS)
        keys, values, kept = [], [], []
        for index, layer in enumerate(model.layers):
            options = PassOptions(detach_context, keep_image, last=index + 1 == len(model.layers))
            given = (text, stream, LayerCache(*context.layer(index), context.used), options)
            out: LayerOutput
            if self.activation_checkpointing and torch.is_grad_enabled():
                out = checkpoint(layer, *given, use_reentrant=False)
            elif compiled and not torch.is_grad_enabled():
                out = _by_compiled(layer, *given)
            else:
                out = layer(*given)
            if text is not None and out.text_BLC is not None:
                text = text._replace(states_BLC=out.text_BLC)
            if stream is not None and out.latent_RNC is not None:
                stream = stream._replace(latent_RNC=out.latent_RNC, boundary_REC=out.boundary_REC)
            keys.append(out.keys)
            values.append(out.values)
            kept.append(out.image_cache)
        grown = MoTContext(tuple(keys), tuple(values), after.used, after.valid_BS, after.position_B)
        if keep_image:
            grown = self._with_image(grown, kept)
        hidden = None if text is None else model.norm(text.states_BLC)
        velocity = None
        if image is not None and stream is not None:
            velocity = self._velocity(image, model.norm_moe_gen(stream.latent_RNC))
        return PolicyOutput(grown, hidden, velocity)

    def _read_text(self, context: MoTContext, ids_BL: Tensor, length_B: Lengths) -> _Read:
        """Text after the context: every token sees all before it."""
        rows, new = ids_BL.shape
        ragged = isinstance(length_B, Tensor) or (length_B is not None and any(n != new for n in length_B))
        step = torch.arange(new, device=self.device)
        if ragged:
            length = torch.as_tensor(length_B, device=self.device)
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
        rotation = self._rotation(context.position_B[:, None] + step)
        text = Text(self._embed(ids_BL), rotation, context.used == 0, mask)
        return _Read(text, context.used + new, valid_BS, context.position_B + length)

    def _read_view(self, context: MoTContext, view_BNC: Tensor) -> _Read:
        """A given image between its boundary tokens: all see each other, at one position for all of them."""
        rows = len(view_BNC)
        boundary = self._boundary(rows)
        states = torch.cat([boundary[:, :1], view_BNC.to(self.dtype), boundary[:, 1:]], dim=1)
        new, mask, valid_BS = states.shape[1], None, None
        if context.valid_BS is not None:
            valid_BS = torch.cat([context.valid_BS, context.valid_BS.new_ones(rows, new)], dim=1)
            mask = valid_BS[:, None, None, :]
        text = Text(states, self._rotation(context.position_B[:, None]), False, mask)
        return _Read(text, context.used + new, valid_BS, context.position_B + 1)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.language_model.model.embed_tokens(ids).to(self.dtype)

    def _boundary(self, rows: int) -> Tensor:
        """States of the boundary tokens, [rows, 2, C]."""
        return self._embed(_on_device(self.boundary_ids, self.device)).expand(rows, -1, -1)

    def _rotation(self, position_BL: Tensor) -> Rotation:
        return rotation(position_BL, self.config.head_dim, self.config.rope_theta)

    def _image_stream(self, image: NoisyImage, position_B: Tensor, valid_BS: Tensor | None) -> Image:
        """The K noisy copies of each row's image as R rows. All tokens of an image share one rotation."""
        copies = image.x_BKND.shape[1]
        x_RND = image.x_BKND.flatten(0, 1)
        wide = torch.promote_types(self.dtype, torch.float32)
        latent = self.vae2llm(x_RND.to(wide)) + self.time_embedder(image.t_BK.flatten().to(wide))[:, None]
        latent = (latent + self.latent_pos_embed(*image.grid)).to(self.dtype)
        rotation = self._rotation(position_B.repeat_interleave(copies, 0)[:, None])
        boundary, mask = self._boundary(len(x_RND)), None
        if valid_BS is not None:
            seen = valid_BS.repeat_interleave(copies, 0)
            own = seen.new_ones(len(seen), latent.shape[1] + boundary.shape[1])
            mask = torch.cat([seen, own], dim=1)[:, None, None, :]
        return Image(latent, boundary, rotation, mask)

    def _velocity(self, image: NoisyImage, hidden_RNC: Tensor) -> Tensor:
        """fp32 velocities [B, K, N, D] from final image states."""
        out = self.llm2vae(widen(hidden_RNC)).view_as(image.x_BKND)
        if self.config.prediction == "velocity":
            return out
        return (image.x_BKND - out) / image.t_BK.clamp_min(1e-3)[..., None, None]

    def _with_image(self, context: MoTContext, kept: list[tuple[Tensor, Tensor] | None]) -> MoTContext:
        """The context with a clean image appended."""
        caches = [cache for cache in kept if cache is not None]
        own = caches[0][0].shape[2]
        valid = context.valid_BS
        if valid is not None:
            valid = torch.cat([valid, valid.new_ones(context.rows, own)], dim=1)
        return MoTContext(
            tuple(append(k, context.used, new) for k, (new, _) in zip(context.keys, caches, strict=True)),
            tuple(append(v, context.used, new) for v, (_, new) in zip(context.values, caches, strict=True)),
            context.used + own,
            valid,
            context.position_B + 1,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits over the vocabulary for the rows of `hidden` [..., C]."""
        return self.language_model.lm_head(widen(hidden))
