"""A judge on this machine: an image-text-to-text model of transformers. One forward pass, no generation."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from unigrpo_cli import RewardContext
from unigrpo_cli.errors import RewardError
from unigrpo_plugins.judge_modes import LEAST_MASS, Question, Reading, YesNoOdds, fenced, no_opinion, word_of
from unigrpo_plugins.weights import dtype_of, load_processing, load_transformer

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class VisionLanguageModel:
    """A model with its processor."""

    def __init__(self, model: Any, processor: Any, device: str):
        self.model, self.processor, self.device = model, processor, device

    def to(self, device: str) -> None:
        self.model.to(device)
        self.device = device


class LocalJudge:
    """P(yes) / (P(yes) + P(no)) of the next token, over all tokens that spell either word."""

    def __init__(self, context: RewardContext, model: str, precision: str, batch_size: int):
        """Raises RewardError when the model cannot be loaded or has no token for yes or no."""
        self.form = YesNoOdds()
        self.model, self.batch_size = model, batch_size
        self.pictures = 0
        self._shared, self._key = context.shared, ("image-text-to-text", model, precision)
        self._vlm: VisionLanguageModel = context.shared.get(self._key, lambda: load(context, model, precision))
        try:
            self._words = [_ids_of(self._vlm.processor.tokenizer, word, model) for word in ("yes", "no")]
        except BaseException:
            context.shared.release(self._key)
            raise

    def read(
        self, pictures: Sequence[Image], asked: Sequence[tuple[int, Question]], *, remember: bool
    ) -> list[Reading]:
        """A reading for each (number of a picture, question), in batches of pictures of one size."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for at, (k, _) in enumerate(asked):
            by_size.setdefault(pictures[k].size, []).append(at)
        found: dict[int, Reading] = {}
        for own in by_size.values():
            for start in range(0, len(own), self.batch_size):
                part = own[start : start + self.batch_size]
                rows = [(pictures[asked[at][0]], asked[at][1]) for at in part]
                found.update(zip(part, self._batch(rows), strict=True))
        self.pictures += len(asked)
        return [found[at] for at in range(len(asked))]

    def figures(self) -> dict[str, float]:
        return {"questions": self.pictures}

    def close(self) -> None:
        self._shared.release(self._key)

    def _batch(self, rows: Sequence[tuple[Image, Question]]) -> list[Reading]:
        import torch

        processor, model = self._vlm.processor, self._vlm.model
        texts = [self._text(question) for _, question in rows]
        begin = getattr(processor.tokenizer, "bos_token", None)
        inputs = processor(
            text=texts,
            images=[[image] for image, _ in rows],
            padding=True,
            padding_side="left",  # the next token of every row is then that of the last column
            add_special_tokens=not (begin and texts[0].startswith(begin)),  # most templates begin with it
            return_tensors="pt",
        ).to(self._vlm.device, dtype=model.dtype)
        last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        with torch.inference_mode():
            logits_BV = model(**inputs, **last).logits[:, -1].float()
            logp_BV = logits_BV.log_softmax(dim=-1)
            yes_B, no_B = (_summed(logp_BV, ids) for ids in self._words)
            value_B, mass_B = torch.sigmoid(yes_B - no_B), torch.logaddexp(yes_B, no_B).exp()
        return [_reading(value, mass) for value, mass in zip(value_B.tolist(), mass_B.tolist(), strict=True)]

    def _text(self, question: Question) -> str:
        """The conversation up to the answer. Special tokens in the judged text are broken up."""
        safe = Question(self._inert(question.text), question.stem, question.asked)
        content = [{"type": "image"}, {"type": "text", "text": fenced(safe, self.form.tail)}]
        return self._vlm.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def _inert(self, text: str) -> str:
        tokenizer = self._vlm.processor.tokenizer
        for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
            if len(token) > 1 and not token.isspace():
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _reading(value: float, mass: float) -> Reading:
    if value != value:
        return Reading(value, why="the model's logits are NaN")
    if mass < LEAST_MASS:
        return no_opinion(f"yes and no have a probability of {mass:.2g} together")
    return Reading(value, {"mass": mass})


def load(context: RewardContext, name: str, precision: str) -> VisionLanguageModel:
    """The model of a hub id or directory, from safetensors; code in its repository is not run."""
    from transformers import AutoModelForImageTextToText

    choice = precision if precision != "auto" else "fp32" if context.device == "cpu" else "bf16"
    processor = load_processing(context, "vlm", name)
    if not getattr(processor, "chat_template", None) or not hasattr(processor, "tokenizer"):
        raise RewardError(f"reward 'vlm': {name!r} has no chat template; choose an instruction-tuned model")
    model = load_transformer(context, "vlm", AutoModelForImageTextToText, name, dtype_of(choice))
    return VisionLanguageModel(model, processor, context.device)


def _ids_of(tokenizer: Any, word: str, model: str) -> list[int]:
    """All tokens that spell a word, in any case, with or without a space before it."""
    ids = sorted({number for token, number in tokenizer.get_vocab().items() if word_of(token) == word})
    if not ids:
        raise RewardError(f"reward 'vlm': the tokenizer of {model!r} has no token for {word!r}; choose another model")
    return ids


def _summed(logp_BV: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logp_BV[:, ids].logsumexp(dim=-1)
