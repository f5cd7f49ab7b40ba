"""Draw episodes under the behaviour policy, in the order of a program (`programs.py`).

`sample_text` and `sample_image` each draw one segment for all rows of a batch; `read_images` puts images into the
context. `replay.py` is the mirror image of this file: it scores the actions drawn here by the same functions of `algo`.

Shape letters: B rows (episodes), L text actions, K stochastic steps, N image tokens of D numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import NO_GUIDANCE, Guidance, guided
from unigrpo_cli.algo.rng import derive, normal, uniform
from unigrpo_cli.algo.text import token
from unigrpo_cli.episode import (
    Episode,
    GivenImage,
    GivenText,
    Group,
    ImageActions,
    Prompt,
    Segment,
    TextActions,
    structure,
)
from unigrpo_cli.errors import UsageError
from unigrpo_cli.models.policy import Context, NoisyImage, Policy
from unigrpo_cli.parallel.out_of_memory import out_of_memory_hint
from unigrpo_cli.parallel.workers import parallel_map, worker_count
from unigrpo_cli.programs import PROGRAMS, THINK_PAINT, Program


@dataclass(frozen=True)
class Sampling:
    """How episodes are drawn.

    Args:
        think: sample texts; without them only images.
        max_new_tokens: budget of one text, stop token included.
        temperature: of the sampled and the scored distribution; 0 is greedy (evaluation only).
        height, width: image size, pixels.
        steps: network calls per image.
        shift: time shift of the grid; above 1, more steps at high noise. 0 takes the policy's own.
        sde, noise_level: the stochastic transition inside the window.
        batch_size: episodes in one batch; changes speed and memory, no sample.
        guidance: classifier-free guidance.
        compiled: sample with `Policy.compiled`.
        tapered: the last two batches are halved, so that asynchronous rewards start earlier.
        program, rounds: what an episode consists of, see `programs.py`.
        stop_phrase: words by which a text after a look ends its episode; "" for none.
        round_max_new_tokens: budgets of a text by round, the last one repeated; empty: `max_new_tokens`.
        show_images: how a painted image is looked at, see `Policy.show`.
    """

    think: bool
    max_new_tokens: int
    temperature: float
    height: int
    width: int
    steps: int
    shift: float
    sde: str
    noise_level: float
    batch_size: int
    guidance: Guidance = NO_GUIDANCE
    compiled: bool = False
    tapered: bool = False
    program: str = THINK_PAINT
    rounds: int = 1
    stop_phrase: str = ""
    round_max_new_tokens: tuple[int, ...] = ()
    show_images: str = "latents"

    def budget(self, k: int) -> int:
        """Most tokens of a text in round k."""
        budgets = self.round_max_new_tokens or (self.max_new_tokens,)
        return budgets[min(k, len(budgets) - 1)]


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    members: int,
    sampling: Sampling,
    window: flow.Window,
    seed: int,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_episodes: Callable[[list[Episode]], None] = lambda episodes: None,
    *,
    later_windows: Sequence[flow.Window] = (),
) -> list[Group]:
    """`members` episodes of every prompt, grouped.

    An episode's randomness comes from (seed, prompt id, member) alone: batches change only the rounding of matrix
    products. All rows have the same windows.

    Args:
        window: of the first round's image.
        on_rows, on_episodes: called after each batch with the number of its episodes, and with the episodes.
        later_windows: of the images of later rounds, the last one repeated; empty: `window`.
    """
    if sampling.batch_size < 1:
        raise ValueError(
            f"sampling.batch_size={sampling.batch_size}: commands choose a size for 0; here give the number"
        )
    if sampling.compiled:
        policy = policy.compiled()
    program, windows = PROGRAMS.find(sampling.program), (window, *later_windows)
    given = [(prompt, _given(policy, program, prompt, sampling.think)) for prompt in prompts]
    rows_of: dict[tuple, list[tuple[int, int]]] = {}
    for k, (_, preamble) in enumerate(given):
        rows_of.setdefault(structure(preamble), []).extend((k, member) for member in range(members))
    batches = [part for rows in rows_of.values() for part in _cut(rows, sampling.batch_size)]
    if sampling.tapered:
        batches[-2:] = [half for batch in batches[-2:] for half in _cut(batch, -(-len(batch) // 2))]

    def draw(rows: list[tuple[int, int]]) -> list[Episode]:
        with out_of_memory_hint("a rollout", "sampling.batch_size", len(rows)):
            return _draw(policy, program, given, rows, sampling, windows, seed)

    episodes: dict[tuple[int, int], Episode] = {}
    workers = worker_count(len(batches), policy.device)
    for rows, drawn in zip(batches, parallel_map(draw, batches, workers), strict=True):
        episodes |= zip(rows, drawn, strict=True)
        on_rows(len(rows))
        on_episodes(drawn)
    return [Group(prompt, tuple(episodes[k, member] for member in range(members))) for k, prompt in enumerate(prompts)]


def _cut(rows: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


Given = tuple[GivenText | GivenImage, ...]


def _given(policy: Policy, program: Program, prompt: Prompt, think: bool) -> Given:
    program.refuse_without_picture(prompt.text, prompt.image)
    given = policy.preamble(prompt, think)
    return given if program.reads_prompt else given[:-1]


def _draw(
    policy: Policy,
    program: Program,
    given: Sequence[tuple[Prompt, Given]],
    rows: Sequence[tuple[int, int]],
    sampling: Sampling,
    windows: Sequence[flow.Window],
    seed: int,
) -> list[Episode]:
    """The episodes of one batch of rows (index into `given`, member)."""
    seeds = [derive(seed, given[k][0].id, member) for k, member in rows]
    asked = list(dict.fromkeys(k for k, _ in rows))
    at = torch.tensor([asked.index(k) for k, _ in rows], device=policy.device)

    def read(part: Callable[[Given], Given]) -> Context:
        """The context after that part of the given segments: read once per prompt, shared by its group."""
        return read_given(policy, [part(given[k][1]) for k in asked]).select(at)

    context, unconditional = read(lambda preamble: preamble), None
    if sampling.guidance.on:
        unconditional = UnconditionalContexts(less_text=read(without_text), less_image=read(texts_alone))
    sources = [s for s in given[asked[0]][1] if isinstance(s, GivenImage)]
    drawn = _Rows(
        policy,
        sampling,
        windows,
        sources[-1].grid if sources else None,
        seeds,
        [list(given[k][1]) for k, _ in rows],
        list(range(len(rows))),
        context,
        unconditional,
    )
    program.run(drawn)
    found = zip(rows, seeds, drawn.segments, strict=True)
    episodes = [Episode(given[k][0], member, own, tuple(segments)) for (k, member), own, segments in found]
    if not all(episode.images for episode in episodes):
        raise UsageError(f"sampling.program={program.name} ended an episode without an image: it must sample one")
    return episodes


@dataclass
class _Rows:
    """The rows of one batch while a program draws them; see `programs.Rows`.

    Args:
        grid: of a source picture, whose size edits have; else None.
        seeds, segments: of every row.
        active: the rows that the contexts have; others have stopped.
        unconditional: contexts for guidance; None without it.
        round, texts: number of the round, and of texts sampled in it.
    """

    policy: Policy
    sampling: Sampling
    windows: Sequence[flow.Window]
    grid: tuple[int, int] | None
    seeds: Sequence[int]
    segments: list[list[Segment]]
    active: list[int]
    context: Context
    unconditional: UnconditionalContexts | None
    round: int = 0
    texts: int = 0

    @property
    def rounds(self) -> int:
        return self.sampling.rounds

    @property
    def stop_phrase(self) -> str:
        return self.sampling.stop_phrase

    def _round_seeds(self) -> list[int]:
        """The seed of this round of every active row: the episode's own at first."""
        own = [self.seeds[row] for row in self.active]
        return [derive(seed, "round", self.round) for seed in own] if self.round else own

    def _append(self, drawn: Sequence[Segment]) -> None:
        for row, segment in zip(self.active, drawn, strict=True):
            self.segments[row].append(segment)

    def sample_text(self) -> list[str]:
        if not self.sampling.think or not self.active:
            return [""] * len(self.active)
        seeds = self._round_seeds()
        if self.texts:  # another text of the same round
            seeds = [derive(seed, "text", self.texts) for seed in seeds]
        sampling = replace(self.sampling, max_new_tokens=self.sampling.budget(self.round))
        self.context, drawn = sample_text(self.policy, self.context, sampling, seeds)
        self.texts += 1
        self._append(drawn)
        return [text.text for text in drawn]

    def sample_image(self) -> None:
        if self.active:
            window = self.windows[min(self.round, len(self.windows) - 1)]
            seeds = self._round_seeds()
            drawn = sample_image(self.policy, self.context, self.sampling, window, seeds, self.grid, self.unconditional)
            self._append(drawn)
        self.round, self.texts = self.round + 1, 0

    def read_image(self) -> None:
        latest = [
            next((s for s in reversed(self.segments[k]) if isinstance(s, ImageActions)), None) for k in self.active
        ]
        images = [image for image in latest if image is not None]
        if len(images) < len(latest):
            raise UsageError(f"sampling.program={self.sampling.program} looks at an image before it sampled one")
        if images:
            shown = self.policy.show(images, self.sampling.show_images)
            self.context = read_images(self.policy, self.context, shown)
            if self.unconditional is not None:  # the official sampler's rule for a picture that it reads
                self.unconditional = replace(self.unconditional, less_text=self.context)
            self._append(shown)

    def stop(self, done: Sequence[bool]) -> None:
        if len(done) != len(self.active):
            raise UsageError(
                f"sampling.program={self.sampling.program} calls rows.stop with {len(done)} values for "
                f"{len(self.active)} rows: give one for each text of the last `rows.sample_text`"
            )
        left = [k for k, gone in enumerate(done) if not gone]
        if len(left) < len(self.active):
            self.active = [self.active[k] for k in left]
            index = torch.tensor(left, dtype=torch.long, device=self.policy.device)
            self.context = self.context.select(index)
            if (u := self.unconditional) is not None:
                self.unconditional = UnconditionalContexts(u.less_text.select(index), u.less_image.select(index))


