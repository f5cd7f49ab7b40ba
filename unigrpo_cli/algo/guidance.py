"""Classifier-free guidance as BAGEL's own sampler has it. UniGRPO trains without it and evaluates with it.

Shape letters: B rows, N image tokens of D numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

RENORMS = ("global", "channel", "text_channel")


@dataclass(frozen=True)
class Guidance:
    """How far to go from what a poorer context says towards what the whole context says.

    Args:
        text: scale against the context without the last user text and what was written after it. Up to 1 there is
            no guidance at all, whatever `image` is.
        image: scale against the context without pictures and without reasoning; up to 1 it is left out.
        above, up_to: guidance acts where above < t <= up_to, on the shifted time.
        renorm: what keeps the guided velocity from growing. It is multiplied by |v| / |v_guided|, held within
            [renorm_least, 1]; norms over the whole image ("global") or over each token ("channel").
            "text_channel" does so per token after the text guidance, and nothing after the image guidance.
    """

    text: float = 1.0
    image: float = 1.0
    above: float = 0.4
    up_to: float = 1.0
    renorm: str = "global"
    renorm_least: float = 0.0

    def __post_init__(self) -> None:
        if self.renorm not in RENORMS:
            raise ValueError(f"unknown renorm {self.renorm!r}; accepted are {', '.join(RENORMS)}")

    @property
    def on(self) -> bool:
        return self.text > 1

    @property
    def contexts(self) -> int:
        """Network calls that a guided step takes."""
        return 1 + self.on + (self.on and self.image > 1)

    def acts(self, t: float) -> bool:
        """Whether the step that starts at time t is guided."""
        return self.on and self.above < t <= self.up_to


NO_GUIDANCE = Guidance()


def guided(v_BND: Tensor, less_text_BND: Tensor, less_image_BND: Tensor | None, guidance: Guidance) -> Tensor:
    """The guided velocity, fp32 [B, N, D].

    Args:
        v_BND: velocity in the whole context.
        less_text_BND, less_image_BND: in the contexts that `Guidance` describes; the second is not looked at
            unless `guidance.image` is above 1.
    """
    out = less_text_BND + guidance.text * (v_BND - less_text_BND)
    if guidance.renorm == "text_channel":
        out = _renorm(out, v_BND, (2,), guidance.renorm_least)
    if guidance.image > 1:
        assert less_image_BND is not None
        out = less_image_BND + guidance.image * (out - less_image_BND)
    if guidance.renorm == "text_channel":
        return out
    return _renorm(out, v_BND, (1, 2) if guidance.renorm == "global" else (2,), guidance.renorm_least)


def _renorm(out: Tensor, v: Tensor, over: tuple[int, ...], least: float) -> Tensor:
    def size(x: Tensor) -> Tensor:
        return x.square().sum(over, keepdim=True).clamp_min(1e-24).sqrt()  # at 0 its gradient is NaN

    return out * (size(v) / (size(out) + 1e-8)).clamp(least, 1.0)
