"""The policy of a mixture of transformers: network, tokenizer and codec."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from unigrpo_cli.episode import PAINTED, GivenImage, GivenText, ImageActions, Prompt
from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.pictures import read_picture
from unigrpo_cli.models import lora
from unigrpo_cli.models.base_options import refuse_full_tuning
from unigrpo_cli.models.mot.bagel import Release
from unigrpo_cli.models.mot.codec import Codec
from unigrpo_cli.models.mot.config import ALSO, LAYERS, LORA_TARGETS, VisionConfig, expert_of
from unigrpo_cli.models.mot.context import MoTContext
from unigrpo_cli.models.mot.layers import is_on_host, stream_from_host
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.resize import Resize
from unigrpo_cli.models.mot.tokenizer import CLOSE, OPEN, UNKNOWN, token_id
from unigrpo_cli.models.mot.vision import patchify
from unigrpo_cli.models.mot.weights import restore_weights, save_model
from unigrpo_cli.models.policy import Adapter, Finetune, Lengths, NoisyImage, PolicyOutput
from unigrpo_cli.models.quantized import kind_of, make_plain
from unigrpo_cli.models.sharding import fp32_masters, is_sharded, shard, whole

PASS_BYTES = 12 * 2**20
"""Bytes of the widest activation of a pass over noisy images on a CPU.

glibc maps blocks of 32 MiB and more anew each time, and the kernel clears every page, which took up to a tenth of a
replay (docs/log.md). Below this size few blocks are affected.
"""

USUAL_SHIFT = 3.0
"""The time shift of BAGEL's own sampler."""

PLAN_FIRST = (
    "You should first think about the planning process in the mind and then generate the image. \nThe planning "
    "process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here"
)
REASON_FIRST = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> "
    "answer here"
)
"""BAGEL's own system prompts for painting and for answering, with the spaces before the newlines."""


def _pixels_of(picture: str | NDArray[np.uint8]) -> Tensor:
    """A prompt's picture, [h, w, 3] uint8."""
    return torch.from_numpy(read_picture(picture) if isinstance(picture, str) else picture)


