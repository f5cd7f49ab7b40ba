"""A model family as a plugin brings it: a bigram writes words, and a linear map pulls noise to a colour."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unigrpo_cli import hookimpl
from unigrpo_cli.episode import GivenText
from unigrpo_cli.models.family import Audit
from unigrpo_cli.models.policy import NoisyImage, PolicyOutput

WORDS = ("<open>", "<stop>", "red", "blue", "square")


@dataclass(frozen=True)
class Latest:
    """All that this model remembers: the latest word of each row."""

    id_B: Tensor

    @property
    def rows(self) -> int:
        return len(self.id_B)

    def reserve(self, slots: int) -> Latest:
        return self

    def select(self, index_B: Tensor) -> Latest:
        return Latest(self.id_B[index_B])

    def put(self, index_B: Tensor, rows: Latest) -> Latest:
        return Latest(self.id_B.index_copy(0, index_B, rows.id_B))


@dataclass(frozen=True)
class BigramPolicy:
    embedding: nn.Embedding
    open_id, stop_id, token_dim = 0, 1, 3
    device = torch.device("cpu")
    adapter = None

    def preamble(self, prompt, think):
        ids = [WORDS.index(word) if word in WORDS else 2 for word in prompt.text.split()]
        return (GivenText("prompt", prompt.text, torch.tensor(ids)),)

    def require_vision(self) -> None: ...

    def decode_text(self, ids: Tensor) -> str:
        return " ".join(WORDS[k] for k in ids.tolist() if k > 1)

    def has_token(self, text: str) -> bool:
        return text in WORDS

    def unknown_words(self, text: str) -> list[str]:
        return [word for word in text.split() if word not in WORDS]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def shift(self, grid: tuple[int, int], steps: int) -> float:
        return 1.0

    def empty_context(self, rows: int) -> Latest:
        return Latest(torch.zeros(rows, dtype=torch.long))

    def forward(self, context, ids_BL=None, length_B=None, image: NoisyImage | None = None, *, detach_context=False):
        hidden = velocity = None
        if ids_BL is not None:
            hidden = self.embedding(ids_BL)
            length = ids_BL.shape[1] if length_B is None else torch.as_tensor(length_B)
            at = (torch.zeros_like(context.id_B) + length - 1).clamp_min(0)
            context = replace(context, id_B=ids_BL.gather(1, at[:, None])[:, 0])
        if image is not None:
            colour = self.embedding(context.id_B)[:, None, None, :3].tanh()
            velocity = (image.x_BKND - colour) / image.t_BK[..., None, None].clamp_min(0.01)
        return PolicyOutput(context, hidden, velocity)

    def copies_at_once(self, image: NoisyImage) -> int:
        return image.x_BKND.shape[1]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden[..., : len(WORDS)].float()

    def decode_pixels(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        pixels = ((x_BND.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).unflatten(1, grid)
        return pixels.repeat_interleave(8, 1).repeat_interleave(8, 2)

    def reference(self):
        return nullcontext(self)


class BigramFamily:
    name = "bigram"
    hub_files = ("bigram.txt",)

    def reject(self, directory: Path) -> str | None:
        return None if (directory / "bigram.txt").is_file() else "no bigram.txt"

    def load(self, directory: Path, weights_file, *, device, dtype, vae_tile_rows) -> BigramPolicy:
        torch.manual_seed(int((directory / "bigram.txt").read_text()))
        return BigramPolicy(nn.Embedding(len(WORDS), 8).requires_grad_(False))

    def audit(self, directory: Path, weights_file) -> Audit:
        return Audit({"words": len(WORDS)}, [f"a bigram of {len(WORDS)} words"], [])

    def digest(self, directory: Path, weights_file) -> str:
        return (directory / "bigram.txt").read_text()

    def sizes(self, directory: Path, weights_file) -> None: ...

    def published(self, model: str) -> None: ...

    def defaults(self, sizes) -> dict:
        return {"preset": "embedded", "sampling": {"height": 32, "width": 32, "max_new_tokens": 4}}


@hookimpl
def unigrpo_register_models(registry) -> None:
    registry.add(BigramFamily())
