"""Other people's implementations as oracles: with our weights in them they must say what our network says.

transformers' Qwen3 is our text expert, apart from an output bias that is set to zero. diffusers' Cosmos3 is our two
streams, apart from three things: ours does here without boundary tokens and with a table of positions that is zero,
theirs is given equal positions on its three axes. Neither knows of noisy copies or of several texts at once.

In fp32 the libraries are as they come. In fp64 their norms and frequencies would still be rounded to fp32, so those
two are exchanged for exact ones: that leaves nothing to hide a small error elsewhere.

Shape letters as in mot.py: B rows, K noisy copies, R = B*K, L text tokens, N image tokens of D numbers, V words;
h, w the sides of a latent image.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from unigrpo_cli.models.mot.config import MoTConfig, expert_of
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.policy import NoisyImage

try:
    from diffusers import Cosmos3OmniTransformer
except ImportError:
    Cosmos3OmniTransformer = None

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # seen: 2e-6 and 5e-15
LENGTHS = [9, 4, 7]  # of three texts; the first is the longest
GRID = (3, 2)

# They differ in every size, in whether heads share keys, in eps and in theta. Of the first, eps is so coarse and
# theta so small that a wrong one shows; the second has those of real models, at which it may not.
WIDE = MoTConfig(
    hidden_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=56,
    vocab_size=61,
    latent_patch_size=2,
    latent_channels=3,
    pixels_per_latent=1,
    max_latent_size=4,
    rms_norm_eps=1e-2,
    rope_theta=50.0,
)
DEEP = MoTConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    intermediate_size=32,
    vocab_size=37,
    latent_patch_size=1,
    latent_channels=5,
    pixels_per_latent=8,
    max_latent_size=3,
)

each_size = pytest.mark.parametrize("config", [pytest.param(WIDE, id="wide"), pytest.param(DEEP, id="deep")])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def _mot(config: MoTConfig, dtype: torch.dtype, boundary_ids: tuple[int, ...]) -> MoT:
    """Our network with no weight at a neutral value, so that losing any one shows."""
    network = MoT(config, boundary_ids).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + ("norm" in name))
            elif parameter.requires_grad:
                parameter.copy_(noise / (1 if "embed" in name else parameter.shape[1] ** 0.5))
    return network


def _load(oracle: nn.Module, weights: dict[str, Tensor], config: MoTConfig, dtype: torch.dtype) -> None:
    """Weights by name, none left over on either side; in fp64 also exact norms and frequencies (see the top)."""
    if dtype == torch.float64:
        oracle.double()
    oracle.eval().load_state_dict(weights, strict=True)
    if dtype == torch.float32:
        return
    half = config.head_dim // 2
    for module in list(oracle.modules()):
        if hasattr(module, "inv_freq"):
            module.inv_freq = config.rope_theta ** -(torch.arange(half) / half)
        for name, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(norm.weight.shape, eps=config.rms_norm_eps)
                exact.weight = norm.weight
                setattr(module, name, exact)


def _close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal up to rounding, which is in proportion to the largest number there."""
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE[expected.dtype], f"{what}: off by {error:.1e}"


def _texts(config: MoTConfig) -> Tensor:
    return torch.randint(config.vocab_size, (3, LENGTHS[0]), generator=torch.Generator().manual_seed(1))


# ----- transformers: the text expert


