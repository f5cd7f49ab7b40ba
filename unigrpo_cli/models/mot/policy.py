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

from unigrpo_cli.episode import GivenImage, GivenText, Prompt
from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.models.mot.bagel import Release
from unigrpo_cli.models.mot.codec import Codec
from unigrpo_cli.models.mot.config import VisionConfig, expert_of
from unigrpo_cli.models.mot.context import Context
from unigrpo_cli.models.mot.layers import is_on_host, stream_from_host
from unigrpo_cli.models.mot.network import MoT, MoTOutput, NoisyImage
from unigrpo_cli.models.mot.resize import Resize, read_picture
from unigrpo_cli.models.mot.vision import patchify

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
BOUNDARY = ("<|vision_start|>", "<|vision_end|>")
UNKNOWN = "<unk>"
LOOK_BYTES = 12 * 2**20
"""Bytes of the widest activation of a look at noisy images on a CPU.

glibc asks the kernel anew for everything of 32 MiB and more and gives it back at once, and what is smaller where
much of it comes free together. Every page of such tensors is made and cleared again, which took up to a tenth of a
replay (docs/log.md); below this few are.
"""

PLAN_FIRST = (
    "You should first think about the planning process in the mind and then generate the image. \nThe planning "
    "process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here"
)
REASON_FIRST = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> "
    "answer here"
)
"""What BAGEL was taught to expect before it paints, and before it answers; the spaces before the newlines too."""


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token.

    Raises:
        WeightsError: when the tokenizer does not have it.
    """
    found = tokenizer.token_to_id(name)
    if found is None:
        raise WeightsError(f"the tokenizer lacks {name}; models in BAGEL's format need it")
    return found


def boundary_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens before and after an image."""
    return token_id(tokenizer, BOUNDARY[0]), token_id(tokenizer, BOUNDARY[1])


