"""Sizes of a mixture-of-transformers, and the names and shapes of all its tensors. Imports no torch.

The names are those of BAGEL's release: `ema.safetensors` for the network, `ae.safetensors` for the autoencoder.
"""

from __future__ import annotations

from dataclasses import dataclass

PREDICTIONS = ("velocity", "clean")
LATENT_POSITIONS, VISION_POSITIONS = "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"
TABLES = (LATENT_POSITIONS, VISION_POSITIONS)
"""Fixed sine-cosine tables: formulas, so a file may lack them; where it has them its own (rounded) ones count."""
VISION_PREFIXES = ("vit_model.", "connector.", "vit_pos_embed.")
"""Parts of BAGEL that only image understanding and editing need."""
LAYERS = "language_model.model.layers."
"""What full tuning trains."""
ALSO = {
    "embeddings": ("language_model.model.embed_tokens.",),
    "head": ("language_model.lm_head.",),
    "norms": ("language_model.model.norm.", "language_model.model.norm_moe_gen."),
    "projections": ("vae2llm.", "llm2vae.", "time_embedder."),
    "connector": ("connector.",),
    "vision": ("vit_model.",),
}
"""What `train.extra_modules` may add to the layers when all weights are trained."""
LORA_TARGETS = (
    r"language_model\.model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|self_attn\.[qkvo]_proj_moe_gen|mlp_moe_gen\.(gate|up|down)_proj)"
)
"""Attention and MLP of both experts: the layers that adapters are put on."""
TIME_WAVES = 256


def expert_of(name: str) -> str:
    """Which expert a parameter belongs to: "image" for `_moe_gen` and the latent projections, else "text".

    BAGEL's learning rates are per expert. The projections in and out of latent space and the time embedding
    touch image tokens only, so they go with the image expert.
    """
    image_only = ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")
    return "image" if "_moe_gen" in name or name.startswith(image_only) else "text"


def computes_wide(name: str) -> bool:
    """Whether a tensor belongs to what computes in fp32 in any network, and so is kept in it: norms, times, the
    projections from and to latents, the head over the vocabulary."""
    return "norm" in name or name.startswith(("time_embedder.", "vae2llm.", "llm2vae.", "language_model.lm_head."))


def _whole(owner: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} = {value!r}: a whole number above 0 is needed")
        if value >= 2**31:
            raise ValueError(f"{name} = {value!r}: no model is that large")


def _above_zero(owner: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} = {value!r}: a finite number above 0 is needed")


