"""One open_clip model for all rewards that look through it: pictures and texts to unit vectors.

`clip`, `aesthetic`, `hpsv2` and the colours of `geneval` ask here with the same key and get the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from unigrpo_cli import RewardContext

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

EMBEDDED = "embedded"


class Encoder:
    """An open_clip model with its preprocessing and tokenizer. Embeddings are fp32 and of length 1."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, device: str):
        self.model, self.preprocess, self.tokenizer, self.device = model, preprocess, tokenizer, device

    def to(self, device: str) -> None:
        self.model.to(device)
        self.device = device

    @property
    def scale(self) -> float:
        """What the model multiplies cosines by before a softmax: its own inverse temperature."""
        return float(self.model.logit_scale.detach().exp())

    def images(self, images: Sequence[Image]) -> torch.Tensor:
        """[B, E] of PIL images."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self.preprocess(image) for image in images])
            dtype = next(self.model.visual.parameters()).dtype
            return self.model.encode_image(pixels.to(self.device, dtype), normalize=True).float()

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[B, E] of texts; one that comes again is read once."""
        import torch

        with torch.inference_mode():
            unique = list(dict.fromkeys(texts))
            read = self.model.encode_text(self.tokenizer(unique).to(self.device), normalize=True).float()
            return read[[unique.index(text) for text in texts]]


def key_of(model: str, pretrained: str | None, precision: str, resize: str | None = None) -> tuple[str, ...]:
    """What names an encoder among the shared models."""
    return ("open_clip", model, pretrained or "", precision, resize or "")


def shared_encoder(
    context: RewardContext,
    reward: str,
    model: str | None,
    pretrained: str | None,
    precision: str = "fp32",
    resize: str | None = None,
) -> tuple[Encoder, tuple[str, ...]]:
    """The encoder of that name and its key, for `context.shared.release` at teardown.

    Args:
        resize: open_clip's resize mode ("longest" pads instead of cropping); None is the weights' own.

    Raises:
        RewardError: when no model is named, or its weights are not to be had.
    """
    from unigrpo_cli.errors import RewardError

    name = model or (EMBEDDED if context.embedded else None)
    if name is None:
        raise RewardError(
            f"reward {reward!r}: say which model, e.g. {reward}@model=ViT-B-32@pretrained=laion2b_s34b_b79k "
            f"or {reward}@model=local-dir:/path"
        )
    key = key_of(name, pretrained, precision, resize)
    return context.shared.get(key, lambda: load_encoder(context, reward, name, pretrained, precision, resize)), key


def load_encoder(
    context: RewardContext,
    reward: str,
    name: str,
    pretrained: str | None,
    precision: str,
    resize: str | None = None,
) -> Encoder:
    """Load an open_clip model; refuse to run on random weights."""
    import open_clip
    from safetensors import SafetensorError

    from unigrpo_cli.errors import RewardError
    from unigrpo_plugins.weights import first_line

    schema = f"local-dir:{files('unigrpo_cli') / 'toy' / 'weights' / 'clip'}" if name == EMBEDDED else name
    plain = ":" not in schema
    if plain and not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"one of {', '.join(tags[:6])}" if tags else "a weights file"
        raise RewardError(f"reward {reward!r}: model {name!r} needs @pretrained=..., {known}")
    try:
        # Some weights (OpenAI's, MetaCLIP's, ...) were trained with QuickGELU, as open_clip's own table says; under
        # a plain name it only warns and then computes something else.
        facts = (open_clip.get_pretrained_cfg(name, pretrained) if plain and pretrained else None) or {}
        model, preprocess = open_clip.create_model_from_pretrained(
            schema,
            pretrained=pretrained if plain else None,
            precision=precision,
            device=context.device,
            image_resize_mode=resize,
            **({"force_quick_gelu": True} if facts.get("quick_gelu") else {}),
        )
        tokenizer = open_clip.get_tokenizer(schema)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        hint = " (HF_HUB_OFFLINE is set)" if context.offline else ""
        raise RewardError(f"reward {reward!r}: {name!r} cannot be loaded{hint}: {first_line(error)}") from error
    model.eval()
    return Encoder(model, preprocess, tokenizer, context.device)
