"""The replay, which reads a text once, against passes that each read it anew: time, and the same gradients."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.cases import Cases, Comparison
from benchmarks.clock import ratio
from benchmarks.flops import (
    FUSED_BACKWARD,
    Pass,
    after_attention,
    attention_flops,
    edge_attention_flops,
    expert_weights,
    head_flops,
    latent_flops,
    layers_flops,
    products,
)
from benchmarks.report import RELATIVE, Goal, Row
from benchmarks.shapes import Size, random_policy
from unigrpo_cli.algo import flow
from unigrpo_cli.episode import Episode, GivenText, ImageActions, Prompt, TextActions
from unigrpo_cli.models.mot.config import MoTConfig
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.replay import Batch, collate, replay

SEPARATE, LEAN, PACKED = "a text pass, K image passes", "K passes, one of them scores words", "packed"
DELIMITERS = 4  # of the given text and of the thinking

SMALL, PROPORTIONED = "replay", "replay in BAGEL's proportions"


def part_of(shape: str, copies: int, context: int) -> str:
    return f"{shape}, K = {copies}, {context} tokens of context"


def sizes(cases: Cases) -> dict[str, Size]:
    """The networks that are replayed, by the names of their parts."""
    return {SMALL: replace(cases.small, pixels=cases.replayed_pixels), PROPORTIONED: cases.proportioned}


def parts(cases: Cases) -> Iterator[tuple[str, int, int]]:
    """Shape, K and tokens of context of every comparison."""
    return itertools.product(sizes(cases), cases.copies, cases.contexts)


def rows(cases: Cases) -> list[Row]:
    found = []
    for shape, copies, context in parts(cases):
        part = part_of(shape, copies, context)
        found += [
            *(Row(part, name, "s") for name in (SEPARATE, LEAN, PACKED)),
            Row(part, f"{PACKED} / {SEPARATE}", "of the seconds", Goal(0.82)),
            Row(part, f"{PACKED} / {SEPARATE}: bound", "of the operations"),
            Row(part, f"{PACKED} / {LEAN}", "of the seconds"),
            Row(part, f"{PACKED} / {LEAN}: bound", "of the operations"),
            Row(part, "gradients differ", RELATIVE),
        ]
    return found


def drawn(policy: MoTPolicy, size: Size, context: int, copies: int) -> Episode:
    """An episode of that many tokens of context and K noisy images, its numbers random."""
    generator = torch.Generator().manual_seed(0)
    words = size.network.vocab_size // 2  # any of them but the special ones, which come first
    thought = context - size.given - DELIMITERS
    ids = torch.randint(10, words, (context,), generator=generator)
    grid = policy.grid(size.pixels, size.pixels)
    latents = (copies, grid[0] * grid[1], policy.token_dim)
    before, after = torch.randn(2, *latents, generator=generator)
    given = torch.tensor([policy.open_id, *ids[: size.given].tolist(), policy.stop_id])
    text = TextActions(
        ids=ids[size.given : size.given + thought],
        log_prob=torch.zeros(thought),
        finished=False,
        temperature=1.0,
        opening=(policy.open_id,),
        closing=(policy.stop_id,),
        text="",
    )
    image = ImageActions(
        grid=grid,
        times=flow.time_grid(3 * copies, 3.0),
        window=flow.Window(0, copies),
        sde="flow",
        noise_level=0.8,
        before=before,
        after=after,
        log_prob=torch.zeros(copies),
        latent=after[-1],
        pixels=torch.zeros(size.pixels, size.pixels, 3, dtype=torch.uint8),
    )
    return Episode(Prompt("benchmark", ""), 0, 0, (GivenText("prompt", "", given), text, image))


def measure_replay(bench: Comparison, shape: str, copies: int, context: int) -> None:
    """Gradients in all weights of the layers, of random pulls at all words and velocities, three ways.

    A pass for the words and one for every noisy image is what two losses, written one after the other, do. K
    passes, the first of which scores the words too, are the least that can be done without packing.
    """
    size, part = sizes(bench.cases)[shape], part_of(shape, copies, context)
    policy = random_policy(size, torch.device("cpu"), torch.float32)
    weights = {n: p for n, p in policy.network.named_parameters() if ".layers." in n}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    batch = collate([drawn(policy, size, context, copies)])
    generator = torch.Generator().manual_seed(1)
    pull_BL = torch.randn(batch.actions.mask_BL.shape, generator=generator)
    pull_BKND = torch.randn(batch.actions.images[0].x_BKND.shape, generator=generator) / size.image_tokens

    def back(own: Batch, pull_BKND: Tensor | None, *, text: bool) -> None:
        scores = replay(policy, own, text=text, image=pull_BKND is not None)
        pulls = [(scores.log_prob_BL * pull_BL).sum()] if text else []
        if pull_BKND is not None:
            pulls.append((scores.velocities[0] * pull_BKND).sum())
        torch.stack(pulls).sum().backward()

    gradients: dict[str, dict[str, Tensor]] = {}

    def keep(name: str) -> None:
        gradients[name] = {n: p.grad for n, p in weights.items() if p.grad is not None}
        policy.network.zero_grad()

    def packed() -> None:
        back(batch, pull_BKND, text=True)
        keep(PACKED)

    def lean() -> None:
        for k in range(copies):
            back(plain.one_step(batch, k), pull_BKND[:, k : k + 1], text=k == 0)
        keep(LEAN)

    def separate() -> None:
        back(batch, None, text=True)
        for k in range(copies):
            back(plain.one_step(batch, k), pull_BKND[:, k : k + 1], text=False)
        keep(SEPARATE)

    times = bench.clock.parallel_map({SEPARATE: separate, LEAN: lean, PACKED: packed}, bench.cases.share_s)
    bench.report.add(part, SEPARATE, statistics.median(times[SEPARATE]), f"{len(times[PACKED])} rounds")
    bench.report.add(part, LEAN, statistics.median(times[LEAN]))
    bench.report.add(part, PACKED, statistics.median(times[PACKED]))
    scored = int(batch.actions.mask_BL.sum())
    cost = partial(operations, size.network, context, image=size.image_tokens)
    image = cost(copies=1, scored=0)
    plainly = {SEPARATE: cost(copies=0, scored=scored) + copies * image}
    plainly[LEAN] = cost(copies=1, scored=scored) + (copies - 1) * image
    for name, counted in plainly.items():
        measured, bound = ratio(times, PACKED, name), cost(copies=copies, scored=scored) / counted
        bench.report.add(part, f"{PACKED} / {name}", measured, f"saves {1 - measured:.0%}")
        bench.report.add(part, f"{PACKED} / {name}: bound", bound, f"arithmetic saves {1 - bound:.0%}")
    apart = 0.0
    for other in (gradients[SEPARATE], gradients[LEAN]):
        assert gradients[PACKED].keys() == other.keys()
        scale = max(g.abs().max().item() for g in other.values())
        apart = max([apart, *((gradients[PACKED][n] - g).abs().max().item() / scale for n, g in other.items())])
    bench.agree(part, "gradients differ", apart, 1e-5)


def operations(shape: MoTConfig, context: int, copies: int, image: int, scored: int) -> int:
    """Forward and backward of one episode whose layers learn.

    A matrix makes two gradients, its own and its input's, but what the last layer makes of words where none are
    scored has none, and of boundary tokens it makes keys and values alone. Attention costs 2.5 times as much
    backward as forward. Head and projections are frozen and only pass a gradient on.
    """
    p = Pass(1, text=context, copies=copies, image=image, scored=scored)
    q, (after, _) = math.prod(products(shape)["q"]), after_attention(shape, 0)
    idle = 0 if scored else context
    unlearned = (p.edges + idle) * (after + q)
    matrices = p.tokens * expert_weights(shape) * shape.num_hidden_layers - unlearned
    attention = attention_flops(shape, p) * shape.num_hidden_layers - edge_attention_flops(shape, p)
    attention -= attention_flops(shape, Pass(1, text=idle))
    backward = 4 * matrices + FUSED_BACKWARD * attention
    return int(layers_flops(shape, p) + backward + 2 * head_flops(shape, p) + 1.5 * latent_flops(shape, p))