@dataclass(frozen=True)
class VisionConfig:
    """The tower that reads pictures (SigLIP's form): a pre-norm encoder over patches of any number.

    Args:
        side: of the table of patch positions; a picture has at most that many patches along each side.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int
    side: int
    channels: int = 3
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _whole(
            self,
            (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "patch_size",
                "side",
                "channels",
            ),
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision: hidden_size {self.hidden_size} is no multiple of its {self.num_attention_heads} heads"
            )

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.channels


@dataclass(frozen=True)
class AutoencoderConfig:
    """FLUX's autoencoder: widths per level (each but the first halves the picture), residual blocks per level.

    `scale` and `shift` standardise its latents: z = scale * (latent - shift).
    """

    widths: tuple[int, ...]
    blocks: int
    latent_channels: int
    groups: int = 32
    scale: float = 0.3611
    shift: float = 0.1159

    @property
    def pixels_per_latent(self) -> int:
        return int(2 ** (len(self.widths) - 1))


@dataclass(frozen=True)
class MoTConfig:
    """Sizes and the few facts in which models of this form differ.

    Args:
        prediction: what the image head gives: "velocity" (BAGEL) or "clean", the data x_0, from which
            v = (x_t - x_0) / t. The second learns far faster at small sizes (docs/log.md).
        latent_patch_size, latent_channels: a token is a patch x patch square of latent pixels.
        pixels_per_latent: image pixels per latent pixel along a side (8 with an autoencoder, 1 without).
        max_latent_size: side of the table of latent positions, in tokens.
        vision: the tower for given pictures; None when the model only paints.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    latent_patch_size: int
    latent_channels: int
    pixels_per_latent: int
    max_latent_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    prediction: str = "velocity"
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        _whole(self, tuple(name for name, kind in type(self).__annotations__.items() if kind == "int"))
        _above_zero(self, ("rms_norm_eps", "rope_theta"))
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {self.prediction!r}: accepted are {', '.join(PREDICTIONS)}")
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads) or heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, {heads} heads and {self.num_key_value_heads} key-value heads "
                "do not go into each other"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def token_dim(self) -> int:
        return self.latent_patch_size**2 * self.latent_channels

    @property
    def pixels_per_token(self) -> int:
        return self.latent_patch_size * self.pixels_per_latent

    @property
    def largest_side(self) -> int:
        """The longest side of a picture that can be painted, in pixels."""
        return self.max_latent_size * self.pixels_per_token

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of an image of that many pixels.

        Raises:
            ValueError: when the size is no multiple of a token or larger than the position table.
        """
        unit, largest = self.pixels_per_token, self.largest_side
        if height % unit or width % unit or not 0 < max(height, width) <= largest or min(height, width) < 1:
            raise ValueError(
                f"image size {height}x{width} does not fit this model: "
                f"both sides must be multiples of {unit}, at most {largest}"
            )
        return height // unit, width // unit


BAGEL = "ByteDance-Seed/BAGEL-7B-MoT"
BAGEL_NETWORK = MoTConfig(
    hidden_size=3584,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
    vocab_size=152064,
    latent_patch_size=2,
    latent_channels=16,
    pixels_per_latent=8,
    max_latent_size=64,
    vision=VisionConfig(1152, 26, 16, 4304, 14, 70),
)
BAGEL_AUTOENCODER = AutoencoderConfig((128, 256, 512, 512), 2, 16)
"""The published release, to plan with where it is not: whatever is loaded is read from its own files."""

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def network_shapes(config: MoTConfig) -> Shapes:
    """Every tensor of the network and its shape."""
    width, head = config.hidden_size, config.head_dim
    kv = config.num_key_value_heads * head
    shapes: Shapes = {
        "language_model.model.embed_tokens.weight": (config.vocab_size, width),
        "language_model.lm_head.weight": (config.vocab_size, width),
        "vae2llm.weight": (width, config.token_dim),
        "vae2llm.bias": (width,),
        "llm2vae.weight": (config.token_dim, width),
        "llm2vae.bias": (config.token_dim,),
        LATENT_POSITIONS: (config.max_latent_size**2, width),
    }
    shapes |= _linear("time_embedder.mlp.0", width, TIME_WAVES) | _linear("time_embedder.mlp.2", width, width)
    for expert in ("", "_moe_gen"):
        shapes[f"language_model.model.norm{expert}.weight"] = (width,)
        for index in range(config.num_hidden_layers):
            layer = f"language_model.model.layers.{index}"
            for name, out in (("q", width), ("k", kv), ("v", kv)):
                shapes |= _linear(f"{layer}.self_attn.{name}_proj{expert}", out, width)
            shapes |= _linear(f"{layer}.self_attn.o_proj{expert}", width, width, bias=False)
            for name in ("q_norm", "k_norm"):
                shapes[f"{layer}.self_attn.{name}{expert}.weight"] = (head,)
            for name in ("gate_proj", "up_proj"):
                shapes |= _linear(f"{layer}.mlp{expert}.{name}", config.intermediate_size, width, bias=False)
            shapes |= _linear(f"{layer}.mlp{expert}.down_proj", width, config.intermediate_size, bias=False)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{name}{expert}.weight"] = (width,)
    if config.vision is not None:
        shapes |= _vision_shapes(config.vision, width)
    return shapes


def _vision_shapes(vision: VisionConfig, width: int) -> Shapes:
    tower, own = "vit_model.vision_model", vision.hidden_size
    shapes = _linear(f"{tower}.embeddings.patch_embedding", own, vision.patch_dim)
    shapes[f"{tower}.embeddings.position_embedding.weight"] = (vision.side**2, own)
    for index in range(vision.num_hidden_layers):
        layer = f"{tower}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", own, own)
        shapes |= _linear(f"{layer}.mlp.fc1", vision.intermediate_size, own)
        shapes |= _linear(f"{layer}.mlp.fc2", own, vision.intermediate_size)
        shapes |= _norm(f"{layer}.layer_norm1", own) | _norm(f"{layer}.layer_norm2", own)
    shapes |= _norm(f"{tower}.post_layernorm", own)
    shapes |= _linear("connector.fc1", width, own) | _linear("connector.fc2", width, width)
    shapes[VISION_POSITIONS] = (vision.side**2, width)
    return shapes


def autoencoder_shapes(config: AutoencoderConfig) -> Shapes:
    """Every tensor of `ae.safetensors`, by FLUX's own names."""
    widths, top = config.widths, config.widths[-1]
    levels = len(widths)
    shapes: Shapes = {}

    def conv(name: str, out: int, into: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, kernel, kernel), (out,)

    def block(name: str, out: int, into: int) -> None:
        shapes.update(_norm(f"{name}.norm1", into) | _norm(f"{name}.norm2", out))
        conv(f"{name}.conv1", out, into)
        conv(f"{name}.conv2", out, out)
        if out != into:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def middle(side: str) -> None:
        for name in ("block_1", "block_2"):
            block(f"{side}.mid.{name}", top, top)
        shapes.update(_norm(f"{side}.mid.attn_1.norm", top))
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{name}", top, top, 1)

    conv("encoder.conv_in", widths[0], 3)
    into = widths[0]
    for level, width in enumerate(widths):
        for index in range(config.blocks):
            block(f"encoder.down.{level}.block.{index}", width, into)
            into = width
        if level < levels - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder")
    shapes.update(_norm("encoder.norm_out", top))
    conv("encoder.conv_out", 2 * config.latent_channels, top)

    conv("decoder.conv_in", top, config.latent_channels)
    middle("decoder")
    into = top
    for level in reversed(range(levels)):
        for index in range(config.blocks + 1):
            block(f"decoder.up.{level}.block.{index}", widths[level], into)
            into = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", into, into)
    shapes.update(_norm("decoder.norm_out", widths[0]))
    conv("decoder.conv_out", 3, widths[0])
    return shapes
