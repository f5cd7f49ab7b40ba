"""What rollout and replay need of a model, and nothing more.

A policy reads text into a context, says what word comes next, and says which way a noisy image should go. How
many networks it is made of is its own affair. Time and sign conventions are ours at this border: t = 1 is
noise, v = noise - data.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

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

    def decode_text(self, ids: Tensor) -> str:
        """Token ids as text, for people and rewards."""
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