@torch.no_grad()
def answer(policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[TextActions]:
    """The model's answer in words to each prompt and its picture; no image is sampled."""
    texts = []
    for prompt in prompts:
        context = read_given(policy, [policy.question(prompt, sampling.think)])
        texts += sample_text(policy, context, sampling, [derive(seed, prompt.id, 0)])[1]
    return texts


def read_given(policy: Policy, given: Sequence[Given]) -> Context:
    """The context after the given segments of each row; all rows have the same structure."""
    context = policy.empty_context(len(given))
    pending: list[list[Tensor]] = [[] for _ in given]

    def read_pending(context: Context) -> Context:
        if not pending[0]:
            return context
        ids = [torch.cat(row) for row in pending]
        for row in pending:
            row.clear()
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=policy.stop_id)
        return policy.forward(context, padded.to(policy.device), [len(row) for row in ids]).context

    for column in zip(*given, strict=True):
        if isinstance(column[0], GivenImage):
            images = [s for s in column if isinstance(s, GivenImage)]
            context = read_images(policy, read_pending(context), images)
            continue
        for row, segment in zip(pending, column, strict=True):
            assert isinstance(segment, GivenText)
            row.append(segment.ids)
    return read_pending(context)


def read_images(policy: Policy, context: Context, images: Sequence[GivenImage]) -> Context:
    latent = torch.stack([image.latent for image in images]).to(policy.device)
    return policy.encode_image(context, latent, images[0].grid, views_of(images))


