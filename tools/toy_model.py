"""Pre-train the embedded model: `python -m tools.toy_model --out DIR`, two and a half hours on one core.

A supervised warm-up on the shapes world: next-token loss on texts, flow matching on pictures, one network. First it
learns to plan and paint; then, with words appended, to look at pictures, its own and given ones, to say what is wrong
with them, and to paint again. Drills teach what such rows did not: which thing of a source an instruction means (texts
alone), and to follow an edit plan cell by cell (pictures from noise alone). Until then all that it is taught is true,
but for a chapter of mistakes that the last one repeats: plans that do not answer the prompt, pictures that leave things
out, verdicts that overlook. So it is imperfect in modes that it can sample around, which GRPO then sharpens. Leaving
things out is one habit, whatever the plan, and the gradient of a hundred episodes shows it; recoloured or misplaced
things are many habits (docs/log.md).

`curve.jsonl` beside the weights is the training curve. `--start DIR` continues from a model that can paint.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader

from tools.toy_rows import Mistakes, Mix, RowBatch, Rows
from unigrpo_cli.algo import flow
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.codec import PixelCodec
from unigrpo_cli.models.mot.config import MoTConfig
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.mot.tokenizer import BOUNDARY, CLOSE, OPEN, UNKNOWN, boundary_ids
from unigrpo_cli.models.policy import Context, NoisyImage
from unigrpo_cli.toy.prompts import OPENINGS
from unigrpo_cli.toy.reflect import CORRECT, EXTRA, KEEP, MISSING, WRONG
from unigrpo_cli.toy.render import SIZE
from unigrpo_cli.toy.restores import FAULTS
from unigrpo_cli.toy.world import (
    CELLS,
    COLORS,
    MAX_THINGS,
    NUMBERS,
    PLURALS,
    SHAPES,
    THINK_CLOSE,
    THINK_OPEN,
)

PATCH = 8
COPIES = 2  # noisy copies of a picture in one pass, of rows with one round
KINDS = {"first": (0.2, 0.4), "again": (0.6, 0.3), "edit": (0.6, 0.3), "drill": (0.6, 0.0), "stroke": (0.0, 0.5)}
"""Rounds, and the weights of their cross-entropies and velocity errors. Verdicts are learnt last (docs/log.md)."""
SHOWN_NOISE = 0.03  # largest deviation of the latents that a context shows
WIDTH = 128


LATER_WORDS = (KEEP, WRONG, EXTRA, MISSING, CORRECT, *FAULTS, "add", "the", "remove", "make", "turn", "into", "move")
"""Words of reflections, edits and critiques, which the first chapter has no rows of."""


def build_tokenizer(later: tuple[str, ...] = ()) -> Tokenizer:
    """One token per word of prompts and plans, then the later ones; lower-cased, special tokens named as BAGEL's."""
    special = ["<|endoftext|>", OPEN, CLOSE, *BOUNDARY, UNKNOWN]
    words = [THINK_OPEN, THINK_CLOSE, ",", *" ".join(OPENINGS).split(), "an", "and", "left", "right"]
    words += ["above", "below", *(NUMBERS[n] for n in range(2, MAX_THINGS + 1))]
    words += [*COLORS, *SHAPES, *PLURALS.values(), *CELLS]
    words += later
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


def extended(model: MoTPolicy) -> MoTPolicy:
    """A model that knows the later words too: their rows start at the mean of the others."""
    tokenizer = build_tokenizer(LATER_WORDS)
    words = tokenizer.get_vocab_size()
    known = model.tokenizer.get_vocab()
    if any(tokenizer.token_to_id(word) != k for word, k in known.items()):
        raise SystemExit("--start: its words are not the first words of this vocabulary")
    state = dict(model.network.state_dict())
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        mean = state[name].mean(dim=0, keepdim=True)
        noise = torch.randn(words - len(known), state[name].shape[1], generator=torch.Generator().manual_seed(0))
        state[name] = torch.cat([state[name], mean + 0.02 * noise])
    network = MoT(replace(model.network.config, vocab_size=words), boundary_ids(tokenizer))
    network.load_state_dict(state)
    return MoTPolicy(network, tokenizer, model.codec)


@dataclass
class Losses:
    """Sums and counts of one kind of round: cross-entropy per predicted token, velocity error per element."""

    ce: Tensor | float = 0.0
    tokens: int = 0
    error: Tensor | float = 0.0
    elements: int = 0


