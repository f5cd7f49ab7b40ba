"""Train the embedded aesthetic head: `python -m tools.toy_aesthetic --out DIR`.

The shapes world has no human ratings; a rule takes their place: sharp is better than soft, clean than noisy, the
middle than the edge. A head in the layout of LAION's version 2 (five linear layers, nothing between them) learns it
from the embeddings of the embedded CLIP, in seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from unigrpo_cli.rewards.agreement import spearman
from unigrpo_cli.rewards.batch import RewardContext
from unigrpo_cli.toy.prompts import TAGS, draw_metadata, draw_scene
from unigrpo_cli.toy.render import render
from unigrpo_cli.toy.world import Scene
from unigrpo_plugins.encoders import EMBEDDED, load_encoder
from unigrpo_plugins.heads import read_head

WIDTHS = (48, 24, 16, 8, 1)
NUMBERS = (0, 2, 4, 6, 7)  # of LAION's linear layers; dropout stands between
BEST, BLUR, NOISE, APART = 7.0, 2.0, 2.0, 2.0
"""Rating of a perfect picture, and what the worst blur, noise and placement take off: 1 to 7."""
WORST_BLUR, WORST_NOISE = 8, 40.0
"""Passes of the kernel; standard deviation in grey levels. This CLIP was taught to look past milder ones."""


def blurred(pixels: NDArray[np.floating], times: int) -> NDArray[np.floating]:
    """A [1, 2, 1] kernel along both axes, so many times."""
    for _ in range(times):
        for axis in (0, 1):
            padded = np.pad(pixels, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
            before, after = np.delete(padded, [-1, -2], axis), np.delete(padded, [0, 1], axis)
            pixels = (before + 2 * pixels + after) / 4
    return pixels


def off_centre(scene: Scene) -> float:
    """Mean distance of the things from the middle cell, 1 at the corners."""
    away = [np.hypot(thing.column_row[0] - 1, thing.column_row[1] - 1) for thing in scene]
    return float(np.mean(away) / np.sqrt(2))


def rated(count: int, seed: int) -> tuple[list[Image.Image], Tensor]:
    """Pictures, spoilt more or less, and their ratings by the rule [count]."""
    rng = np.random.default_rng([seed, 6])
    images, ratings = [], []
    for _ in range(count):
        scene = draw_scene(draw_metadata(TAGS[rng.integers(len(TAGS))], rng), rng)
        times, deviation = int(rng.integers(WORST_BLUR + 1)), rng.uniform(0, WORST_NOISE)
        pixels = blurred(render(scene, rng).astype(np.float64), times)
        pixels = pixels + rng.normal(0, deviation, pixels.shape)
        images.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
        rating = BEST - BLUR * times / WORST_BLUR - NOISE * deviation / WORST_NOISE - APART * off_centre(scene)
        ratings.append(rating)
    return images, torch.tensor(ratings, dtype=torch.float32)


def trained(x_BE: Tensor, ratings_B: Tensor, steps: int) -> dict[str, Tensor]:
    """The head's state dict after `steps` of full-batch Adam.

    Embeddings of one CLIP share most of their direction; the head learns on the rest, in its own scale, and gets
    the shift and the scale folded into its first layer afterwards.
    """
    mean, scale = x_BE.mean(dim=0), (x_BE - x_BE.mean(dim=0)).std()
    widths = (x_BE.shape[1], *WIDTHS)
    linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
    layers = nn.Sequential(*linears)
    optimizer = torch.optim.Adam(layers.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    x = (x_BE - mean) / scale
    centre = ratings_B.mean()
    for _ in range(steps):
        loss = (layers(x).squeeze(-1) + centre - ratings_B).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        linears[0].weight.div_(scale)
        linears[0].bias.sub_(linears[0].weight @ mean)
        linears[-1].bias.add_(centre)
    return {
        f"layers.{n}.{part}": getattr(layer, part).detach().contiguous()
        for n, layer in zip(NUMBERS, layers, strict=True)
        for part in ("weight", "bias")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    began = time.process_time()
    context = RewardContext("cpu", args.seed, embedded=True, offline=True)
    encoder = load_encoder(context, "aesthetic", EMBEDDED, None, "fp32")
    images, ratings = rated(args.pictures, args.seed)
    state = trained(encoder.images(images).clone(), ratings, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out / "head.safetensors")
    unseen, truth = rated(500, args.seed + 1)
    said = read_head(state, "head")(encoder.images(unseen))
    report = {
        "held_out_spearman": round(spearman(said.double().numpy(), truth.double().numpy()) or 0.0, 3),
        "held_out_rmse": round(float((said - truth).square().mean().sqrt()), 3),
        "rating_deviation": round(float(truth.std()), 3),
        "range": [round(float(said.min()), 2), round(float(said.max()), 2)],
        "core_seconds": round(time.process_time() - began, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