@dataclass(frozen=True)
class MoTPolicy:
    """A mixture-of-transformers with tokenizer and codec; implements the `Policy` protocol.

    Args:
        network: the current weights.
        system_prompt: given before the prompt when the model is to think; "" for none, None for its family's own.
        frozen: a copy of the starting weights when all weights are trained; None when adapters are, for
            then the reference is the same network with its adapters off.
        release: the directory it came from; None for one made here.
        compiles: passes without gradients take compiled layers.
    """

    network: MoT
    tokenizer: Tokenizer
    codec: Codec
    system_prompt: str | None = ""
    frozen: MoT | None = None
    release: Release | None = None
    compiles: bool = False

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

    def preamble(self, prompt: Prompt, think: bool) -> tuple[GivenText | GivenImage, ...]:
        """What is given before the model paints: a system prompt if it thinks, a source picture, the prompt."""
        instruction = PLAN_FIRST if self.system_prompt is None else self.system_prompt
        system = (self.given("system", instruction),) if think and instruction else ()
        source = () if prompt.image is None else (self.given_image("source", read_picture(prompt.image)),)
        return (*system, *source, self.given("prompt", prompt.text))

    def question(self, prompt: Prompt, think: bool) -> tuple[GivenText | GivenImage, ...]:
        """What is given before the model answers: as `preamble`, but the picture is only looked at."""
        system = (self.given("system", REASON_FIRST),) if think else ()
        asked = self.given("prompt", prompt.text)
        if prompt.image is None:
            return (*system, asked)
        return (*system, self.given_image("source", read_picture(prompt.image), latents=False), asked)

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
        seen_BNC: Tensor | None = None,
        detach_context: bool = False,
        keep_image: bool = False,
    ) -> MoTOutput:
        """Read text or a picture into the context, then look at images in it; see `MoT.forward`."""
        return self.network(
            context,
            ids_BL,
            length_B,
            image,
            seen_BNC=seen_BNC,
            detach_context=detach_context,
            keep_image=keep_image,
            compiled=self.compiles,
        )

    def compiled(self) -> MoTPolicy:
        return replace(self, compiles=True)

    def copies_at_once(self, image: NoisyImage) -> int:
        """How many noisy copies of each row's image one pass should take.

        On a CPU as many as keep the widest activation, the MLP's, within `LOOK_BYTES`, at least one. On a GPU all,
        for there torch keeps freed memory; all too where layers are sharded, for every rank must then make equally
        many passes, and their rows may differ. Nothing is timed and no text counts, so runs repeat to the bit.
        """
        from unigrpo_cli.models.sharding import is_sharded

        rows, copies, latents, _ = image.x_BKND.shape
        if self.device.type != "cpu" or is_sharded(self.network):
            return max(1, copies)
        tokens = rows * (latents + len(self.network.boundary_ids))
        each = tokens * self.network.config.intermediate_size * self.network.dtype.itemsize
        return max(1, LOOK_BYTES // each)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits; ids that the tokenizer does not have (a padded head has some) are impossible."""
        logits = self.network.logits(hidden)
        if not len(self._padding_ids):
            return logits
        return logits.index_fill(-1, self._padding_ids, -torch.inf)

    @cached_property
    def _padding_ids(self) -> Tensor:
        known = set(self.tokenizer.get_vocab().values())
        width = self.network.language_model.lm_head.weight.shape[0]
        return torch.tensor(sorted(set(range(width)) - known), dtype=torch.long, device=self.device)

    # ----- given pictures

    @cached_property
    def resize_to_paint(self) -> Resize:
        """How a source picture is brought to a size that can be painted (the release: 512 to 1024 px, by 16)."""
        largest, unit = self.largest_size[0], self.network.config.pixels_per_token
        return Resize(largest, max(unit, largest // 2), unit)

    @cached_property
    def resize_to_see(self) -> Resize:
        """How that picture is then brought to what the vision tower takes (the release: 224 to 980 px, by 14)."""
        vision = self.need_vision()
        largest = vision.side * vision.patch_size
        return Resize(largest, min(largest, 16 * vision.patch_size), vision.patch_size)

    def need_vision(self) -> VisionConfig:
        """The vision tower's sizes.

        Raises:
            UsageError: when there is none.
        """
        vision = self.network.config.vision
        if vision is None:
            raise UsageError("this model has no vision tower, so it cannot be given pictures")
        return vision

    def given_image(
        self, role: str, pixels_HWC: Tensor, *, latents: bool = True, noise_Chw: Tensor | None = None
    ) -> GivenImage:
        """A picture as the model is shown it: as clean latents to paint from, then as the vision tower sees it.

        Args:
            pixels_HWC: uint8, of any size.
            latents: False for a picture that is only asked about.
            noise_Chw: the draw of the autoencoder's posterior, on its grid; None takes the mean. (The official
                sampler draws; the mean is what repeats.)

        Raises:
            UsageError: when the model cannot be shown pictures.
        """
        view = self.resize_to_see(pixels := self.resize_to_paint(pixels_HWC))
        grid = self.grid(*pixels.shape[:2])
        latent = torch.zeros(0, self.token_dim)
        if latents:
            noise = None if noise_Chw is None else noise_Chw[None]
            latent = self.encode_pixels(pixels[None], noise)[0].float().cpu()
        return GivenImage(role, grid, latent, pixels, view)

    def see(self, view_BHWC: Tensor) -> Tensor:
        """Pictures of one size as the text expert reads them."""
        patch = self.need_vision().patch_size
        grid = view_BHWC.shape[1] // patch, view_BHWC.shape[2] // patch
        return self.network.see(patchify(view_BHWC.to(self.device), patch), grid)

    # ----- pixels

    @property
    def token_dim(self) -> int:
        return self.network.config.token_dim

    @property
    def largest_size(self) -> tuple[int, int]:
        side = self.network.config.largest_side
        return side, side

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of an image.

        Raises:
            ValueError: when the size is no multiple of a token or larger than the position table.
        """
        return self.network.config.grid(height, width)

    def decode_pixels(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Final latents to images [B, height, width, 3] uint8 on the CPU. Inside a token: row, column, channel."""
        patch, (rows, columns) = self.network.config.latent_patch_size, grid
        x = x_BND.view(len(x_BND), rows, columns, patch, patch, -1)
        latent_BCHW = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return self.codec.decode(latent_BCHW.float()).contiguous().cpu()

    def encode_pixels(self, pixels_BHWC: Tensor, noise_BChw: Tensor | None = None) -> Tensor:
        """Images [B, height, width, 3] uint8 to latents x_BND: what `decode_pixels` turns into images again."""
        patch = self.network.config.latent_patch_size
        x = self.codec.encode(pixels_BHWC, noise_BChw).unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    # ----- training

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters with gradients by expert; each is in exactly one."""
        groups: dict[str, list[nn.Parameter]] = {"text": [], "image": []}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups[expert_of(name)].append(parameter)
        return groups

    def with_frozen_copy(self, on_host: bool = False) -> MoTPolicy:
        """The same policy with its present weights kept as the reference, in the dtype they have now.

        Weights that are not to be trained are shared. With `on_host` the layers' copies live in host memory and
        come to the device one layer at a time.
        """
        layers = self.network.language_model.model.layers
        moved = {id(p) for p in layers.parameters() if on_host and p.requires_grad}
        kept: dict[int, nn.Parameter] = {}
        for parameter in self.network.parameters():
            if not parameter.requires_grad:
                kept[id(parameter)] = parameter
            elif id(parameter) in moved:
                kept[id(parameter)] = is_on_host(parameter)
        frozen = copy.deepcopy(self.network, memo=kept).requires_grad_(False)
        frozen.activation_checkpointing = False
        if on_host:
            for layer in frozen.language_model.model.layers:
                stream_from_host(layer, self.device)
        return replace(self, frozen=frozen)

    @contextmanager
    def reference(self) -> Iterator[MoTPolicy]:
        """The policy as it was before training: the frozen copy, or this network with its adapters off.

        Its own context too: reference velocities are conditioned on keys and values made by reference weights.
        """
        if self.frozen is not None:
            yield replace(self, network=self.frozen, frozen=None)
            return
        from unigrpo_cli.models.lora import adapters_off

        with adapters_off(self.network):
            yield self
