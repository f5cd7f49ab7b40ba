"""What a training step draws and optimises, from the configuration: prompts, stochastic window, objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.objective import Objective
from unigrpo_cli.algo.rng import derive, uniform
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt


def prompts_for(prompts: Sequence[Prompt], config: Config, step: int) -> list[Prompt]:
    """The prompts of a training step: passes over the list, each in its own order, cut into steps.

    A function of the step alone, so resuming needs no state. A prompt that occurs twice in a step (a short list) gets
    a second id and so noise of its own.
    """
    count = config.train.prompts_per_step
    orders: dict[int, Tensor] = {}
    chosen: list[Prompt] = []
    for index in range(step * count, (step + 1) * count):
        epoch, at = divmod(index, len(prompts))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive(config.seed, "order", epoch))
            orders[epoch] = torch.randperm(len(prompts), generator=generator)
        prompt = prompts[int(orders[epoch][at])]
        taken, name, again = {p.id for p in chosen}, prompt.id, 0
        while name in taken:
            again += 1
            name = f"{prompt.id}@{again}"
        chosen.append(replace(prompt, id=name) if name != prompt.id else prompt)
    return chosen


def window_of(config: Config, step: int, k: int = 0) -> flow.Window:
    """The stochastic window of round k of a training step, one for all its groups; none where no step is scored."""
    if draws_of(config):
        return flow.Window(0, 0)
    s, later = config.sampling, ("round", k) if k else ()
    return flow.sde_window(
        s.window,
        steps=s.steps,
        size=s.window_size,
        within=s.window_range,
        uniform=float(uniform(derive(config.seed, "window", step, *later), 1)),
        turn=step // s.window_period,
    )


def draws_of(config: Config) -> int:
    """Noisings of each final latent at which an objective of the forward process scores velocities; 0 for others."""
    return 0 if config.objective.image == "transition" else config.objective.draws


def later_windows(config: Config, step: int) -> tuple[flow.Window, ...]:
    """The windows of all rounds but the first."""
    return tuple(window_of(config, step, k) for k in range(1, config.sampling.rounds))


def traced_groups(config: Config, step: int, groups: int) -> range:
    """Which of a rank's groups are traced in a training step: evenly spread, so that every minibatch has some.

    Traced are the first step, every `trace_every`-th and the last, in the count of steps done.
    """
    t, done = config.train, step + 1
    due = t.trace_every > 0 and (done in (1, t.steps) or done % t.trace_every == 0)
    return range(0, groups, -(-groups // t.trace_groups)) if due else range(0)


def objective_of(config: Config) -> Objective:
    """The objective of eq 2, 6, 7, 8, or of given answers; training one expert leaves out the other's term."""
    o, experts = config.objective, config.train.experts
    weights = config.sft if config.sft.data else o
    return Objective(
        text_weight=0.0 if experts == "image" else weights.text_weight,
        image_weight=0.0 if experts == "text" else weights.image_weight,
        text_clip=o.text_clip,
        image_clip=o.image_clip,
        text_kl=o.text_kl,
        trust_region=o.trust_region,
        penalty=o.penalty if o.penalty_weight else "none",
        penalty_weight=o.penalty_weight,
        map_ratio=config.advantage.map_ratio,
        image=o.image,
        fpo_clip=o.fpo_clip,
        nft_beta=o.nft_beta,
        nft_range=config.advantage.clamp,
    )
