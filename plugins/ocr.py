"""Can the text that the prompt asks for be read in the picture? A recogniser reads, the edit distance compares."""

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

QUOTES = {
    '"': '"',
    "\uff02": "\uff02",
    "\u201c": '\u201d"',
    "\u201e": '\u201c\u201d"',
    "\u201d": "\u201d",
    "\u00ab": "\u00bb",
    "\u00bb": "\u00ab",
    "\u2039": "\u203a",
    "\u203a": "\u2039",
    "\u300c": "\u300d",
    "\u300e": "\u300f",
    "\uff62": "\uff63",
    "\u301d": "\u301e\u301f",
    "\u300a": "\u300b",
}
"""Opening quotes with those that close them: "", “”, „“, ”” (Swedish), «», »«, ‹›, ›‹, 「」, 『』, ｢｣, 〝〞, 《》."""
INCHES = '"\u201d\uff02'
_LETTER = r"[^\W\u3040-\U0010ffff]"  # of a script that has apostrophes
_SINGLE = re.compile(
    rf"(?:(?<!{_LETTER})(?<!['’])['’]|[‘‚])((?:[^'‘’‚]|(?<={_LETTER})['’](?={_LETTER}))+)['’‘](?!{_LETTER})"
)
KINDS = {"vision-encoder-decoder": "TrOCR", "got_ocr2": "GOT-OCR2"}
"""Recognisers by `model_type`: those that read without a prompt."""
STOP = "<|im_end|>"
RAPID = "rapidocr"


class OcrOptions(Options):
    recogniser: str | None = Field(
        None,
        description="`rapidocr` (its own models, on the CPU), or directory or hub id of a transformers model: TrOCR "
        "(one line of text) or GOT-OCR2 (a page)",
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of the weights")
    target: Literal["first", "last", "all"] = Field("first", description="which of several quoted texts must be there")
    extra: float = Field(
        0.0, ge=0, le=1, description="penalty for more text: times its share of the read text, subtracted"
    )
    max_new_tokens: int = Field(64, ge=1, description="limit of tokens that are read")
    batch_size: int = Field(16, ge=1, description="pictures per forward pass")


class OcrReward:
    """1 minus the edit distance between the wanted and the read text, over the length of the wanted one."""

    name = "ocr"
    summary = "whether the quoted text of the prompt can be read in the picture"
    range = (0.0, 1.0)
    needs = frozenset({"image"})
    licence = "that of the chosen recogniser"
    Options = OcrOptions

    def __init__(self, options: OcrOptions):
        self.options = options
        self.batch_size = options.batch_size

    def check_options(self, context: RewardContext, metadata: Sequence[Mapping[str, Any]]) -> None:
        if self.options.recogniser is None:
            raise RewardError(
                "reward 'ocr': name a recogniser, e.g. ocr@recogniser=microsoft/trocr-base-printed (one line of text) "
                "or ocr@recogniser=stepfun-ai/GOT-OCR-2.0-hf, or ocr@recogniser=rapidocr, which has its models with it"
            )

    def setup(self, context: RewardContext) -> None:
        self.check_options(context, ())
        name = self.options.recogniser
        assert name is not None
        self.shared = context.shared
        self.key = ("ocr", name, self.options.precision)
        self.recogniser: Recogniser | RapidRecogniser | None = context.shared.get(
            self.key, lambda: load_recogniser(context, name, self.options.precision)
        )

    def score(self, batch: RewardBatch) -> RewardOutput:
        assert self.recogniser is not None
        targets = [targets_of(s.prompt, s.metadata, self.options.target) for s in batch.samples]
        asked = [k for k, own in enumerate(targets) if own]  # the others are no opinion: do not read them
        images = [batch.images[k] for k in asked]
        read = dict(zip(asked, self.recogniser.read(images, self.options.max_new_tokens), strict=True))
        return RewardOutput(
            [agreement(t, read[k], self.options.extra) if t else None for k, t in enumerate(targets)],
            info=[{"target": " ".join(t), "read": read[k]} if t else {} for k, t in enumerate(targets)],
        )

    def teardown(self) -> None:
        self.recogniser = None
        self.shared.release(self.key)


def targets_of(prompt: str, metadata: Mapping[str, Any], which: str = "first") -> list[str]:
    """The texts that a prompt asks for, normalised: its quoted ones, else `text` of its metadata.

    Args:
        which: of several quoted texts: "first", "last" or "all".
    """
    texts = [text for text in map(normal, quoted(prompt)) if text] or [normal(str(metadata.get("text") or ""))]
    chosen = texts if which == "all" else texts[:1] if which == "first" else texts[-1:]
    return [text for text in chosen if text]


def quoted(prompt: str) -> list[str]:
    """The quoted texts of a prompt: those in double quotes of any script, else those in single ones.

    A quote behind a digit, outside of a quoted text, is an inch mark. An apostrophe inside a word is not a quote.
    """
    texts, at = [], 0
    while at < len(prompt):
        ends = [] if _is_inch_mark(prompt, at) else [prompt.find(c, at + 1) for c in QUOTES.get(prompt[at], "")]
        end = min((e for e in ends if e > at), default=at)
        if end > at:
            texts.append(prompt[at + 1 : end])
        at = end + 1
    return texts or [m[1] for m in _SINGLE.finditer(prompt) if m[1] != "n"]  # rock 'n' roll


def _is_inch_mark(prompt: str, at: int) -> bool:
    """Whether a quote is directly behind a digit, or free between spaces behind one."""
    before, after = prompt[:at], prompt[at + 1 :]
    if before != before.rstrip() and after == after.lstrip():
        return False
    return prompt[at] in INCHES and unicodedata.category((before.rstrip() or " ")[-1]) in ("Nd", "No")


def normal(text: str) -> str:
    """Text as it is compared: Unicode's NFKC form, one kind of apostrophe, without white space, in lower case."""
    return "".join(unicodedata.normalize("NFKC", text).replace("’", "'").split()).lower()


def agreement(targets: Sequence[str], read: str, extra: float = 0.0) -> float:
    """1 - min(distance, length) / length of the normalised targets; 1 when they are anywhere in the read text.

    One target is compared with the whole text, each of several with the part of it that is nearest.

    Args:
        extra: penalty for more text than the targets: times its share of the read text.
    """
    seen, length = normal(read), sum(map(len, targets))
    distance = 0
    for target in targets:
        if target not in seen:
            distance += min(edit_distance(target, seen, anywhere=len(targets) > 1), len(target))
    surplus = max(0, len(seen) - length) / max(1, len(seen))
    return max(0.0, 1 - distance / length - extra * surplus)


def edit_distance(a: str, b: str, *, anywhere: bool = False) -> int:
    """Fewest insertions, deletions and substitutions of a character from `a` to `b` (Levenshtein).

    Args:
        anywhere: to the nearest part of `b` instead (Sellers 1980).
    """
    row = [0] * (len(b) + 1) if anywhere else list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return min(row) if anywhere else row[-1]


class Recogniser:
    """A transformers model that reads pictures, and its processor."""

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
        if "input_ids" in inputs:  # a decoder-only model repeats the prompt of its processor
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def _ends(self) -> list[int] | None:
        """Tokens that end a text: the model's, and the end of a turn, where GOT-OCR2's examples stop."""
        own = self.model.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or [])
        turn = self.processor.tokenizer.get_vocab().get(STOP)
        return [*ends, *({turn} - {None, *ends})] or None


