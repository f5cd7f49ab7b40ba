"""The interface between the algorithm and a model: what rollout, replay and training call.

A policy reads text into a context, gives the logits of the next token, and gives velocities of noisy images. How
many networks it has is its own matter. At this interface t = 1 is noise, t = 0 is data, v = noise - data.

Shape letters: B rows (episodes), L text tokens, K noisy copies of each row's image, N image tokens of D numbers,
C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from unigrpo_cli.episode import GivenImage, GivenText, ImageActions, Prompt

Lengths = Tensor | Sequence[int] | None
"""Valid tokens of each row; None when all count. A tensor on the policy's device costs no wait."""


@dataclass(frozen=True)
class NoisyImage:
    """K noisy copies of each row's image: latents x_BKND in fp32, times t_BK, token rows and columns."""

    x_BKND: Tensor
    t_BK: Tensor
    grid: tuple[int, int]


class Context(Protocol):
    """What rows have read so far, e.g. keys and values. What is inside is the policy's own."""

    @property
    def rows(self) -> int: ...

    def reserve(self, slots: int) -> Self:
        """Room for `slots` more tokens, so that decoding does not copy the context for each."""
        ...

    def select(self, index_B: Tensor) -> Self:
        """Rows by index; repeat an index to share one prompt among the members of a group."""
        ...

    def put(self, index_B: Tensor, rows: Any) -> Self:
        """This context with `rows`, which were selected from it and have read on, in their old places."""
        ...


@dataclass(frozen=True)
class PolicyOutput:
    """What one pass gives: the new context, states of the text that was read, fp32 velocities of the images."""

    context: Any
    hidden_BLC: Tensor | None = None
    velocity_BKND: Tensor | None = None


class Policy(Protocol):
    """A model of text and image actions."""

    @property
    def open_id(self) -> int: ...
    @property
    def stop_id(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def token_dim(self) -> int: ...

    def preamble(self, prompt: Prompt, think: bool) -> tuple[GivenText | GivenImage, ...]:
        """The given segments before the first action: the prompt's text is the last, its picture comes before it."""
        ...

    def question(self, prompt: Prompt, think: bool) -> tuple[GivenText | GivenImage, ...]:
        """The given segments before an answer in words."""
        ...

    def require_vision(self) -> object:
        """Raises UsageError when the model has no vision tower: then it sees pictures as latents alone."""
        ...

    def show(self, images: Sequence[ImageActions], how: str) -> list[GivenImage]:
        """Painted images of one size as the model looks at them.

        Args:
            how: "latents", those that were painted; "pixels", the decoded picture's; "tower", the vision tower's
                view of it; "pixels+tower", first the one, then the other.

        Raises:
            UsageError: when the model cannot look at them so, or at any; without images too.
        """
        ...

    def decode_text(self, ids: Tensor) -> str:
        """Token ids as text, for people and rewards."""
        ...

    def encode_text(self, text: str) -> Tensor:
        """The ids of a text that the model would write, long [L], without opening and stop tokens."""
        ...

    def has_token(self, text: str) -> bool:
        """Whether a word is one token."""
        ...

    def unknown_words(self, text: str) -> list[str]:
        """Words that the model cannot read."""
        ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of an image of that many pixels."""
        ...

    def shift(self, grid: tuple[int, int], steps: int) -> float:
        """The time shift with which the model is usually sampled, for `sampling.shift=0`."""
        ...

    def empty_context(self, rows: int) -> Context: ...

    def forward(
        self,
        context: Any,
        ids_BL: Tensor | None = None,
        length_B: Lengths = None,
        image: NoisyImage | None = None,
        *,
        detach_context: bool = False,
    ) -> PolicyOutput:
        """Read text into the context, then give velocities of noisy images in it; either may be left out.

        Args:
            ids_BL: right-padded with any id.
            detach_context: image losses give no gradient to what was read.
        """
        ...

    def encode_image(
        self,
        context: Any,
        x_BND: Tensor,
        grid: tuple[int, int],
        view_BHWC: Tensor | None = None,
        *,
        detach: bool = False,
    ) -> Context:
        """The context after one image per row: its clean latents unless N = 0, then its view, uint8, if given.

        Args:
            detach: what is read later gives no gradient through the image's keys and values.
        """
        ...

    def compiled(self) -> Policy:
        """The same policy, its layers compiled. It rounds differently, so replay uses the policy itself."""
        ...

    def copies_at_once(self, image: NoisyImage) -> int:
        """How many noisy copies of each row's image one pass should take: by shapes and device alone."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits of the next token, impossible ids at -inf."""
        ...

    def decode_pixels(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Final latents to uint8 images [B, height, width, 3]."""
        ...

    def encode_pixels(self, pixels_BHWC: Tensor) -> Tensor:
        """uint8 images of one size that can be painted as latents x_BND: what `decode_pixels` turns into images."""
        ...

    def reference(self) -> AbstractContextManager[Policy]:
        """The policy as it was before training."""
        ...

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters with gradients, by expert: "text" and "image"."""
        ...


@dataclass(frozen=True)
class Adapter:
    """A policy's low-rank adapters. `idle`: they change nothing, as before the first update of a run."""

    rank: int
    alpha: float
    idle: bool


@dataclass(frozen=True)
class Finetune:
    """What is trained, and how its reference is kept.

    Args:
        full: all weights of the layers; else adapters.
        experts: "text", "image" or both.
        extra_modules: parts besides the layers, by the names of `train.extra_modules`.
        lora_rank, lora_alpha, seed: of fresh adapters; a policy that has adapters keeps its own.
        reference_on_host: the frozen copy of full fine-tuning lives in host memory.
        shard_over: ranks that share the layers' weights; 1 keeps them whole.
    """

    full: bool
    experts: tuple[str, ...]
    extra_modules: tuple[str, ...]
    lora_rank: int
    lora_alpha: float
    seed: int
    activation_checkpointing: bool
    reference_on_host: bool
    shard_over: int


class TrainablePolicy(Policy, Protocol):
    """A policy that runs can train, save and resume."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def is_sharded(self) -> bool: ...
    @property
    def adapter(self) -> Adapter | None: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def finetune(self, wanted: Finetune) -> Self:
        """Set what has gradients, and keep the reference."""
        ...

    def reference(self) -> AbstractContextManager[Self]: ...

    def gathered(self) -> AbstractContextManager[Self]:
        """The policy with whole weights where they are sharded over ranks, for sampling."""
        ...

    def gathered_on_host(self, keep: bool) -> Self:
        """The policy with whole weights in host memory, for saving; without `keep` this rank only takes part."""
        ...

    def save(self, directory: Path, base: str) -> None:
        """Write the adapter on `base` where there is one, else a complete model directory."""
        ...

    def load_adapter(self, directory: Path) -> None: ...

    def merged(self) -> Self:
        """The policy with its adapter added to its weights; it has none afterwards."""
        ...

    def restore(self, directory: Path) -> None:
        """Replace the weights by those that `save` wrote."""
        ...