def views_of(images: Sequence[GivenImage]) -> Tensor | None:
    """The vision tower's input of one image per row, uint8 [B, h, w, 3]; None without one."""
    views = [image.view for image in images if image.view is not None]
    return torch.stack(views) if views else None


def sample_text(
    policy: Policy, context: Context, sampling: Sampling, seeds: Sequence[int]
) -> tuple[Context, list[TextActions]]:
    """Sample one text per row with a KV cache, until all rows have stopped or the budget is spent.

    The model reads every sampled token, the stop token too; a truncated row gets a forced stop token, which is not an
    action. So the context always ends in the model's own format. When half of the batch has stopped, the unfinished
    rows are moved to a smaller batch.
    """
    rows, budget = context.rows, sampling.max_new_tokens
    uniform_BL = torch.stack([uniform(derive(s, "text"), budget) for s in seeds]).to(policy.device)
    open_id, stop_id = policy.open_id, policy.stop_id
    ids_BL = torch.full((rows, budget), stop_id, device=policy.device)
    log_prob_BL = torch.zeros(rows, budget, device=policy.device)
    finished = torch.zeros(rows, dtype=torch.bool, device=policy.device)
    length = torch.full((rows,), budget, device=policy.device)
    whole = context.reserve(budget + 2)
    at = torch.arange(rows, device=policy.device)  # rows in the batch
    unfinished = torch.ones(rows, dtype=torch.long, device=policy.device)  # of those, 1 or 0
    count = rows
    out = policy.forward(whole, torch.full((rows, 1), open_id, device=policy.device))
    for k in range(budget):
        assert out.hidden_BLC is not None
        drawn = token(policy.logits(out.hidden_BLC[:, -1]), temperature=sampling.temperature, uniform=uniform_BL[at, k])
        ids_BL[at, k], log_prob_BL[at, k] = drawn.id, drawn.log_prob.float()
        out = policy.forward(out.context, drawn.id[:, None], None if count == len(at) else unfinished)
        stops = (drawn.id == stop_id) & ~finished[at]
        length[at] = torch.where(stops, k + 1, length[at])
        finished[at] = finished[at] | stops
        unfinished = (~finished[at]).long()
        count = int(unfinished.sum())  # the only host wait per token
        if not count:
            break
        if 2 * count <= len(at) and k + 1 < budget:
            whole = whole.put(at, out.context)
            kept = unfinished.argsort(descending=True, stable=True)[:count]
            assert out.hidden_BLC is not None
            out = replace(out, context=out.context.select(kept), hidden_BLC=out.hidden_BLC[kept])
            at, unfinished = at[kept], unfinished[kept]
    context = out.context
    if count:
        closing = torch.full((len(at), 1), stop_id, device=policy.device)
        context = policy.forward(context, closing, None if count == len(at) else unfinished).context
    if len(at) < rows:
        context = whole.put(at, context)
    ids_BL, log_prob_BL = ids_BL.cpu(), log_prob_BL.cpu()
    texts = []
    for row, (n, stopped) in enumerate(zip(length.tolist(), finished.tolist(), strict=True)):
        own = ids_BL[row, :n].clone()
        texts.append(
            TextActions(
                ids=own,
                log_prob=log_prob_BL[row, :n].clone(),
                finished=stopped,
                temperature=sampling.temperature,
                opening=(open_id,),
                closing=() if stopped else (stop_id,),
                text=policy.decode_text(own),
            )
        )
    return context, texts


