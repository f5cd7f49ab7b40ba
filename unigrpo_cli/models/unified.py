"""A policy of text and image actions: a network with its words and its pixels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from unigrpo_cli.episode import GivenText
from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.context import Context
from unigrpo_cli.models.mot import MoT, MoTOutput, NoisyImage, expert_of

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
EDGES = ("<|vision_start|>", "<|vision_end|>")
UNKNOWN = "<unk>"


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token.

    Raises:
        WeightsError: when the tokenizer does not have it.
    """
    found = tokenizer.token_to_id(name)
    if found is None:
        raise WeightsError(f"the tokenizer lacks {name}; models in BAGEL's format need it")
    return found


def edge_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens before and after an image."""
    return token_id(tokenizer, EDGES[0]), token_id(tokenizer, EDGES[1])


class PixelCodec:
    """No autoencoder: a latent pixel is an image pixel in [-1, 1]. Decoding inverts encoding exactly."""

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """uint8 images to latents [B, C, h, w]."""
        return pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Latents to uint8 images [B, H, W, 3]."""
        return ((latent_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class UnifiedModel:
    """A mixture-of-transformers with tokenizer and codec; implements the `Policy` protocol.

    Args:
        network: the current weights.
        frozen: a copy of the starting weights when all weights are trained; None when adapters are, for
            then the reference is the same network with its adapters off.
        system_prompt: given before the prompt when the model is to think; "" for none.
    """

    network: MoT
    tokenizer: Tokenizer
    codec: PixelCodec
    system_prompt: str = ""
    frozen: MoT | None = None

    # ----- words

    @cached_property
    def open_id(self) -> int:
        """The token that opens a text segment; feeding it starts decoding."""
        return token_id(self.tokenizer, OPEN)

    @cached_property
    def stop_id(self) -> int:
        """The token that closes a text segment; sampling it stops decoding."""
        return token_id(self.tokenizer, CLOSE)

    def given(self, role: str, text: str) -> GivenText:
        """A given text segment in the model's format: open, words, close."""
        ids = [self.open_id, *self.tokenizer.encode(text, add_special_tokens=False).ids, self.stop_id]
        return GivenText(role, text, torch.tensor(ids))

    def preamble(self, prompt: str, think: bool) -> tuple[GivenText, ...]:
        """What is given before the model acts: a system prompt when it is to think, and the prompt."""
        asked = self.given("prompt", prompt)
        return (self.given("system", self.system_prompt), asked) if think and self.system_prompt else (asked,)

    def decode_text(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def unknown_words(self, text: str) -> list[str]:
        """Words of `text` that the tokenizer cannot express (a word-level one has such; BPE has none)."""
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        spans = [s for i, s in zip(encoding.ids, encoding.offsets, strict=True) if i == unknown and i is not None]
        return [text[a:b] for a, b in spans]

    # ----- the network

    @property
    def device(self) -> torch.device:
        return self.network.device

    def empty_context(self, rows: int) -> Context:
        return self.network.empty_context(rows)

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
        """Read text into the context, then look at images in it; see `MoT.forward`."""
        return self.network(context, ids_BL, length_B, image, detach_context=detach_context, keep_image=keep_image)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits; ids beyond the tokenizer (a padded head has some) are impossible."""
        logits = self.network.logits(hidden)
        words = self.tokenizer.get_vocab_size()
        if words < logits.shape[-1]:
            logits = torch.cat([logits[..., :words], torch.full_like(logits[..., words:], -torch.inf)], dim=-1)
        return logits

    # ----- pixels

    @property
    def token_dim(self) -> int:
        return self.network.config.token_dim

    @property
    def largest_size(self) -> tuple[int, int]:
        side = self.network.config.max_latent_size * self.network.config.pixels_per_token
        return side, side

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of an image.

        Raises:
            ValueError: when the size is no multiple of a token or larger than the position table.
        """
        unit, largest = self.network.config.pixels_per_token, self.largest_size[0]
        if height % unit or width % unit or not 0 < max(height, width) <= largest or min(height, width) < 1:
            raise ValueError(
                f"image size {height}x{width} does not fit this model: "
                f"both sides must be multiples of {unit}, at most {largest}"
            )
        return height // unit, width // unit

    def decode_pixels(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Final latents to images [B, height, width, 3] uint8 on the CPU. Inside a token: row, column, channel."""
        patch, (rows, columns) = self.network.config.latent_patch_size, grid
        x = x_BND.view(len(x_BND), rows, columns, patch, patch, -1)
        latent_BCHW = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return self.codec.decode(latent_BCHW.float()).contiguous().cpu()

    def encode_pixels(self, pixels_BHWC: Tensor) -> Tensor:
        """Images [B, height, width, 3] uint8 to latents x_BND; the inverse of `decode_pixels`."""
        patch = self.network.config.latent_patch_size
        x = self.codec.encode(pixels_BHWC).unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    # ----- training

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters with gradients by expert; each is in exactly one."""
        groups: dict[str, list[nn.Parameter]] = {"text": [], "image": []}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups[expert_of(name)].append(parameter)
        return groups

    def with_frozen_copy(self) -> UnifiedModel:
        """The same policy with its present weights kept as the reference."""
        frozen = copy.deepcopy(self.network).requires_grad_(False)
        frozen.activation_checkpointing = False
        return replace(self, frozen=frozen)

    @contextmanager
    def reference(self) -> Iterator[UnifiedModel]:
        """The policy as it was before training: the frozen copy, or this network with its adapters off.

        Its own context too: reference velocities are conditioned on keys and values made by reference weights.
        """
        if self.frozen is not None:
            yield replace(self, network=self.frozen, frozen=None)
            return
        from unigrpo_cli.models.lora import adapters_off

        with adapters_off(self.network):
            yield self
