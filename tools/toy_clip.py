"""Train the embedded CLIP: `python -m tools.toy_clip --out DIR`.

A real open_clip model (a small CNN and a small text transformer) in open_clip's own `local-dir` layout, so that
the `clip` reward loads it by the same call as any other. Contrastive loss over captions, plus pairs that differ
in one thing (a near-miss caption of the picture, a near-miss picture of the caption): without these it is a bag
of words. Some pictures are blurred or noisy: a policy's pictures are not clean renders.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from tools.toy_model import build_tokenizer
from unigrpo_cli.toy.prompts import (
    TAGS,
    corrupt_plan,
    draw_metadata,
    draw_scene,
    held_out,
    phrase,
)
from unigrpo_cli.toy.render import render
from unigrpo_cli.toy.world import COLORS, INVERSE, SHAPES, satisfies

SIDE, CONTEXT = 64, 20
START, END = "<|startoftext|>", "<|endofcaption|>"
MEAN = STD = (0.5, 0.5, 0.5)


def model_config(vocabulary: int) -> dict:
    """open_clip's configuration: `layers` as a list of four selects the residual CNN."""
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": 64,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "embedded",
        },
    }


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The world's words between start and end. The end token has the largest id: CLIP pools where that is."""
    words = build_tokenizer()
    words.add_special_tokens([START, END])
    start, end = words.token_to_id(START), words.token_to_id(END)
    words.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    assert end == words.get_vocab_size() - 1
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=START,
        eos_token=END,
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )


def near_miss(metadata: dict, rng: np.random.Generator) -> dict:
    """A request that differs from `metadata` in one thing: a class, colour, count or relation."""
    other = copy.deepcopy(metadata)
    items = other["include"]
    item = items[rng.integers(len(items))]
    kinds = ["class", "count"]
    kinds += ["color"] if "color" in item else []
    kinds += ["swap"] if len(items) == 2 and {i.get("color") for i in items} - {None} else []
    kinds += ["relation", "relation"] if "position" in items[-1] else []
    match kinds[rng.integers(len(kinds))]:
        case "class":
            free = [s for s in SHAPES if s not in {i["class"] for i in items}]
            item["class"] = free[rng.integers(len(free))]
        case "count":
            item["count"] = [c for c in (1, 2, 3, 4) if c != item["count"]][rng.integers(3)]
        case "color":
            item["color"] = [c for c in COLORS if c != item["color"]][rng.integers(len(COLORS) - 1)]
        case "swap":
            a, b = items[0].pop("color", None), items[1].pop("color", None)
            items[0].update({"color": b} if b else {})
            items[1].update({"color": a} if a else {})
        case "relation":
            position = items[-1]["position"]
            rotated = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
            position[0] = INVERSE[position[0]] if rng.random() < 0.7 else rotated[position[0]]
    opening = metadata["prompt"][: len(metadata["prompt"]) - len(phrase(metadata))]
    other["prompt"] = opening + phrase(other)
    return other


