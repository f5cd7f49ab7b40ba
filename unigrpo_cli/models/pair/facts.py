"""What is known of each painter: its pipeline, the text it was trained on, its trained layers. Imports no torch.

Templates and layers are the defaults of diffusers' pipelines in code; sizes are those of the released configurations.
"""

from __future__ import annotations

from dataclasses import dataclass

REASONER, PAINTER, AUTOENCODER, TOKENIZER, SCHEDULER = "text_encoder", "transformer", "vae", "tokenizer", "scheduler"
"""Folders of a diffusers pipeline."""
INDEX = "model_index.json"

USER, END, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\n"
"""The parts of a turn in ChatML, which Qwen and SmolLM2 speak."""
THINK, THOUGHT = "<think>", "</think>"
NO_THOUGHT = f"{THINK}\n\n{THOUGHT}\n\n"
TURN = ("<|im_start|>", "<|im_end|>")

TARGETS_LM = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""Matrices of the reasoner's layers, with and without adapters."""


@dataclass(frozen=True)
class PainterFacts:
    """A painter of diffusers and how its pipeline uses it.

    Args:
        pipeline, painter, autoencoder: class names in `model_index.json` and `config.json`.
        answer: text after the user's turn that the pipeline's template has.
        layers: hidden states of the reasoner that condition the painter, side by side.
        padded_to: tokens that a shorter text is padded to; 0 where the painter takes ragged rows.
        patch: latent pixels along a token's side.
        targets: trained matrices, as a regular expression of module names.
        saved: what autograd saves of a token in a layer: widths and MLP widths in the network's dtype, widths in fp32.
    """

    name: str
    pipeline: str
    painter: str
    autoencoder: str
    answer: str
    layers: tuple[int, ...]
    padded_to: int
    patch: int
    targets: str
    saved: tuple[int, int, int]


Z_IMAGE = PainterFacts(
    name="z-image",
    pipeline="ZImagePipeline",
    painter="ZImageTransformer2DModel",
    autoencoder="AutoencoderKL",
    answer="",
    layers=(-2,),
    padded_to=0,
    patch=2,
    targets=r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.to_([qkv]|out\.0)|feed_forward\.w[123])",
    saved=(12, 4, 11),
)
KLEIN = PainterFacts(
    name="flux2-klein",
    pipeline="Flux2KleinPipeline",
    painter="Flux2Transformer2DModel",
    autoencoder="AutoencoderKLFlux2",
    answer=NO_THOUGHT,
    layers=(9, 18, 27),
    padded_to=512,
    patch=2,
    targets=r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    saved=(9, 4, 6),
)
PAINTERS = {facts.pipeline: facts for facts in (Z_IMAGE, KLEIN)}


@dataclass(frozen=True)
class Schedule:
    """The time shift of a pipeline's own scheduler: `shift`, or exp(mu) where it depends on the image's tokens.

    Args:
        tokens, mu: mu grows linearly between two numbers of tokens; None for a fixed shift.
        empirical: FLUX.2's formula, which also depends on the steps.
    """

    shift: float = 1.0
    tokens: tuple[float, float] | None = None
    mu: tuple[float, float] = (0.0, 0.0)
    empirical: bool = False

    def log_shift(self, tokens: int, steps: int) -> float | None:
        """mu for an image of that many tokens; None for a fixed shift."""
        if self.empirical:
            # FLUX.2's fit: lines through its values at 10 and at 200 steps, both linear in the tokens.
            at_200 = 0.00016927 * tokens + 0.45666666
            if tokens > 4300:
                return at_200
            at_10 = 8.73809524e-05 * tokens + 1.89833333
            return at_200 + (at_200 - at_10) * (steps - 200) / 190
        if self.tokens is None:
            return None
        share = (tokens - self.tokens[0]) / (self.tokens[1] - self.tokens[0])
        return self.mu[0] + share * (self.mu[1] - self.mu[0])