def _qwen3(network: MoT, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """Our text expert in transformers' Qwen3, which wants one tensor more: a bias of the output projection."""
    config = network.config
    oracle = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attention_bias=True,
            tie_word_embeddings=False,
            # Attention written out where that is possible; written out it has a softmax in fp32.
            attn_implementation="eager" if dtype == torch.float32 else "sdpa",
        )
    )
    weights = {n: w for n, w in network.language_model.state_dict().items() if expert_of(n) == "text"}
    for layer in range(config.num_hidden_layers):
        weights[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(config.hidden_size)
    _load(oracle, weights, config, dtype)
    return oracle


@each_size
@each_dtype
def test_text_expert_is_qwen3_in_value_and_gradient(config: MoTConfig, dtype: torch.dtype) -> None:
    """Logits at every position, and the gradient of a cross-entropy in every weight of the text expert."""
    network = _mot(config, dtype, (3, 4))
    oracle = _qwen3(network, dtype)
    ids_BL = _texts(config)
    expected_BLV = oracle(ids_BL).logits
    logits_BLV = network.logits(network(network.empty_context(3), ids_BL).hidden_BLC)
    _close(logits_BLV, expected_BLV, "logits")

    for x_BLV in (expected_BLV, logits_BLV):
        F.cross_entropy(x_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten()).backward()
    ours = dict(network.language_model.named_parameters())
    compared = 0
    for name, parameter in oracle.named_parameters():
        if not name.endswith("o_proj.bias"):
            _close(ours[name].grad, parameter.grad, name)
            assert parameter.grad.abs().max() > 1e-4, name
            compared += 1
    assert compared == 3 + 14 * config.num_hidden_layers


@each_size
@each_dtype
@pytest.mark.parametrize("room", [0, 30])
@torch.no_grad()
def test_decoding_is_qwen3s_whatever_is_painted_meanwhile(config: MoTConfig, dtype: torch.dtype, room: int) -> None:
    """Token by token into both caches: texts of unequal length in one batch here, one by one there.

    Between any two tokens two noisy images look at our context, which afterwards is to be as if they had not.
    """
    network = _mot(config, dtype, (3, 4))
    oracle = _qwen3(network, dtype)
    prompt_BL, more_BL = _texts(config), _texts(config).flip(1)
    generator = torch.Generator().manual_seed(2)
    x_BKND = torch.randn(3, 2, 6, config.token_dim, generator=generator, dtype=dtype)
    image = NoisyImage(x_BKND, torch.tensor([[0.9, 0.2]], dtype=dtype).expand(3, 2), GRID)

    out = network(network.empty_context(3).reserve(room), prompt_BL, LENGTHS)
    steps = [torch.stack([out.hidden_BLC[row, n - 1] for row, n in enumerate(LENGTHS)])]
    for column_B1 in more_BL.split(1, dim=1):
        painted = network(out.context, image=image)
        assert painted.velocity_BKND.abs().min() > 0
        out = network(painted.context, column_B1)
        steps.append(out.hidden_BLC[:, 0])
    logits_BLV = network.logits(torch.stack(steps, dim=1))

    for row, n in enumerate(LENGTHS):
        said = oracle(prompt_BL[row : row + 1, :n], use_cache=True)
        expected = [said.logits[0, -1]]
        for column_B1 in more_BL[row : row + 1].split(1, dim=1):
            said = oracle(column_B1, past_key_values=said.past_key_values, use_cache=True)
            expected.append(said.logits[0, -1])
        _close(logits_BLV[row], torch.stack(expected), f"row {row}")


# ----- diffusers: both streams

COSMOS3_NAMES = (
    ("language_model.model.", ""),
    ("language_model.lm_head", "lm_head"),
    ("vae2llm", "proj_in"),
    ("llm2vae", "proj_out"),
    ("time_embedder.mlp.0", "time_embedder.linear_1"),
    ("time_embedder.mlp.2", "time_embedder.linear_2"),
    ("o_proj_moe_gen", "to_add_out"),
    ("o_proj", "to_out"),
    *((f"{x}_proj_moe_gen", f"add_{x}_proj") for x in "qkv"),
    *((f".{x}_proj.", f".to_{x}.") for x in "qkv"),
    *((f"{x}_norm_moe_gen", f"norm_added_{x}") for x in "qk"),
    *((f".{x}_norm.", f".norm_{x}.") for x in "qk"),
)


class _Latents:
    """A codec for latents that are there already: only the cutting into tokens is left."""

    def encode(self, latent_BCHW: Tensor, noise_BChw: Tensor | None = None) -> Tensor:
        return latent_BCHW


def _cosmos3_name(name: str) -> str:
    for ours, theirs in COSMOS3_NAMES:
        name = name.replace(ours, theirs)
    return name


def _cosmos3(network: MoT, dtype: torch.dtype, *, bias: bool) -> nn.Module:
    """All our weights but the positions in diffusers' Cosmos3; with biases, its output projections' are zero."""
    config = network.config
    oracle = Cosmos3OmniTransformer(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        latent_patch_size=config.latent_patch_size,
        latent_channel=config.latent_channels,
        patch_latent_dim=config.token_dim,
        attention_bias=bias,
    )
    weights = {_cosmos3_name(n): w for n, w in network.state_dict().items() if not n.startswith("latent_pos_embed.")}
    if bias:
        for layer in range(config.num_hidden_layers):
            for name in ("to_out", "to_add_out"):
                weights[f"layers.{layer}.self_attn.{name}.bias"] = torch.zeros(config.hidden_size)
    else:
        weights = {n: w for n, w in weights.items() if not (".self_attn." in n and n.endswith(".bias"))}
    _load(oracle, weights, config, dtype)
    # Older versions give their time embedder fp32 waves whatever its dtype.
    oracle.time_proj.register_forward_hook(lambda module, given, waves: waves.to(dtype))
    return oracle


def _cosmos3_pass(oracle: nn.Module, ids_L: Tensor, latent_Chw: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """One text and one noisy image: final-normed text states [L, C] and the velocity [C, h, w].

    All tokens of the image have the text's length as their position, on all three axes; times are in thousandths.
    """
    patch = oracle.config.latent_patch_size
    rows, columns = (side // patch for side in latent_Chw.shape[1:])
    length, tokens = len(ids_L), rows * columns
    position_S = torch.cat([torch.arange(length), torch.full((tokens,), length)])
    where = torch.arange(length, length + tokens)
    hidden: list[Tensor] = []
    hook = oracle.norm.register_forward_hook(lambda module, given, result: hidden.append(result))
    out = oracle(
        input_ids=ids_L,
        text_indexes=torch.arange(length),
        position_ids=position_S.expand(3, -1),
        und_len=length,
        sequence_length=length + tokens,
        vision_tokens=[latent_Chw[None, :, None]],
        vision_token_shapes=[(1, rows, columns)],
        vision_sequence_indexes=where,
        vision_mse_loss_indexes=where,
        vision_timesteps=(1000 * t).expand(tokens),
        vision_noisy_frame_indexes=[torch.tensor([0])],
    )
    hook.remove()
    return hidden[0], out[0][0][0, :, 0]


@pytest.mark.skipif(Cosmos3OmniTransformer is None, reason="this version of diffusers has no Cosmos3OmniTransformer")
@each_size
@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_both_streams_are_cosmos3s_in_value_and_gradient(config: MoTConfig, dtype: torch.dtype, bias: bool) -> None:
    """Velocities, text logits and the gradient of both in every weight of both experts.

    Three texts of unequal length with two noisy images each: one pass here, six passes there. The images are cut
    into tokens by each side's own code.
    """
    network = _mot(config, dtype, boundary_ids=())
    with torch.no_grad():
        network.latent_pos_embed.pos_embed.zero_()
        for name, parameter in network.named_parameters():
            if not bias and "_proj" in name and name.endswith(".bias"):
                parameter.zero_()
    oracle = _cosmos3(network, dtype, bias=bias)

    generator = torch.Generator().manual_seed(2)
    rows, columns = (side * config.latent_patch_size for side in GRID)
    latent_RChw, pull_RChw = torch.randn(2, 6, config.latent_channels, rows, columns, generator=generator, dtype=dtype)
    pull_BLV = torch.randn(3, LENGTHS[0], config.vocab_size, generator=generator, dtype=dtype)
    t_BK = torch.tensor([[1.0, 0.3], [0.7, 0.1], [0.55, 0.9]], dtype=dtype)
    ids_BL = _texts(config)
    tokens = MoTPolicy(network, tokenizer=None, codec=_Latents())

    def cut(latent_RChw: Tensor) -> Tensor:
        return tokens.encode_pixels(latent_RChw).unflatten(0, (3, 2))

    out = network(network.empty_context(3), ids_BL, LENGTHS, NoisyImage(cut(latent_RChw), t_BK, GRID))
    logits_BLV = network.logits(out.hidden_BLC)
    total = (out.velocity_BKND * cut(pull_RChw)).sum()
    for row, n in enumerate(LENGTHS):
        total = total + (logits_BLV[row, :n] * pull_BLV[row, :n]).sum()
    total.backward()

    velocity_RChw = []
    for row, n in enumerate(LENGTHS):
        for copy in (0, 1):
            r = 2 * row + copy
            hidden_LC, velocity_Chw = _cosmos3_pass(oracle, ids_BL[row, :n], latent_RChw[r], t_BK[row, copy])
            expected_LV = oracle.lm_head(hidden_LC)
            _close(logits_BLV[row, :n], expected_LV, f"logits of row {row}")
            share = (velocity_Chw * pull_RChw[r]).sum()
            if copy == 0:
                share = share + (expected_LV * pull_BLV[row, :n]).sum()
            share.backward()
            velocity_RChw.append(velocity_Chw.detach())
    _close(out.velocity_BKND, cut(torch.stack(velocity_RChw)), "velocity")

    theirs = {n: p.grad for n, p in oracle.named_parameters()}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and _cosmos3_name(name) in theirs:
            _close(parameter.grad, theirs.pop(_cosmos3_name(name)), name)
            assert parameter.grad.abs().max() > 1e-4, name
    assert {n.rsplit(".", 2)[-2] for n in theirs} <= {"to_out", "to_add_out"}
