"""Is the text that the prompt asks for legible in the picture? A recogniser reads it, edit distance compares."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput
from unigrpo_cli.errors import RewardError

if TYPE_CHECKING:
    from PIL.Image import Image

_DOUBLE = re.compile(r'"([^"]*)"|“([^”]*)”')
_SINGLE = re.compile(r"(?<!\w)'([^']+)'(?!\w)|‘([^’]+)’")  # not the apostrophe of "dog's"
KINDS = {"vision-encoder-decoder": "TrOCR and its kin", "got_ocr2": "GOT-OCR2"}
"""Recognisers by their `model_type`: those that need no words of ours to begin reading."""
STOP = "<|im_end|>"


class OcrOptions(Options):
    recogniser: str | None = Field(
        None, description="directory or hub id of a transformers model: TrOCR (one line of text) or GOT-OCR2"
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of the weights")
    extra: float = Field(
        0.0, ge=0, le=1, description="times the share of read text beyond the target's length, taken off the score"
    )
    max_new_tokens: int = Field(64, ge=1, description="longest text that is read")
    batch_size: int = Field(16, ge=1, description="pictures in one pass")


class OcrReward:
    """1 minus the edit distance between the text asked for and the text read, over the former's length."""

    name = "ocr"
    summary = "whether the quoted text of the prompt can be read in the picture"
    range = (0.0, 1.0)
    needs = frozenset({"image"})
    licence = "that of the chosen recogniser"
    Options = OcrOptions

    def __init__(self, options: OcrOptions):
        self.options = options
        self.batch_size = options.batch_size

    def setup(self, context: RewardContext) -> None:
        """Get the recogniser.

        Raises:
            RewardError: when none is named, or it is not to be had, or of another kind.
        """
        name = self.options.recogniser
        if name is None:
            raise RewardError(
                "reward 'ocr': say what reads, e.g. ocr@recogniser=microsoft/trocr-base-printed (one line of text) "
                "or ocr@recogniser=stepfun-ai/GOT-OCR-2.0-hf"
            )
        self.shared = context.shared
        self.key = ("ocr", name, self.options.precision)
        self.recogniser: Recogniser | None = context.shared.get(
            self.key, lambda: load_recogniser(context, name, self.options.precision)
        )

    def score(self, batch: RewardBatch) -> RewardOutput:
        assert self.recogniser is not None
        targets = [target_of(s.prompt, s.metadata) for s in batch.samples]
        asked = [k for k, target in enumerate(targets) if target]  # the others have no opinion: do not read them
        images = [batch.images[k] for k in asked]
        read = dict(zip(asked, self.recogniser.read(images, self.options.max_new_tokens), strict=True))
        return RewardOutput(
            [agreement(t, read[k], self.options.extra) if t else None for k, t in enumerate(targets)],
            info=[{"target": t, "read": read[k]} if t else {} for k, t in enumerate(targets)],
        )

    def teardown(self) -> None:
        self.recogniser = None
        self.shared.release(self.key)


def target_of(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text asked for, normalised: what stands in double quotes first, else in single ones, else `text`."""
    for pattern in (_DOUBLE, _SINGLE):
        found = pattern.search(prompt)
        if found:
            return normal(found[1] or found[2] or "")
    return normal(str(metadata.get("text") or ""))


def normal(text: str) -> str:
    """Text as it is compared: compatible forms of Unicode made one, no white space, lower case."""
    return "".join(unicodedata.normalize("NFKC", text).split()).lower()


def agreement(target: str, read: str, extra: float = 0.0) -> float:
    """1 - min(distance, length) / length of a normalised target; 1 when it stands anywhere in what was read.

    Args:
        extra: penalty for reading more than was asked: times the share of the surplus in what was read.
    """
    seen = normal(read)
    distance = 0 if target in seen else min(edit_distance(target, seen), len(target))
    surplus = max(0, len(seen) - len(target)) / max(1, len(seen))
    return max(0.0, 1 - distance / len(target) - extra * surplus)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of one character that lead from `a` to `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


class Recogniser:
    """A transformers model that reads a picture, and its processor."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    def to(self, device: str) -> None:
        self.model.to(device)

    def read(self, images: Sequence[Image], max_new_tokens: int) -> list[str]:
        """The text in each picture, read greedily."""
        import torch

        if not images:
            return []
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=self._ends()
            )
        if "input_ids" in inputs:  # a decoder alone repeats the prompt that its processor made
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def _ends(self) -> list[int] | None:
        """Tokens that end a text: the model's own, and the end of a turn, where GOT-OCR2's examples stop."""
        own = self.model.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or [])
        turn = self.processor.tokenizer.get_vocab().get(STOP)
        return [*ends, *({turn} - {None, *ends})] or None


def load_recogniser(context: RewardContext, name: str, precision: str) -> Recogniser:
    """Load a recogniser of one of the kinds that this plugin can ask."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from unigrpo_plugins.weights import cannot, load_processing, load_transformer

    try:
        kind = AutoConfig.from_pretrained(name, local_files_only=context.offline).model_type
    except Exception as error:
        raise RewardError(f"reward 'ocr': {name} {cannot(context, name, error)}") from error
    if kind not in KINDS:
        known = " or ".join(f"{what} ({k})" for k, what in KINDS.items())
        raise RewardError(f"reward 'ocr': {name} is a {kind}; a recogniser is {known}")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    model = load_transformer(context, "ocr", AutoModelForImageTextToText, name, dtype)
    return Recogniser(model, load_processing(context, "ocr", name))