class RapidRecogniser:
    """PP-OCR's detection and recognition of the package rapidocr, by onnxruntime on the CPU."""

    def __init__(self, engine: Any):
        self.engine = engine

    def to(self, device: str) -> None:
        """It stays on the CPU."""

    def read(self, images: Sequence[Image], max_new_tokens: int) -> list[str]:
        """The text in each picture, its lines joined by spaces."""
        import numpy as np

        found = [self.engine(np.asarray(image.convert("RGB"))[:, :, ::-1]) for image in images]  # it takes BGR
        return [" ".join(seen.txts or ()) for seen in found]


def _rapid() -> RapidRecogniser:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise RewardError(
            "reward 'ocr': recogniser=rapidocr needs its package; pip install 'unigrpo-cli[ocr]'"
        ) from error
    return RapidRecogniser(RapidOCR(params={"Global.log_level": "error"}))  # else it reports each empty picture


def load_recogniser(context: RewardContext, name: str, precision: str) -> Recogniser | RapidRecogniser:
    if name == RAPID:
        return _rapid()
    from transformers import AutoConfig, AutoModelForImageTextToText

    from unigrpo_plugins.weights import cannot, dtype_of, load_processing, load_transformer

    try:
        kind = AutoConfig.from_pretrained(name, local_files_only=context.offline).model_type
    except Exception as error:
        raise RewardError(f"reward 'ocr': {name} {cannot(context, name, error)}") from error
    if kind not in KINDS:
        known = " or ".join(f"{what} ({k})" for k, what in KINDS.items())
        raise RewardError(f"reward 'ocr': {name} is a {kind}; a recogniser is {known}")
    model = load_transformer(context, "ocr", AutoModelForImageTextToText, name, dtype_of(precision))
    return Recogniser(model, load_processing(context, "ocr", name))
