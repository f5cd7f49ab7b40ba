"""CLIP score: how well the picture and the prompt agree, by any open_clip model."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput

EMBEDDED = "embedded"


class ClipOptions(Options):
    model: str | None = Field(
        None,
        description="open_clip name (ViT-B-32), hf-hub:org/repo, local-dir:/path, or `embedded`, the small one "
        "of the shapes world and the default with the embedded policy",
    )
    pretrained: str | None = Field(None, description="open_clip tag or weights file, for a plain model name")
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of the weights")
    batch_size: int = Field(64, ge=1, description="pictures in one pass")
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

    def setup(self, context: RewardContext) -> None:
        """Load the model; refuse to run on random weights.

        Raises:
            RewardError: when no model is named, or its weights are not to be had.
        """
        import open_clip

        from unigrpo_cli.errors import RewardError

        name = self.options.model or (EMBEDDED if context.embedded else None)
        if name is None:
            raise RewardError(
                "reward 'clip': say which model, e.g. clip@model=ViT-B-32@pretrained=laion2b_s34b_b79k "
                "or clip@model=local-dir:/path"
            )
        schema = f"local-dir:{files('unigrpo_cli') / 'embedded' / 'clip'}" if name == EMBEDDED else name
        plain = ":" not in schema
        if plain and not self.options.pretrained:
            tags = open_clip.list_pretrained_tags_by_model(name)
            known = f"one of {', '.join(tags[:6])}" if tags else "a weights file"
            raise RewardError(f"reward 'clip': model {name!r} needs @pretrained=..., {known}")
        try:
            # OpenAI's weights were trained with QuickGELU; under a plain name open_clip only warns and then
            # computes something else.
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                schema,
                pretrained=self.options.pretrained if plain else None,
                precision=self.options.precision,
                device=context.device,
                **({"force_quick_gelu": True} if self.options.pretrained == "openai" else {}),
            )
            self.tokenizer = open_clip.get_tokenizer(schema)
        except (RuntimeError, OSError, ValueError) as error:
            hint = " (HF_HUB_OFFLINE is set)" if context.offline else ""
            raise RewardError(
                f"reward 'clip': {name!r} cannot be loaded{hint}: {str(error).splitlines()[0]}"
            ) from error
        self.model.eval()
        self.device = context.device

    def score(self, batch: RewardBatch) -> RewardOutput:
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self.preprocess(image) for image in batch.images])
            dtype = next(self.model.visual.parameters()).dtype
            seen = self.model.encode_image(pixels.to(self.device, dtype), normalize=True)
            unique = list(dict.fromkeys(batch.prompts))  # a group shares its prompt: read it once
            read = self.model.encode_text(self.tokenizer(unique).to(self.device), normalize=True)
            text = read[[unique.index(p) for p in batch.prompts]]
            cosine = (seen.float() * text.float()).sum(dim=-1).cpu()
        positive = cosine.clamp_min(0)
        scores = {"cosine": cosine, "clipscore": 2.5 * positive, "percent": 100 * positive}
        return RewardOutput(scores[self.options.scale], components={"cosine": cosine})

    def teardown(self) -> None:
        self.model = None
