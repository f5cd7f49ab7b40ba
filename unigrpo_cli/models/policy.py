"""What rollout and replay need of a model, and nothing more.

A policy reads text into a context, says what word comes next, and says which way a noisy image should go. How
many networks it is made of is its own affair. Time and sign conventions are ours at this border: t = 1 is
noise, v = noise - data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from unigrpo_cli.episode import GivenImage, GivenText, Prompt
    from unigrpo_cli.models.mot.context import Context
    from unigrpo_cli.models.mot.network import MoTOutput, NoisyImage


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
        """The given segments before the first action; the prompt's text is the last."""
        ...

    def question(self, prompt: Prompt, think: bool) -> tuple[GivenText | GivenImage, ...]:
        """The given segments before an answer in words."""
        ...

    def require_vision(self) -> object:
        """Raises UsageError when the model cannot be given pictures."""
        ...

    def decode_text(self, ids: Tensor) -> str:
        """Token ids as text, for people and rewards."""
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

    def empty_context(self, rows: int) -> Context: ...

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
        """Read text or a given picture into the context, then give velocities of noisy images in it."""
        ...

    def compiled(self) -> Policy:
        """The same policy, its layers compiled. Rounds otherwise, so replays are of the policy as it is."""
        ...

    def copies_at_once(self, image: NoisyImage) -> int:
        """How many noisy copies of each row's image one pass should take: by shapes and device alone."""
        ...

    def see(self, view_BHWC: Tensor) -> Tensor:
        """Given pictures, uint8, as `forward` takes them."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits of the next token, impossible ids at -inf."""
        ...

    def decode_pixels(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Final latents to uint8 images [B, height, width, 3]."""
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

    def widened(self) -> Self:
        """A copy that computes in fp32."""
        ...

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

    def restore(self, directory: Path) -> None:
        """Replace the weights by those that `save` wrote."""
        ...
