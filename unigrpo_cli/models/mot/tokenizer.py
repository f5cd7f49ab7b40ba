"""Special tokens of models in BAGEL's form, and their tokenizer from its files."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.hub import first_line

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
BOUNDARY = ("<|vision_start|>", "<|vision_end|>")
UNKNOWN = "<unk>"


def token_id(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_to_id(name)
    if found is None:
        raise WeightsError(f"the tokenizer lacks {name}; models in BAGEL's format need it")
    return found


def boundary_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens before and after an image."""
    return token_id(tokenizer, BOUNDARY[0]), token_id(tokenizer, BOUNDARY[1])


def load_tokenizer(directory: Path) -> Tokenizer:
    """`tokenizer.json`, or else the tokenizer that `vocab.json` and `merges.txt` make in Qwen2's form."""
    path = directory / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(str(directory), local_files_only=True).backend_tokenizer
    except Exception as error:  # tokenizers raises bare Exception
        where = path if path.is_file() else directory
        raise WeightsError(f"{where}: unreadable tokenizer ({first_line(error)})") from error
