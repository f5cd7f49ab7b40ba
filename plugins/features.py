"""A frozen vision backbone of transformers (timm's too, by their wrapper there): a picture to a map of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unigrpo_cli import RewardContext
from unigrpo_cli.errors import RewardError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, where a model does not say


class Backbone:
    """Pictures are stretched to the model's square, so that each feature stands for a part of the whole picture."""

    def __init__(self, model: Any, mean: Sequence[float], deviation: Sequence[float], batch_size: int, device: str):
        self.model, self.mean, self.deviation = model, mean, deviation
        self.batch_size, self.device = batch_size, device
        side = getattr(model.config, "image_size", None) or DEFAULT_SIDE
        self.side = int(side if isinstance(side, int) else side[0])

    def to(self, device: str) -> None:
        self.model.to(device)
        self.device = device

    def features(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """[rows, columns, C] of each picture."""
        import torch

        found: list[NDArray[np.float32]] = []
        with torch.inference_mode():
            for at in range(0, len(images), self.batch_size):
                x = torch.stack([self._prepared(image) for image in images[at : at + self.batch_size]])
                state = self.model(pixel_values=x.to(self.device)).last_hidden_state
                found += [own.cpu().numpy() for own in self._on_grid(state.float())]
        return found

    def _prepared(self, image: NDArray[np.uint8]) -> Any:
        import numpy as np
        import torch
        from PIL import Image

        picture = Image.fromarray(image).resize((self.side, self.side), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (self.mean, self.deviation))
        return (x - mean) / deviation

    def _on_grid(self, state: Any) -> Any:
        """[B, rows, columns, C] of convolutions [B, C, rows, columns] or of tokens, whose first ones have no place."""
        if state.ndim == 4:
            return state.permute(0, 2, 3, 1)
        patch = getattr(self.model.config, "patch_size", None)
        n = self.side // int(patch) if isinstance(patch, int) else math.isqrt(state.shape[1])
        return state[:, state.shape[1] - n * n :].unflatten(1, (n, n))


def shared_backbone(
    context: RewardContext, where: str, name: str | None, batch_size: int
) -> tuple[Backbone, tuple[str, ...]]:
    """The backbone of that name and its key, for `context.shared.release`."""
    if name is None:
        raise RewardError(f"{where}: say which vision model, e.g. @model=facebook/dinov2-base, or a directory with one")
    key = ("backbone", name)
    return context.shared.get(key, lambda: _load(context, where, name, batch_size)), key


def _load(context: RewardContext, where: str, name: str, batch_size: int) -> Backbone:
    import torch
    from transformers import AutoImageProcessor, AutoModel

    from unigrpo_plugins.weights import cannot, load_transformer

    try:
        processing = AutoImageProcessor.from_pretrained(name, local_files_only=context.offline)
    except Exception as error:  # OSError, ValueError, ImportError: one line for all
        raise RewardError(f"{where}: the processor of {name} {cannot(context, name, error)}") from error
    mean = getattr(processing, "image_mean", None) or MEAN
    deviation = getattr(processing, "image_std", None) or DEVIATION
    model = load_transformer(context, where, AutoModel, name, torch.float32)
    return Backbone(model, mean, deviation, batch_size, context.device)
