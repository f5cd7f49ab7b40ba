"""LAION's aesthetic score: a small head on a CLIP's image embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext
from unigrpo_plugins.heads import read_head

if TYPE_CHECKING:
    import torch

MODEL, PRETRAINED = "ViT-L-14-quickgelu", "openai"
WHERE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"


class AestheticOptions(Options):
    head: str | None = Field(
        None,
        description="the head: a .safetensors file, a directory with one, or org/repo[/file] on the hub; default with "
        "the embedded policy: the small head of the shapes world",
    )
    model: str | None = Field(
        None,
        description=f"open_clip model that the head was trained on, as for `clip`; default {MODEL}, or `embedded` "
        "with the embedded policy and no head",
    )
    pretrained: str | None = Field(None, description=f"its weights; default {PRETRAINED} for the default model")
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of the CLIP's weights")
    activation: Literal["auto", "none", "relu"] = Field(
        "auto", description="between the head's layers; auto: by the numbers of the layers"
    )
    batch_size: int = Field(64, ge=1, description="pictures per forward pass")


class AestheticReward:
    """LAION's aesthetic predictor, version 1 or 2: how people rate pictures with such an embedding."""

    name = "aesthetic"
    summary = "LAION aesthetic score, about 4 to 7 (a head on CLIP embeddings)"
    range = (0.0, 10.0)
    needs = frozenset({"image"})
    licence = "head v1 MIT, v2 Apache-2.0; CLIP MIT; embedded: ours"
    Options = AestheticOptions

    def __init__(self, options: AestheticOptions):
        self.options = options
        self.batch_size = options.batch_size

    def check_options(self, context: RewardContext, metadata: Sequence[Mapping[str, Any]]) -> None:
        if self.options.head is None:
            self._head_file(context, self._model(context))

    def setup(self, context: RewardContext) -> None:
        from unigrpo_cli.errors import RewardError
        from unigrpo_plugins.encoders import shared_encoder
        from unigrpo_plugins.weights import load_state

        o = self.options
        model = self._model(context)
        pretrained = o.pretrained or (PRETRAINED if model == MODEL else None)
        path = self._head_file(context, model)
        self.head = read_head(load_state(path, f"reward {self.name!r}"), path.name, o.activation)
        self.shared = context.shared
        self.encoder, self.key = shared_encoder(context, self.name, model, pretrained, o.precision)
        width = self._width()
        if width != self.head.width:
            self.teardown()
            raise RewardError(
                f"reward {self.name!r}: {path.name} takes embeddings of {self.head.width} numbers, and {model} "
                f"gives {width}; give the model that the head was trained on with @model=... (768: {MODEL})"
            )

    def _model(self, context: RewardContext) -> str:
        from unigrpo_plugins.encoders import EMBEDDED

        return self.options.model or (EMBEDDED if context.embedded and self.options.head is None else MODEL)

    def _head_file(self, context: RewardContext, model: str) -> Path:
        from unigrpo_cli.errors import RewardError
        from unigrpo_plugins.encoders import EMBEDDED
        from unigrpo_plugins.weights import conversion, find_weights

        if self.options.head is not None:
            return find_weights(context, self.name, "head", self.options.head)
        if model == EMBEDDED:
            return Path(str(files("unigrpo_cli") / "toy" / "weights" / "aesthetic" / "head.safetensors"))
        published = "sac+logos+ava1-l14-linearMSE.pth"
        raise RewardError(
            f"reward {self.name!r}: no head for {model}; download {published} from {WHERE}, convert it with: "
            f"{conversion(published)} and give it with @head=FILE"
        )

    def _width(self) -> int:
        """Width of the encoder's embeddings, measured on a blank picture: models name it differently."""
        from PIL import Image

        return self.encoder.images([Image.new("RGB", (32, 32))]).shape[-1]

    def score(self, batch: RewardBatch) -> torch.Tensor:
        return self.head(self.encoder.images(batch.images).cpu())

    def teardown(self) -> None:
        self.encoder = None
        self.shared.release(self.key)
