"""Episodes under the behaviour policy: write, paint, and the program prompt -> reasoning -> image.

`write_text` and `paint` each draw one segment for all rows at once, `look` puts a finished image into the context.
Programs of several rounds are longer sequences of the three, each round with seeds of its own,
`derive(seed, "round", k)`. `replay.py` is this file's mirror image: it scores what was drawn here with the same
functions of `algo`.

Shape letters: B rows (episodes), L text actions, K stochastic steps, N image tokens of D numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.text import token
from unigrpo_cli.episode import Episode, Group, ImageActions, Prompt, TextActions
from unigrpo_cli.models import Policy
from unigrpo_cli.models.context import Context
from unigrpo_cli.models.mot import NoisyImage
from unigrpo_cli.seeds import derive, normal, uniform


@dataclass(frozen=True)
class Sampling:
    """How episodes are drawn.

    Args:
        think: whether text is written before the image.
        max_new_tokens: budget of one text, its stop token included.
        temperature: of the sampled and of the scored distribution; 0 is greedy (evaluation only).
        height, width: of the image, in pixels.
        steps: network calls per image.
        shift: of the time grid; above 1 spends more steps at high noise.
        kernel, noise_level: the stochastic transition inside the window.
        rows: episodes in one batch. Changes speed and memory, no sample.
    """

    think: bool
    max_new_tokens: int
    temperature: float
    height: int
    width: int
    steps: int
    shift: float
    kernel: str
    noise_level: float
    rows: int


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    members: int,
    sampling: Sampling,
    window: flow.Window,
    seed: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[Group]:
    """`members` episodes of every prompt, grouped.

    An episode's randomness comes from (seed, prompt id, member) alone: batches and their order change nothing but
    the rounding of matrix products. The window is one for all rows.
    """
    todo = [(prompt, member) for prompt in prompts for member in range(members)]
    episodes: list[Episode] = []
    for at in range(0, len(todo), sampling.rows):
        rows = todo[at : at + sampling.rows]
        episodes += _think_then_paint(policy, rows, sampling, window, seed)
        on_rows(len(rows))
    return [Group(prompt, tuple(episodes[k * members : (k + 1) * members])) for k, prompt in enumerate(prompts)]


def _think_then_paint(
    policy: Policy, rows: list[tuple[Prompt, int]], sampling: Sampling, window: flow.Window, seed: int
) -> list[Episode]:
    """The program prompt -> reasoning -> image for one batch of rows."""
    seeds = [derive(seed, prompt.id, member) for prompt, member in rows]
    prompts = list({(prompt.id, prompt.text): prompt for prompt, _ in rows}.values())
    given = [policy.preamble(prompt.text, sampling.think) for prompt in prompts]
    context = read_given(policy, [torch.cat([segment.ids for segment in own]) for own in given])
    row_of = {(prompt.id, prompt.text): k for k, prompt in enumerate(prompts)}
    at = [row_of[prompt.id, prompt.text] for prompt, _ in rows]
    context = context.select(torch.tensor(at, device=policy.device))  # a prompt is read once per group
    texts: list[TextActions] = []
    if sampling.think:
        context, texts = write_text(policy, context, sampling, seeds)
    images = paint(policy, context, sampling, window, seeds)
    return [
        Episode(prompt, member, seeds[k], (*given[at[k]], *texts[k : k + 1], images[k]))
        for k, (prompt, member) in enumerate(rows)
    ]


def read_given(policy: Policy, ids: Sequence[Tensor]) -> Context:
    """The context after reading one sequence of given tokens per row."""
    lengths = [len(row) for row in ids]
    padded = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=policy.stop_id)
    return policy.forward(policy.empty_context(len(ids)), padded.to(policy.device), lengths).context


def look(policy: Policy, context: Context, x_BND: Tensor, grid: tuple[int, int]) -> Context:
    """The context after seeing one finished image per row, for what follows it."""
    clean = NoisyImage(x_BND[:, None], torch.zeros(len(x_BND), 1, device=policy.device), grid)
    return policy.forward(context, image=clean, keep_image=True).context


def write_text(
    policy: Policy, context: Context, sampling: Sampling, seeds: Sequence[int]
) -> tuple[Context, list[TextActions]]:
    """Sample one text per row with a key-value cache, until all rows have stopped or the budget is spent.

    Every sampled token is fed, the stop token too; a truncated row is fed a forced stop token, which is no
    action. So the context always ends as in the model's own format.
    """
    rows, budget = context.rows, sampling.max_new_tokens
    uniform_BL = torch.stack([uniform(derive(s, "text"), budget) for s in seeds]).to(policy.device)
    open_id, stop_id = policy.open_id, policy.stop_id
    alive = torch.ones(rows, dtype=torch.bool, device=policy.device)
    length = torch.zeros(rows, dtype=torch.long, device=policy.device)
    fed = torch.full((rows, 1), open_id, device=policy.device)
    out = policy.forward(context.reserve(budget + 2), fed)
    ids, log_probs = [], []
    for k in range(budget):
        assert out.hidden_BLC is not None
        drawn = token(
            policy.logits(out.hidden_BLC[:, -1]), temperature=sampling.temperature, uniform=uniform_BL[:, k]
        )
        ids.append(drawn.id)
        log_probs.append(drawn.log_prob)
        length += alive
        out = policy.forward(out.context, drawn.id[:, None], [int(a) for a in alive])
        alive = alive & (drawn.id != stop_id)
        if not alive.any():
            break
    context = out.context
    if alive.any():
        context = policy.forward(context, torch.full_like(fed, stop_id), length_B=[int(a) for a in alive]).context
    ids_BL, log_prob_BL = torch.stack(ids, dim=1).cpu(), torch.stack(log_probs, dim=1).float().cpu()
    texts = []
    for row, (n, truncated) in enumerate(zip(length.tolist(), alive.tolist(), strict=True)):
        own = ids_BL[row, :n].clone()
        texts.append(
            TextActions(
                ids=own,
                log_prob=log_prob_BL[row, :n].clone(),
                finished=not truncated,
                temperature=sampling.temperature,
                opening=(open_id,),
                closing=(stop_id,) if truncated else (),
                text=policy.decode_text(own),
            )
        )
    return context, texts


def paint(
    policy: Policy, context: Context, sampling: Sampling, window: flow.Window, seeds: Sequence[int]
) -> list[ImageActions]:
    """Integrate one image per row from noise: stochastic steps inside the window, Euler steps elsewhere."""
    grid = policy.grid(sampling.height, sampling.width)
    shape = (grid[0] * grid[1], policy.token_dim)
    times = flow.time_grid(sampling.steps, sampling.shift)
    noise_BKND = torch.stack([normal(derive(s, "steps"), window.size, *shape) for s in seeds])
    noise_BKND = noise_BKND.to(policy.device)
    x = torch.stack([normal(derive(s, "start"), *shape) for s in seeds]).to(policy.device)
    before, after, log_probs = [], [], []
    for k, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(policy, context, x, t, grid)
        if k not in window.steps:
            x = flow.euler(x, v, t, t_next)
            continue
        action = flow.step(
            sampling.kernel,
            x,
            v,
            t,
            t_next,
            noise_level=sampling.noise_level,
            t_second=times[1],
            noise=noise_BKND[:, k - window.start],
        )
        before.append(x)
        after.append(action.x_next)
        log_probs.append(action.log_prob)
        x = action.x_next
    pixels = policy.decode_pixels(x, grid)

    def recorded(steps: list[Tensor], like: Tensor) -> Tensor:
        """Per row, its stochastic steps: [B, K, ...]."""
        return torch.stack(steps, dim=1).cpu() if steps else like[:, None][:, :0].cpu()

    before_BKND, after_BKND = recorded(before, x), recorded(after, x)
    log_prob_BK = recorded(log_probs, x[:, 0, 0])
    return [
        ImageActions(
            grid=grid,
            times=times,
            window=window,
            kernel=sampling.kernel,
            noise_level=sampling.noise_level,
            before=before_BKND[row].clone(),
            after=after_BKND[row].clone(),
            log_prob=log_prob_BK[row].clone(),
            latent=x[row].cpu().clone(),
            pixels=pixels[row].clone(),
        )
        for row in range(context.rows)
    ]


def velocity(policy: Policy, context: Context, x_BND: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
    """v_BND of one noisy image per row at a common time, fp32 as all latents are."""
    t_B1 = t.to(policy.device).expand(len(x_BND), 1)
    out = policy.forward(context, image=NoisyImage(x_BND[:, None], t_B1, grid))
    assert out.velocity_BKND is not None
    return out.velocity_BKND[:, 0].float()
