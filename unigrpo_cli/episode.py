"""Episodes, their segments, and the groups in which they are compared. Types only; files: run/episode_files.py.

An episode is a list of segments, each *given* (a prompt, a picture that is looked at) or *acted* (text, an image).
Prompt -> reasoning -> image is the first case; several rounds are longer lists of the same segments.

Everything needed to score the actions again is stored, never re-made: token ids (not text), the fp32 latents around
each stochastic step (not their noise), the times (not the rule that made them).

Shape letters: L tokens of a segment, T points of the time grid, K stochastic steps, N image tokens of D numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unigrpo_cli.algo.flow import Window
from unigrpo_cli.algo.guidance import NO_GUIDANCE, Guidance


@dataclass(frozen=True)
class Prompt:
    """A request, e.g. Prompt("two red circles", "two red circles", {"tag": "counting", ...}).

    Args:
        id: names the prompt in seeds and files; differs from `text` where a list repeats a prompt.
        metadata: data for rewards: GenEval's `include` and `exclude`, a text to render, anything.
        image: the picture that the text is about, e.g. the source of an edit: a file, several files, or pixels
            [h, w, 3]. Equality leaves it out.
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    image: str | tuple[str, ...] | NDArray[np.uint8] | None = field(default=None, compare=False)

    @property
    def pictures(self) -> tuple[str | NDArray[np.uint8], ...]:
        """The pictures in the order in which they are read; an edit has the size of the last."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(picture for picture in self.pictures if isinstance(picture, str))


@dataclass(frozen=True)
class GivenText:
    """Text that was read, not sampled. `ids` [L] are all its tokens, boundary tokens included."""

    role: str
    text: str
    ids: Tensor


PAINTED = "painted"
"""The role of a `GivenImage` that is the episode's own image, looked at."""


@dataclass(frozen=True)
class GivenImage:
    """An image that was read: the source of an edit, or (role PAINTED) the image before it as the model saw it.

    Args:
        grid: token rows and columns; N = rows * columns.
        latent: [N, D] fp32, or [0, D] when only the vision tower read it.
        pixels: [height, width, 3] uint8 on that grid.
        view: [h, w, 3] uint8, the vision tower's input; None without one.
    """

    role: str
    grid: tuple[int, int]
    latent: Tensor
    pixels: Tensor
    view: Tensor | None = None


@dataclass(frozen=True)
class TextActions:
    """Sampled text. The model read `opening + ids + closing`; only `ids` are actions.

    Args:
        ids: [L] int64, the stop token included when it was sampled.
        log_prob: [L] fp32, under the behaviour policy at `temperature`.
        finished: True when the stop token was sampled, False when the budget ran out (truncated).
        opening, closing: tokens read before the first action and after the last; `closing` is the forced stop token
            of a truncated text, and empty for a finished one.
        text: `ids` decoded, for people and rewards; never tokenised again.
    """

    ids: Tensor
    log_prob: Tensor
    finished: bool
    temperature: float
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class ImageActions:
    """A sampled image and its stochastic denoising steps.

    Args:
        grid: token rows and columns; N = rows * columns.
        times: [T] fp32, the whole schedule; step k goes from times[k] to times[k + 1].
        window: which steps were stochastic; its size is K (0 for an image sampled by Euler steps alone).
        sde, noise_level: the transition that drew them.
        before, after: [K, N, D] fp32, latents around each stochastic step.
        log_prob: [K] fp32, mean over N and D, under the behaviour policy.
        latent: [N, D] fp32, the final latent x_0.
        pixels: [height, width, 3] uint8, the latent decoded; the input of rewards.
        guidance: of its velocities.
    """

    grid: tuple[int, int]
    times: Tensor
    window: Window
    sde: str
    noise_level: float
    before: Tensor
    after: Tensor
    log_prob: Tensor
    latent: Tensor
    pixels: Tensor
    guidance: Guidance = NO_GUIDANCE


Segment = GivenText | GivenImage | TextActions | ImageActions


@dataclass(frozen=True)
class Episode:
    """One sample of a prompt: `member` is its number in the group, `seed` the source of all its randomness."""

    prompt: Prompt
    member: int
    seed: int
    segments: tuple[Segment, ...]

    @property
    def reasoning(self) -> str | None:
        """All sampled text, rounds joined by blank lines; None when the episode has no text actions."""
        texts = [s.text for s in self.segments if isinstance(s, TextActions)]
        return "\n\n".join(texts) if texts else None

    @property
    def images(self) -> tuple[ImageActions, ...]:
        return tuple(s for s in self.segments if isinstance(s, ImageActions))

    @property
    def rounds(self) -> list[tuple[str, ImageActions | None]]:
        """Each image with the text before it; a text that ended the episode has none."""
        found: list[tuple[str, ImageActions | None]] = []
        texts: list[str] = []
        for segment in self.segments:
            if isinstance(segment, TextActions):
                texts.append(segment.text)
            elif isinstance(segment, ImageActions):
                found.append(("\n\n".join(texts), segment))
                texts = []
        return [*found, ("\n\n".join(texts), None)] if texts else found

    @property
    def pixels(self) -> Tensor:
        """The last image: the input of the terminal reward."""
        return self.images[-1].pixels


@dataclass(frozen=True)
class Group:
    """All samples of one prompt: an advantage is relative to this set."""

    prompt: Prompt
    episodes: tuple[Episode, ...]


def flatten(groups: Sequence[Group]) -> list[Episode]:
    return [episode for group in groups for episode in group.episodes]


def structure(segments: Sequence[Segment]) -> tuple:
    """Episodes that share a batch agree in this: kinds of segments, in order, and sizes of images."""

    def one(segment: Segment) -> tuple:
        if isinstance(segment, GivenImage):
            view = None if segment.view is None else tuple(segment.view.shape[:2])
            return GivenImage, segment.grid, len(segment.latent), view
        if isinstance(segment, ImageActions):
            return ImageActions, segment.grid
        return (type(segment),)

    return tuple(map(one, segments))