@dataclass(frozen=True)
class MoTPolicy:
    """A mixture-of-transformers with tokenizer and codec; implements the `Policy` protocol.

    Args:
        network: the current weights.
        system_prompt: precedes the prompt when the model thinks; "" for none, None for BAGEL's own.
        frozen: a copy of the starting weights when all weights are trained. With adapters it is None: the reference is
            the same network with its adapters off.
        release: the directory the model was loaded from; None for a new one.
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
        """What is given before the model paints: a system prompt if it thinks, source pictures, the prompt."""
        instruction = PLAN_FIRST if self.system_prompt is None else self.system_prompt
        system = (self.given("system", instruction),) if think and instruction else ()
        sources = [self.given_image("source", _pixels_of(picture)) for picture in prompt.pictures]
        return (*system, *sources, self.given("prompt", prompt.text))

    def question(self, prompt: Prompt, think: bool) -> tuple[GivenText | GivenImage, ...]:
        """What is given before the model answers: as `preamble`, but pictures are only looked at."""
        system = (self.given("system", REASON_FIRST),) if think else ()
        seen = [self.given_image("source", _pixels_of(picture), latents=False) for picture in prompt.pictures]
        return (*system, *seen, self.given("prompt", prompt.text))

    def decode_text(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def encode_text(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)

    def has_token(self, text: str) -> bool:
        return self.tokenizer.token_to_id(text) is not None

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

    def empty_context(self, rows: int) -> MoTContext:
        return self.network.empty_context(rows)

    def forward(
        self,
        context: MoTContext,
        ids_BL: Tensor | None = None,
        length_B: Lengths = None,
        image: NoisyImage | None = None,
        *,
        detach_context: bool = False,
    ) -> PolicyOutput:
        """Read text into the context, then give velocities of noisy images in it; see `MoT.forward`."""
        return self.network(context, ids_BL, length_B, image, detach_context=detach_context, compiled=self.compiles)

    def encode_image(
        self,
        context: MoTContext,
        x_BND: Tensor,
        grid: tuple[int, int],
        view_BHWC: Tensor | None = None,
        *,
        detach: bool = False,
    ) -> MoTContext:
        """The context after one image per row: its clean latents unless N = 0, then the vision tower's view."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            after = context
            if x_BND.shape[1]:
                clean = NoisyImage(x_BND[:, None], torch.zeros(len(x_BND), 1, device=self.device), grid)
                after = self.network(after, image=clean, keep_image=True, compiled=self.compiles).context
            if view_BHWC is not None:
                view_BNC = self.encode_view(view_BHWC)
                after = self.network(after, view_BNC=view_BNC, compiled=self.compiles).context
        return after.with_past_of(context) if detach else after

    def compiled(self) -> MoTPolicy:
        return replace(self, compiles=True)

    def copies_at_once(self, image: NoisyImage) -> int:
        """How many noisy copies of each row's image one pass should take.

        On a CPU as many as keep the widest activation, the MLP's, within `PASS_BYTES`, at least one. On a GPU all:
        there torch keeps freed memory. All too where layers are sharded: every rank must make equally many passes,
        and their rows may differ. Only shapes decide, so runs repeat to the bit.
        """
        rows, copies, latents, _ = image.x_BKND.shape
        if self.device.type != "cpu" or self.is_sharded:
            return max(1, copies)
        tokens = rows * (latents + len(self.network.boundary_ids))
        each = tokens * self.network.config.intermediate_size * self.network.dtype.itemsize
        return max(1, PASS_BYTES // each)

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
        vision = self.require_vision()
        largest = vision.side * vision.patch_size
        return Resize(largest, min(largest, 16 * vision.patch_size), vision.patch_size)

    def require_vision(self) -> VisionConfig:
        vision = self.network.config.vision
        if vision is None:
            raise UsageError("this model has no vision tower: it sees pictures as latents alone, to paint from them")
        return vision

    def show(self, images: Sequence[ImageActions], how: str) -> list[GivenImage]:
        """Painted images of one size as the model looks at them; see `Policy.show`.

        Their own size is kept: it can be painted, so it can be read. (The official sampler brings every picture to its
        range of sizes, which changes nothing for pictures painted within it.)
        """
        if "tower" in how and self.network.config.vision is None:
            raise UsageError("this model has no vision tower; set latents or pixels")
        if not images:
            return []
        pixels_BHWC = torch.stack([image.pixels for image in images])
        if how == "latents":
            latents = [image.latent for image in images]
        elif "pixels" in how:
            latents = list(self.encode_pixels(pixels_BHWC).float().cpu())
        else:
            latents = [torch.zeros(0, self.token_dim)] * len(images)
        views = [self.resize_to_see(pixels) if "tower" in how else None for pixels in pixels_BHWC]
        return [
            GivenImage(PAINTED, image.grid, latent, image.pixels, view)
            for image, latent, view in zip(images, latents, views, strict=True)
        ]

    def given_image(
        self, role: str, pixels_HWC: Tensor, *, latents: bool = True, noise_Chw: Tensor | None = None
    ) -> GivenImage:
        """A picture as the model is shown it: as clean latents to paint from, then as a vision tower sees it.

        Args:
            pixels_HWC: uint8, of any size.
            latents: False for a picture that is only asked about.
            noise_Chw: the draw of the autoencoder's posterior, on its grid; None takes the mean. (The official
                sampler draws; the mean is what repeats.)
        """
        pixels = self.resize_to_paint(pixels_HWC)
        view = None if self.network.config.vision is None and latents else self.resize_to_see(pixels)
        grid = self.grid(*pixels.shape[:2])
        latent = torch.zeros(0, self.token_dim)
        if latents:
            noise = None if noise_Chw is None else noise_Chw[None]
            latent = self.encode_pixels(pixels[None], noise)[0].float().cpu()
        return GivenImage(role, grid, latent, pixels, view)

    def encode_view(self, view_BHWC: Tensor) -> Tensor:
        """Images of one size as the text expert reads them."""
        patch = self.require_vision().patch_size
        grid = view_BHWC.shape[1] // patch, view_BHWC.shape[2] // patch
        return self.network.encode_view(patchify(view_BHWC.to(self.device), patch), grid)

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

    def shift(self, grid: tuple[int, int], steps: int) -> float:
        return USUAL_SHIFT

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

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.network.dtype

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.network)

    @property
    def adapter(self) -> Adapter | None:
        return lora.adapter_of(self.network)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.network.named_parameters()

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters with gradients by expert; each is in exactly one."""
        groups: dict[str, list[nn.Parameter]] = {"text": [], "image": []}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups[expert_of(name)].append(parameter)
        return groups

    def finetune(self, wanted: Finetune) -> MoTPolicy:
        """Choose what is trained and keep the reference: adapters, or a frozen copy of the present weights.

        What is trained is kept in fp32, whatever the network computes in: updates of the sizes used here are lost to
        bf16's rounding.
        """
        network = self.network
        refuse_full_tuning(kind_of(network), wanted.full)
        network.activation_checkpointing = wanted.activation_checkpointing
        if not wanted.full and lora.adapter_of(network) is None:
            lora.add_adapters(network, LORA_TARGETS, wanted.lora_rank, wanted.lora_alpha, wanted.seed)
        elif not wanted.full:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_("lora_" in name)
        else:
            if network.config.vision is None and {"connector", "vision"} & set(wanted.extra_modules):
                raise UsageError("train.extra_modules: this model has no vision tower and no connector to train")
            prefixes = (LAYERS, *(prefix for name in wanted.extra_modules for prefix in ALSO[name]))
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith(prefixes))
        for expert, parameters in self.trainable().items():
            for parameter in parameters:
                parameter.requires_grad_(expert in wanted.experts)
        if not wanted.full:
            return self
        policy = self.with_frozen_copy(on_host=wanted.reference_on_host)
        if wanted.shard_over > 1:
            assert policy.frozen is not None
            for one in (policy.frozen, network):
                shard(one, list(one.language_model.model.layers), wanted.shard_over)
        fp32_masters(network)
        return policy

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
        with lora.adapters_off(self.network):
            yield self

    @contextmanager
    def gathered(self) -> Iterator[MoTPolicy]:
        """The policy with whole weights, to sample with: no pass waits for other ranks, whatever each one writes.

        A copy in the dtypes that the layers compute in, so it says what the sharded one would; gone afterwards. A
        policy that is not sharded is given as it is.
        """
        if not self.is_sharded:
            yield self
            return
        state = {}
        for name, value in self.network.state_dict().items():
            value = value.detach()
            if name.startswith(LAYERS) and value.ndim == 2:  # a matrix is cast where it is used, a norm's weight is not
                value = value.to(self.dtype)
            state[name] = whole(value)
        yield replace(self, network=self._network_of(state).requires_grad_(False), frozen=None)

    def gathered_on_host(self, keep: bool) -> MoTPolicy:
        """The policy with whole weights in host memory, to be saved; of one that is not sharded, itself.

        Args:
            keep: False on ranks that only take part: their weights come to nothing.
        """
        if not self.is_sharded:
            return self
        state = {}
        for name, value in self.network.state_dict().items():
            full = whole(value.detach())
            if keep:
                state[name] = full.cpu()
        network = self._network_of(state, strict=keep)
        trained = {name for name, p in self.network.named_parameters() if p.requires_grad}
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
        return replace(self, network=network, frozen=None)

    def _network_of(self, state: dict[str, Tensor], strict: bool = True) -> MoT:
        """Another network of these sizes with weights of its own."""
        with torch.device("meta"):
            network = MoT(self.network.config, self.network.boundary_ids)
        network.load_state_dict(state, strict=strict, assign=True)
        return network.train(False)

    # ----- files

    def merged(self) -> MoTPolicy:
        """The policy with its adapter added to the weights, which are this policy's own."""
        make_plain(self.network)
        if self.adapter is not None:
            lora.merge_adapters(self.network)
        return self

    def save(self, directory: Path, base: str, dtype: torch.dtype | None = None) -> None:
        """Write the adapter on `base` where there is one, else a model directory (`weights.save_model`)."""
        if self.adapter is not None:
            lora.save_adapters(self.network, directory, base)
            return
        prompt = self.system_prompt or ""
        save_model(self.network, self.tokenizer, directory, origin=self.release, system_prompt=prompt, dtype=dtype)

    def load_adapter(self, directory: Path) -> None:
        lora.load_adapters(self.network, directory)

    def restore(self, directory: Path) -> None:
        restore_weights(self.network, directory)