def losses(model: MoTPolicy, step: list[RowBatch], generator: torch.Generator) -> dict[str, Losses]:
    """Losses of one step by the kind of the round: first rounds, later ones, those after a source picture."""
    found = {kind: Losses() for kind in KINDS}
    for rows in step:
        count = len(rows.rounds[0].lengths)
        context = model.empty_context(count)
        if rows.source is not None:
            context = shown(model, context, rows.source, generator)
        for k, one in enumerate(rows.rounds):
            if one.picture is None:
                sums, image = found["drill"], None
            else:
                kind = "again" if k else "first" if rows.source is None else "edit"
                sums = found[kind if one.stroke is None else "stroke"]
                x_0 = model.encode_pixels(one.picture)[:, None]
                if len(rows.rounds) == 1 and one.stroke is None:
                    x_0 = x_0.expand(-1, COPIES, -1, -1)
                # Logit-normal around sigmoid(1) = 0.73: the layout is decided at high noise, and without this shift the
                # plan's cells are learnt last. Shifted further, to 0.88, it learnt more slowly (docs/log.md).
                t_BK = torch.sigmoid(1 + torch.randn(x_0.shape[:2], generator=generator)).clamp(0.02, 1)
                if one.stroke is not None:
                    t_BK = torch.ones_like(t_BK)
                noise = torch.randn(x_0.shape, generator=generator)
                noised = flow.noised(x_0, noise, t_BK[..., None, None])
                image = NoisyImage(noised, t_BK, model.grid(*one.picture.shape[1:3]))
            out = model.forward(context, one.ids, one.lengths, image)
            assert out.hidden_BLC is not None
            if one.mask.any():
                logits = model.logits(out.hidden_BLC[:, :-1][one.mask])
                sums.ce = sums.ce + F.cross_entropy(logits, one.ids[:, 1:][one.mask], reduction="sum")
                sums.tokens += int(one.mask.sum())
            if out.velocity_BKND is not None:
                error = (out.velocity_BKND - flow.path_velocity(x_0, noise)).square()
                if one.stroke is not None:
                    error = error[one.stroke[:, None].expand(error.shape[:3])]
                sums.error, sums.elements = sums.error + error.sum(), sums.elements + error.numel()
            if one.kept is not None:
                context = shown(model, out.context, one.kept, generator)
    return found


def shown(model: MoTPolicy, context: Context, pixels: Tensor, generator: torch.Generator) -> Context:
    """The context after finished pictures, whose latents are a little noisy, as painted ones are."""
    latent = model.encode_pixels(pixels)
    level = SHOWN_NOISE * torch.rand(len(latent), 1, 1, generator=generator)
    latent = latent + level * torch.randn(latent.shape, generator=generator)
    return model.encode_image(context, latent, model.grid(*pixels.shape[1:3]))


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


def schedule(step: int, chapter: Chapter) -> float:
    """Warm-up, constant, then linear to zero."""
    return min(1.0, (step + 1) / 100, max(0.0, (chapter.steps - step) / (chapter.decay * chapter.steps)))


@dataclass(frozen=True)
class Chapter:
    """Training with one mix of rows and mistakes.

    Args:
        decay: the last share of the steps, in which the learning rate falls to zero.
    """

    name: str
    steps: int
    lr: float
    mix: Mix
    mistakes: Mistakes
    ema: float = 0.998
    decay: float = 0.4


