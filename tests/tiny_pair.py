"""Diffusers pipelines of tiny random weights, in the layouts of the releases: Z-Image and FLUX.2-klein."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from unigrpo_cli.models.pair.facts import KLEIN

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THOUGHTS = ("<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
KINDS = ("z-image", "flux2-klein")
SIDE = {"z-image": 4, "flux2-klein": 4}
"""Pixels of a token's side: autoencoders of two levels, tokens of two latents."""


SMALL = replace(KLEIN, layers=(1, 2, 3), padded_to=64)
"""FLUX.2-klein with a reasoner of 4 layers, and texts that are filled up to 64 tokens: 512 take seconds."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and special tokens, as Qwen's without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: k for k, c in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    fast.add_tokens(list(THOUGHTS))
    fast.chat_template = TEMPLATE
    return fast


def reasoner(width: int, layers: int, vocabulary: int, tied: bool = True) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)


def pipeline(kind: str, seed: int = 0) -> ZImagePipeline | Flux2KleinPipeline:
    """A pipeline of tiny random weights in fp32."""
    torch.manual_seed(seed)
    words = tokenizer()
    size = len(words) + 3  # as Qwen's head, wider than the tokenizer
    if kind == "z-image":
        painter = ZImageTransformer2DModel(
            in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 4, 4], axes_lens=[258, 16, 16],
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        built = ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, reasoner(16, 3, size), words, painter)
        _stir(painter, vae)
        return built
    painter = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False, timestep_guidance_channels=16,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    built = Flux2KleinPipeline(scheduler, vae, reasoner(8, 4, size), words, painter)
    _stir(painter, vae)
    return built


def _stir(*networks: torch.nn.Module) -> None:
    """No weight at a neutral value, so that losing any one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            for name, buffer in network.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def write(kind: str, directory: Path, seed: int = 0) -> Path:
    """Such a pipeline in a directory."""
    built = pipeline(kind, seed)
    built.save_pretrained(str(directory))
    return directory


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