def spoil(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture as a policy might paint it: sometimes noisy, sometimes soft."""
    x = pixels.astype(np.float64)
    if rng.random() < 0.35:
        x += rng.normal(0, rng.uniform(2, 16), x.shape)
    if rng.random() < 0.25:
        p = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
        x = (p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] + 2 * x) / 6
    return np.clip(x, 0, 255).astype(np.uint8)


class Pairs(IterableDataset):
    """Endless (true picture, near-miss picture, caption, near-miss caption) of the training split."""

    def __init__(self, seed: int, held: bool = False, tag: str | None = None):
        self.seed, self.held, self.tag = seed, held, tag

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, str, str]]:
        rng = np.random.default_rng([self.seed, 1])
        while True:
            metadata = draw_metadata(self.tag or TAGS[rng.integers(len(TAGS))], rng)
            if held_out(metadata) != self.held:
                continue
            scene = draw_scene(metadata, rng)
            other = near_miss(metadata, rng)
            if satisfies(scene, other):
                continue
            wrong = corrupt_plan(scene, metadata, rng)
            yield (
                torch.from_numpy(spoil(render(scene, rng), rng)),
                torch.from_numpy(spoil(render(wrong, rng), rng)),
                metadata["prompt"],
                other["prompt"],
            )


def collate(rows: list[tuple[Tensor, Tensor, str, str]]) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Pictures as the CLIP sees them, [B, 3, 64, 64], and captions."""
    true = _prepare(torch.stack([row[0] for row in rows]))
    wrong = _prepare(torch.stack([row[1] for row in rows]))
    return true, wrong, [row[2] for row in rows], [row[3] for row in rows]


def _prepare(pixels_BHWC: Tensor) -> Tensor:
    x = pixels_BHWC.permute(0, 3, 1, 2).float() / 255
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (x - MEAN[0]) / STD[0]


def loss_of(model, tokenizer, batch) -> Tensor:
    """Contrastive loss (captions that are equal are one class) plus softplus of the near-miss margins."""
    true, wrong, captions, others = batch
    unique = sorted(set(captions))
    target = torch.tensor([unique.index(c) for c in captions])
    ids = tokenizer([*unique, *others])
    text = model.encode_text(ids, normalize=True)
    captions_U, others_B = text[: len(unique)], text[len(unique) :]
    seen = model.encode_image(torch.cat([true, wrong]), normalize=True)
    true_B, wrong_B = seen[: len(true)], seen[len(true) :]
    scale = model.logit_scale.exp().clamp(max=50)
    logits_BU = scale * true_B @ captions_U.T
    image_to_text = F.cross_entropy(logits_BU, target)
    positive = F.one_hot(target, len(unique)).T.float()
    positive = positive / positive.sum(dim=1, keepdim=True)
    text_to_image = F.cross_entropy(logits_BU.T, positive)
    own = (true_B * captions_U[target]).sum(dim=1)
    margins = torch.stack([own - (true_B * others_B).sum(dim=1), own - (wrong_B * captions_U[target]).sum(dim=1)])
    return image_to_text + text_to_image + 2 * F.softplus(-scale * margins).mean()


@torch.no_grad()
def report(model, tokenizer, count: int = 200) -> dict[str, float]:
    """Held-out: how often the true caption beats its near miss (and the true picture its own), by task."""
    found = {}
    for tag in TAGS:
        rows = [row for row, _ in zip(Pairs(99, held=True, tag=tag), range(count), strict=False)]
        true, wrong, captions, others = collate(rows)
        seen, bad = model.encode_image(true, normalize=True), model.encode_image(wrong, normalize=True)
        text, miss = (model.encode_text(tokenizer(t), normalize=True) for t in (captions, others))
        own = (seen * text).sum(dim=1)
        by_text = (own > (seen * miss).sum(dim=1)).float().mean()
        by_image = (own > (bad * text).sum(dim=1)).float().mean()
        found[tag] = round(float(by_text + by_image) / 2, 3)
    return found


def save_clip(model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """open_clip's local directory: configuration, tokenizer, weights in fp16."""
    out.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    content = {"model_cfg": model_config(len(tokenizer)), "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    save_file(state, out / "open_clip_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    fast = clip_tokenizer()

    def tokenize(texts: list[str]) -> Tensor:
        rows = fast(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
        return rows.input_ids

    sizes = model_config(len(fast))
    sizes["text_cfg"].pop("hf_tokenizer_name")
    model = open_clip.model.CLIP(**sizes)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(fast)} words", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    data = DataLoader(Pairs(args.seed), args.batch, collate_fn=collate, num_workers=1, prefetch_factor=4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    began, since = time.process_time(), []
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "curve.jsonl").open("w") as curve:
        for step, batch in zip(range(1, args.steps + 1), data, strict=False):
            loss = loss_of(model, tokenize, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            since.append(loss.item())
            if step % 250 == 0 or step == args.steps:
                model.eval()
                minutes = round((time.process_time() - began) / 60, 2)
                row = {"step": step, "core_minutes": minutes, "loss": round(float(np.mean(since)), 4)}
                row |= report(model, tokenize)
                model.train()
                since = []
                save_clip(model, fast, args.out)
                curve.write(json.dumps(row) + "\n")
                curve.flush()
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
