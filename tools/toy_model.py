"""Pre-train the embedded model: `python -m tools.toy_model --out DIR`, an hour on one core.

A supervised warm-up on the shapes world: next-token loss on plans, flow matching on pictures, one network, in three
phases. First it learns to plan and paint well. While the learning rate falls it sees some mistakes: plans that do not
answer the prompt, and pictures that leave out things of the plan. Last it sees many, so that it is imperfect in modes
that it can sample around, which GRPO then sharpens. Leaving things out is one habit, whatever the plan, and the
gradient of a hundred episodes shows it; recoloured or misplaced things are many habits (docs/log.md).

`curve.jsonl` beside the weights is the training curve. `--start DIR` begins with the last phase.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.codec import PixelCodec
from unigrpo_cli.models.mot.config import MoTConfig
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.mot.tokenizer import BOUNDARY, CLOSE, OPEN, UNKNOWN, boundary_ids
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.toy.prompts import (
    OPENINGS,
    TAGS,
    corrupt_plan,
    draw_metadata,
    draw_scene,
    held_out,
)
from unigrpo_cli.toy.render import SIZE, render
from unigrpo_cli.toy.world import (
    CELLS,
    COLORS,
    MAX_THINGS,
    NUMBERS,
    PLURALS,
    SHAPES,
    THINK_CLOSE,
    THINK_OPEN,
    plan_text,
)

PATCH = 8
DECAY = 0.4  # the last share of the steps of a chapter: the learning rate falls
WITHOUT_THINKING = 0.12
COPIES = 2  # noisy copies of a picture in one pass
CE_WEIGHT = 0.2
WIDTH = 128


def build_tokenizer() -> Tokenizer:
    """One token per word of the world, lower-cased, special tokens named as BAGEL's."""
    special = ["<|endoftext|>", OPEN, CLOSE, *BOUNDARY, UNKNOWN]
    words = [THINK_OPEN, THINK_CLOSE, ",", *" ".join(OPENINGS).split(), "an", "and", "left", "right"]
    words += ["above", "below", *(NUMBERS[n] for n in range(2, MAX_THINGS + 1))]
    words += [*COLORS, *SHAPES, *PLURALS.values(), *CELLS]
    vocabulary = {word: k for k, word in enumerate(dict.fromkeys([*special, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def build_model(seed: int, width: int = WIDTH, layers: int = 4) -> MoTPolicy:
    """The embedded model before training."""
    tokenizer = build_tokenizer()
    config = MoTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=(width * 8 // 3 + 7) // 8 * 8,
        vocab_size=tokenizer.get_vocab_size(),
        latent_patch_size=PATCH,
        latent_channels=3,
        pixels_per_latent=1,
        max_latent_size=SIZE // PATCH,
        prediction="clean",
    )
    torch.manual_seed(seed)
    network = MoT(config, boundary_ids(tokenizer))
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "o_proj_moe_gen.weight", "down_proj.weight")):
                parameter.data /= math.sqrt(2 * layers)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return MoTPolicy(network, tokenizer, PixelCodec())


@dataclass(frozen=True)
class Mistakes:
    """From row `start` on: the share of plans that do not answer the prompt, and of things left out of pictures."""

    start: int
    wrong_plans: float
    left_out: float


class Examples(IterableDataset):
    """Endless (ids, first plan token or length, picture) of the training split."""

    def __init__(self, tokenizer: Tokenizer, seed: int, mistakes: Mistakes):
        self.words = tokenizer.get_vocab()
        self.seed, self.mistakes = seed, mistakes

    def __iter__(self) -> Iterator[tuple[Tensor, int, Tensor]]:
        rng, mistakes = np.random.default_rng(self.seed), self.mistakes
        open_id, stop_id, unknown = (self.words[w] for w in (OPEN, CLOSE, UNKNOWN))
        for row in count():
            metadata = draw_metadata(TAGS[rng.integers(len(TAGS))], rng)
            while held_out(metadata):
                metadata = draw_metadata(TAGS[rng.integers(len(TAGS))], rng)
            plan = draw_scene(metadata, rng)
            thinks = rng.random() >= WITHOUT_THINKING
            flawed = row >= mistakes.start
            if flawed and thinks and rng.random() < mistakes.wrong_plans:
                plan = corrupt_plan(plan, metadata, rng)
            shown = tuple(thing for thing in plan if not flawed or rng.random() >= mistakes.left_out)
            prompt = [unknown if rng.random() < 0.01 else self.words[w] for w in metadata["prompt"].split()]
            ids = [open_id, *prompt, stop_id]
            start = len(ids)
            if thinks:
                ids += [open_id, *(self.words[w] for w in plan_text(plan).split()), stop_id]
            yield torch.tensor(ids), start, torch.from_numpy(render(shown, rng))


def collate(rows: list[tuple[Tensor, int, Tensor]]) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """ids_BL right-padded, lengths, mask of predicted tokens [B, L-1], pictures."""
    ids = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    lengths = [len(row[0]) for row in rows]
    at = torch.arange(1, ids.shape[1])
    starts = torch.tensor([row[1] for row in rows])[:, None]
    mask = (at > starts) & (at < torch.tensor(lengths)[:, None])
    return ids, lengths, mask, torch.stack([row[2] for row in rows])


def losses(model: MoTPolicy, batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cross-entropy per plan token (mean), velocity error per element (mean)."""
    ids, lengths, mask, pixels = batch
    x_0 = model.encode_pixels(pixels)[:, None].expand(-1, COPIES, -1, -1)
    # Logit-normal around sigmoid(1) = 0.73: the layout is decided at high noise, and without this shift the
    # plan's cells are learnt last. Shifted further, to 0.88, it learnt more slowly (docs/log.md).
    t_BK = torch.sigmoid(1 + torch.randn(len(ids), COPIES, generator=generator)).clamp(0.02, 1)
    noise = torch.randn(x_0.shape, generator=generator)
    t = t_BK[..., None, None]
    image = NoisyImage((1 - t) * x_0 + t * noise, t_BK, model.grid(*pixels.shape[1:3]))
    out = model.forward(model.empty_context(len(ids)), ids, lengths, image)
    assert out.hidden_BLC is not None and out.velocity_BKND is not None
    ce = F.cross_entropy(model.logits(out.hidden_BLC[:, :-1][mask]), ids[:, 1:][mask])
    return ce, F.mse_loss(out.velocity_BKND, noise - x_0)


def optimizers(network: MoT, lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the layers' matrices, AdamW on everything else (docs/log.md)."""
    muon: list[Tensor] = []
    adam: list[Tensor] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (muon if parameter.ndim == 2 and ".layers." in name else adam).append(parameter)
    return [
        torch.optim.Muon(muon, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Warm-up, constant, then linear to zero."""
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (DECAY * steps)))


def chapter(
    model: MoTPolicy, args: argparse.Namespace, seed: int, steps: int, lr: float, mistakes: Mistakes
) -> MoTPolicy:
    """Train for some steps; gives the running mean of the weights, which is also saved as it goes."""
    network, average = model.network, copy.deepcopy(model.network)
    examples = Examples(model.tokenizer, seed, mistakes)
    data = DataLoader(examples, args.batch, collate_fn=collate, num_workers=1, prefetch_factor=4)
    generator = torch.Generator().manual_seed(seed)
    optims = optimizers(network, lr)
    rates = [o.param_groups[0]["lr"] for o in optims]
    held = MoTPolicy(average, model.tokenizer, model.codec)
    began, since = time.process_time(), []
    for step, batch in zip(range(steps), data, strict=False):
        ce, mse = losses(model, batch, generator)
        (CE_WEIGHT * ce + mse).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optim, rate in zip(optims, rates, strict=True):
            optim.param_groups[0]["lr"] = rate * schedule(step, steps)
            optim.step()
            optim.zero_grad()
        with torch.no_grad():
            decay = min(args.ema, (step + 1) / (step + 10))
            for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        since.append((ce.item(), mse.item()))
        if (step + 1) % args.report_every == 0 or step + 1 == steps:
            row = dict(zip(("ce", "velocity_mse"), np.mean(since, axis=0).round(4).tolist(), strict=True))
            minutes = round((time.process_time() - began) / 60, 2)
            row = {"mistakes": vars(mistakes), "step": step + 1, "core_minutes": minutes} | row
            since = []
            held.save(args.out, "")
            with (args.out / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", help="a model directory to begin the last chapter with")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--last-steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--last-lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start:
        model = load_model(args.start)
        model.network.requires_grad_(True)
        model.network.latent_pos_embed.pos_embed.requires_grad_(False)
    else:
        model = build_model(args.seed, args.width, args.layers)
        clean = int((1 - DECAY) * args.steps) * args.batch
        model = chapter(model, args, args.seed, args.steps, args.lr, Mistakes(clean, 0.32, 0.12))
    chapter(model, args, args.seed + 1, args.last_steps, args.last_lr, Mistakes(0, 0.5, 0.2))


if __name__ == "__main__":
    main()