def train(model: MoTPolicy, chapter: Chapter, seed: int, out: Path, report_every: int) -> MoTPolicy:
    """One chapter; gives the running mean of the weights, which is also saved as it goes."""
    network, average = model.network, copy.deepcopy(model.network)
    rows = Rows(model.tokenizer, seed, chapter.mix, chapter.mistakes)
    data = DataLoader(rows, None, num_workers=1, prefetch_factor=8)
    generator = torch.Generator().manual_seed(seed)
    optims = optimizers(network, chapter.lr)
    rates = [o.param_groups[0]["lr"] for o in optims]
    held = MoTPolicy(average, model.tokenizer, model.codec)
    began, since = time.process_time(), []
    for step, batch in zip(range(chapter.steps), data, strict=False):
        figures, loss = {}, torch.zeros(())
        for kind, sums in losses(model, batch, generator).items():
            if sums.tokens or sums.elements:
                ce, error = sums.ce / max(1, sums.tokens), sums.error / max(1, sums.elements)
                loss = loss + KINDS[kind][0] * ce + KINDS[kind][1] * error
                found = {"ce": (ce, sums.tokens), "velocity_mse": (error, sums.elements)}
                figures |= {f"{kind}_{what}": float(value.detach()) for what, (value, n) in found.items() if n}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optim, rate in zip(optims, rates, strict=True):
            optim.param_groups[0]["lr"] = rate * schedule(step, chapter)
            optim.step()
            optim.zero_grad()
        with torch.no_grad():
            decay = min(chapter.ema, (step + 1) / (step + 10))
            for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        since.append(figures)
        if (step + 1) % report_every == 0 or step + 1 == chapter.steps:
            minutes = round((time.process_time() - began) / 60, 2)
            row = {"chapter": chapter.name, "step": step + 1, "core_minutes": minutes}
            row |= {name: round(float(np.mean([f[name] for f in since])), 4) for name in figures}
            since = []
            held.save(out, "")
            with (out / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return held


ROUNDS = Mix(one=12, two=16, edits=11, restores=5)
READING = Mix(one=8, two=24, edits=12, restores=6)
PAINT = Chapter("paint", 5000, 4e-3, Mix(one=64), Mistakes())
LEARN = Chapter("rounds", 1400, 2e-3, ROUNDS, Mistakes(), decay=0.5)
READ = Chapter("verdicts", 750, 2e-3, READING, Mistakes(), decay=0.6)
SLIP = Chapter(
    "mistakes",
    450,
    1e-3,
    READING,
    Mistakes(
        wrong_plans=0.4,
        left_out=0.15,
        overlooked=0.25,
        spoilt=0.1,
        false_alarm=0.05,
        ignored=0.1,
        lost=0.04,
        wrong_edits=0.15,
        misdiagnosed=0.2,
        unrestored=0.15,
    ),
    ema=0.995,
)


BALANCE = Chapter(
    "balance",
    280,
    1e-3,
    Mix(one=12, two=14, edits=20, restores=4),
    replace(SLIP.mistakes, wrong_plans=0.5, left_out=0.2, ignored=0.04, lost=0.02, wrong_edits=0.0),
    ema=0.99,
    decay=0.6,
)

DRILL = Chapter("drills", 260, 3e-3, Mix(drills=128), Mistakes(), decay=0.2)
STROKE = Chapter("strokes", 300, 3e-3, Mix(strokes=64, drills=32), Mistakes(), decay=0.2)
EDIT = Chapter(
    "edits", 420, 2e-3, Mix(one=8, two=12, edits=22, restores=8, drills=16, strokes=32), Mistakes(), decay=0.7
)
POLISH = Chapter(
    "polish", 420, 2e-3, Mix(one=24, two=10, edits=16, restores=8, drills=8, strokes=8), Mistakes(), decay=0.8
)
HABITS = Chapter(
    "habits",
    690,
    1.2e-3,
    Mix(one=14, two=18, edits=18, restores=8, strokes=4),
    replace(
        SLIP.mistakes,
        wrong_plans=0.5,
        left_out=0.2,
        wrong_edits=0.2,
        ignored=0.05,
        lost=0.06,
        misdiagnosed=0.25,
        unrestored=0.25,
    ),
    ema=0.99,
    decay=0.6,
)
CHAPTERS = (PAINT, LEARN, READ, SLIP, BALANCE, DRILL, STROKE, EDIT, POLISH, HABITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", help="a model directory to continue from: it can paint already")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[chapter.name for chapter in CHAPTERS],
        metavar="CHAPTER",
    )
    parser.add_argument("--steps", type=int, help="of every chapter, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start:
        model = load_model(args.start)
    else:
        model = build_model(args.seed, args.width, args.layers)
    for k, chapter in enumerate(CHAPTERS):
        if chapter is LEARN and "rounds" in args.only:
            model = extended(model)
        if chapter.name in args.only and not (chapter is PAINT and args.start):
            steps = args.steps or chapter.steps
            model = train(model, replace(chapter, steps=steps), args.seed + k, args.out, args.report_every)


if __name__ == "__main__":
    main()
