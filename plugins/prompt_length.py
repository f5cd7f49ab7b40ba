"""Prompts longer than a text encoder's context: their end is cut off before the encoder reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class PromptLength:
    """Counts tokens of prompts and warns once when some do not fit.

    Args:
        reward: its name, for the warning.
        context: tokens that the encoder reads, start and end included.
        count: tokens of a text, start and end included; None when they cannot be counted.
        texts: their name, for the warning.
    """

    def __init__(self, reward: str, context: int, count: Callable[[str], int] | None, texts: str = "prompts"):
        self.reward, self.context, self._count, self.texts = reward, context, count, texts
        self._tokens: dict[str, int] = {}
        self._warned = False

    def check(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Warn about the prompts of a run before sampling."""
        self.info([str(row.get("prompt", "")) for row in metadata])

    def info(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """For each text a row with its tokens and the context when it is cut, else an empty one."""
        if self._count is None:
            return [{} for _ in texts]
        for text in texts:
            if text not in self._tokens:
                self._tokens[text] = self._count(text)
        long = [text for text in dict.fromkeys(texts) if self._tokens[text] > self.context]
        if long and not self._warned:
            self._warned = True
            most = max(self._tokens[text] for text in long)
            warnings.warn(
                f"reward {self.reward!r}: {len(long)} of {len(set(texts))} {self.texts} are longer than the text "
                f"encoder's context of {self.context} tokens (up to {most}); their end is cut off. Shorten them, or "
                "choose a model with a longer context",
                stacklevel=2,
            )
        return [
            {"prompt_cut": {"tokens": self._tokens[text], "context": self.context}} if text in long else {}
            for text in texts
        ]
