"""Models of human preference: PickScore and HPSv2, CLIPs tuned on choices between two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput
from unigrpo_plugins.encoders import PromptLength

if TYPE_CHECKING:
    import torch

PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
UNIT = 26.0
"""About the best PickScore in practice; others divide by it, too."""
HPS = "HPS_v2.1_compressed"


class PickScoreOptions(Options):
    model: str = Field(PICKSCORE, description="directory or hub id of a transformers CLIP")
    processor: str | None = Field(
        None,
        description="directory or hub id of its processor; default: that of the model's directory, else "
        f"{PICKSCORE_PROCESSOR}",
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of the weights")
    scale: Literal["raw", "unit"] = Field("raw", description=f"raw: about 18 to 26; unit: that over {UNIT:g}")
    batch_size: int = Field(32, ge=1, description="pictures per forward pass")


class PickScoreModel:
    """A transformers CLIP and its processor."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    def to(self, device: str) -> None:
        self.model.to(device)

    @property
    def context_length(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def count_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text, truncation=False)["input_ids"])

    def scores(self, batch: RewardBatch) -> torch.Tensor:
        """[B]: exp(logit_scale) times the cosine of picture and prompt."""
        import torch

        inputs = self.processor(
            text=batch.prompts,
            images=batch.images,
            padding=True,
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        ).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            seen = self.model(**inputs)
            cosine = (seen.image_embeds.float() * seen.text_embeds.float()).sum(dim=-1)
            return (self.model.logit_scale.float().exp() * cosine).cpu()


class PickScoreReward:
    """PickScore (Kirstain et al. 2023): exp(logit_scale) times the cosine of picture and prompt."""

    name = "pickscore"
    summary = "PickScore: which picture people pick for the prompt"
    range = (-100.0, 100.0)
    needs = frozenset({"image"})
    licence = "weights: MIT"
    Options = PickScoreOptions

    def __init__(self, options: PickScoreOptions):
        self.options = options
        self.batch_size = options.batch_size
        if options.scale == "unit":
            self.range = (-100 / UNIT, 100 / UNIT)

    def setup(self, context: RewardContext) -> None:
        o = self.options
        self.shared = context.shared
        self.key = ("pickscore", o.model, o.processor or "", o.precision)
        self.model: PickScoreModel | None = context.shared.get(self.key, lambda: self._load(context))
        self.prompt_length = PromptLength(self.name, self.model.context_length, self.model.count_tokens)

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        self.prompt_length.check(metadata)

    def _load(self, context: RewardContext) -> PickScoreModel:
        from transformers import CLIPModel

        from unigrpo_plugins.weights import dtype_of, load_processing, load_transformer

        o = self.options
        files = (Path(o.model) / "preprocessor_config.json", Path(o.model) / "processor_config.json")
        own = o.model if any(path.is_file() for path in files) else PICKSCORE_PROCESSOR
        model = load_transformer(context, self.name, CLIPModel, o.model, dtype_of(o.precision))
        return PickScoreModel(model, load_processing(context, self.name, o.processor or own))

    def score(self, batch: RewardBatch) -> RewardOutput:
        assert self.model is not None
        scores = self.model.scores(batch)
        scores = scores / UNIT if self.options.scale == "unit" else scores
        return RewardOutput(scores, info=self.prompt_length.info(batch.prompts))

    def teardown(self) -> None:
        self.model = None
        self.shared.release(self.key)


class HPSv2Options(Options):
    weights: str | None = Field(
        None,
        description=f"{HPS} as .safetensors, a directory with it, or org/repo[/file] on the hub",
    )
    model: str = Field("ViT-H-14", description="open_clip architecture of the weights")
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of the weights")
    batch_size: int = Field(32, ge=1, description="pictures per forward pass")


class HPSv2Reward:
    """Human Preference Score v2 and v2.1 (Wu et al. 2023): cosine of prompt and picture, padded to a square."""

    name = "hpsv2"
    summary = "Human Preference Score v2: agreement with what people prefer, about .2 to .35"
    range = (-1.0, 1.0)
    needs = frozenset({"image"})
    licence = "weights: Apache-2.0"
    Options = HPSv2Options

    def __init__(self, options: HPSv2Options):
        self.options = options
        self.batch_size = options.batch_size

    def check_options(self, context: RewardContext, metadata: Sequence[Mapping[str, Any]]) -> None:
        from unigrpo_cli.errors import RewardError
        from unigrpo_plugins.weights import conversion

        if self.options.weights is None:
            raise RewardError(
                f"reward {self.name!r}: name its weights with @weights=FILE; fetch them with `hf download "
                f"xswu/HPSv2 {HPS}.pt --local-dir .` and convert them with: {conversion(f'{HPS}.pt')}"
            )

    def setup(self, context: RewardContext) -> None:
        from unigrpo_plugins.encoders import shared_encoder
        from unigrpo_plugins.weights import find_weights

        o = self.options
        self.check_options(context, ())
        assert o.weights is not None
        path = find_weights(context, self.name, "weights", o.weights)
        self.shared = context.shared
        # It was trained on whole pictures, padded to a square.
        self.encoder, self.key = shared_encoder(context, self.name, o.model, str(path), o.precision, "longest")
        self.prompt_length = self.encoder.prompt_length(self.name)

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        self.prompt_length.check(metadata)

    def score(self, batch: RewardBatch) -> RewardOutput:
        cosine = self.encoder.images(batch.images) * self.encoder.texts(batch.prompts)
        return RewardOutput(cosine.sum(dim=-1).cpu(), info=self.prompt_length.info(batch.prompts))

    def teardown(self) -> None:
        self.encoder = None
        self.shared.release(self.key)
