"""CLIP score: agreement of picture and prompt, by any open_clip model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput


class ClipOptions(Options):
    model: str | None = Field(
        None,
        description="open_clip name (ViT-B-32), hf-hub:org/repo, local-dir:/path, or `embedded`: the small CLIP of the "
        "shapes world, default with the embedded policy",
    )
    pretrained: str | None = Field(None, description="open_clip tag or weights file, for a plain model name")
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of the weights")
    batch_size: int = Field(64, ge=1, description="pictures per forward pass")
    scale: Literal["cosine", "clipscore", "percent"] = Field(
        "cosine", description="cosine in [-1, 1]; clipscore: 2.5 max(cos, 0); percent: 100 max(cos, 0)"
    )


RANGES = {"cosine": (-1.0, 1.0), "clipscore": (0.0, 2.5), "percent": (0.0, 100.0)}


class ClipReward:
    """Cosine of image and caption embeddings (Hessel et al. 2021 without their prompt prefix)."""

    name = "clip"
    summary = "agreement of picture and prompt by an open_clip model (cosine)"
    range = (-1.0, 1.0)
    needs = frozenset({"image"})
    licence = "that of the chosen weights; embedded: ours"
    Options = ClipOptions

    def __init__(self, options: ClipOptions):
        self.options = options
        self.range = RANGES[options.scale]
        self.batch_size = options.batch_size

    def check_options(self, context: RewardContext, metadata: Sequence[Mapping[str, Any]]) -> None:
        from unigrpo_plugins.encoders import named_model

        named_model(context, self.name, self.options.model, "model")

    def setup(self, context: RewardContext) -> None:
        from unigrpo_plugins.encoders import shared_encoder

        o = self.options
        self.shared = context.shared
        self.encoder, self.key = shared_encoder(context, self.name, o.model, o.pretrained, o.precision)
        self.prompt_length = self.encoder.prompt_length(self.name)

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        self.prompt_length.check(metadata)

    def score(self, batch: RewardBatch) -> RewardOutput:
        cosine = (self.encoder.images(batch.images) * self.encoder.texts(batch.prompts)).sum(dim=-1).cpu()
        positive = cosine.clamp_min(0)
        scores = {"cosine": cosine, "clipscore": 2.5 * positive, "percent": 100 * positive}
        info = self.prompt_length.info(batch.prompts)
        return RewardOutput(scores[self.options.scale], components={"cosine": cosine}, info=info)

    def teardown(self) -> None:
        self.encoder = None
        self.shared.release(self.key)