@dataclass(frozen=True)
class UnconditionalContexts:
    """Contexts for guidance: all before the last given text, or up to a later look; and given texts alone."""

    less_text: Context
    less_image: Context


def without_text(preamble: Given) -> Given:
    """What is given before the last text."""
    return preamble[:-1] if preamble and isinstance(preamble[-1], GivenText) else preamble


def texts_alone(preamble: Given) -> Given:
    return tuple(s for s in preamble if isinstance(s, GivenText))


def sample_image(
    policy: Policy,
    context: Context,
    sampling: Sampling,
    window: flow.Window,
    seeds: Sequence[int],
    grid: tuple[int, int] | None = None,
    unconditional: UnconditionalContexts | None = None,
) -> list[ImageActions]:
    """Integrate one image per row from noise: stochastic steps inside the window, Euler steps elsewhere.

    Args:
        grid: token rows and columns of the images; None takes them from `sampling`. An edit has its source's.
        unconditional: contexts for guidance; a stochastic step moves by the guided velocity too.
    """
    grid = grid or policy.grid(sampling.height, sampling.width)
    shape = (grid[0] * grid[1], policy.token_dim)
    times = flow.time_grid(sampling.steps, sampling.shift or policy.shift(grid, sampling.steps))
    times_on_device = times.to(policy.device)
    noise_BKND = torch.stack([normal(derive(s, "steps"), window.size, *shape) for s in seeds])
    noise_BKND = noise_BKND.to(policy.device)
    x = torch.stack([normal(derive(s, "start"), *shape) for s in seeds]).to(policy.device)
    before, after, log_probs = [], [], []
    for k, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(policy, context, x, times_on_device[k], grid)
        if unconditional is not None and sampling.guidance.acts(float(t)):
            v = _guided(policy, unconditional, x, times_on_device[k], grid, v, sampling.guidance)
        if k not in window.steps:
            x = flow.euler(x, v, t, t_next)
            continue
        action = flow.step(
            sampling.sde,
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
            sde=sampling.sde,
            noise_level=sampling.noise_level,
            before=before_BKND[row].clone(),
            after=after_BKND[row].clone(),
            log_prob=log_prob_BK[row].clone(),
            latent=x[row].cpu().clone(),
            pixels=pixels[row].clone(),
            guidance=sampling.guidance if unconditional is not None else NO_GUIDANCE,
        )
        for row in range(context.rows)
    ]


def velocity(policy: Policy, context: Context, x_BND: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
    """v_BND of one noisy image per row at a common time on the policy's device, fp32."""
    t_B1 = t.expand(len(x_BND), 1)
    out = policy.forward(context, image=NoisyImage(x_BND[:, None], t_B1, grid))
    assert out.velocity_BKND is not None
    return out.velocity_BKND[:, 0].float()


def _guided(
    policy: Policy,
    unconditional: UnconditionalContexts,
    x_BND: Tensor,
    t: Tensor,
    grid: tuple[int, int],
    v_BND: Tensor,
    guidance: Guidance,
) -> Tensor:
    less_text = velocity(policy, unconditional.less_text, x_BND, t, grid)
    less_image = velocity(policy, unconditional.less_image, x_BND, t, grid) if guidance.image > 1 else None
    return guided(v_BND, less_text, less_image, guidance)
