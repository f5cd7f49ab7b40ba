"""Score recorded actions under the current weights: the mirror image of `rollout.py`.

The text of each chunk of an episode is read once; all K recorded noisy states of its image attend to it, in one packed
pass or, on a CPU, a few at a time. Old and reference scores are computed under `no_grad`, current ones with gradients,
by the same lines: before the first update the ratio is exactly 1.

Shape letters: B episodes, L text actions (padded, all texts of an episode in sequence), K stochastic steps of one
image, N image tokens of D numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.guidance import NO_GUIDANCE, Guidance, guided
from unigrpo_cli.algo.objective import Actions, ImageSteps, NoisedImage, Scores
from unigrpo_cli.algo.rng import derive, normal, uniform
from unigrpo_cli.algo.text import token
from unigrpo_cli.episode import Episode, GivenImage, GivenText, ImageActions, Segment, TextActions, structure
from unigrpo_cli.models.policy import Context, NoisyImage, Policy, PolicyOutput
from unigrpo_cli.rollout import Given, UnconditionalContexts, read_given, texts_alone, views_of, without_text

BOUNDARY = 2  # boundary tokens of an image


@dataclass(frozen=True)
class Chunk:
    """Text, given and sampled, and optionally the image after it, sampled or given: packed into one pass.

    Args:
        ids_BS, length_B: all tokens of the chunk, right-padded, and their number.
        row_BL: for each text action, the token of `ids_BS` whose state predicts it; 0 off-mask.
        action_BL, mask_BL: ids of the text actions; False where a row has none.
        acted_N: flat positions of the mask in [B, L], known to the host so that no pass waits for the device.
        image: the recorded noisy states of a sampled image, or None.
        guided: which of those states' velocities are guided, by number; known to the host.
        latent_BND, grid, view_BHWC: the image that is looked at before the next chunk, see `Policy.encode_image`; None
            without one.
    """

    ids_BS: Tensor
    length_B: list[int]
    row_BL: Tensor
    action_BL: Tensor
    mask_BL: Tensor
    acted_N: Tensor
    image: NoisyImage | None
    latent_BND: Tensor | None
    grid: tuple[int, int]
    view_BHWC: Tensor | None
    guided: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Episodes of one structure, stacked.

    Args:
        actions: the input of the objective.
        behaviour_text_BL, behaviour_image_BK: log-probabilities recorded by the rollout; images in sequence.
        guidance, preambles: of the images' velocities, and each row's given segments before its first action.
    """

    chunks: tuple[Chunk, ...]
    actions: Actions
    temperature: float
    behaviour_text_BL: Tensor
    behaviour_image_BK: Tensor
    guidance: Guidance = NO_GUIDANCE
    preambles: tuple[Given, ...] = ()


def micro_batches(
    episodes: Sequence[Episode], indices: Sequence[int], size: int, tokens: int = 0, draws: int = 0
) -> list[list[int]]:
    """The indices cut into parts of at most `size` episodes that can be replayed together.

    With `tokens` a part has at most that many, padding included, or one episode. Episodes are then sorted by length,
    longest first; otherwise their order stays. `draws` as in `collate`.

    Raises:
        ValueError: when `size` is not set.
    """
    if size < 1:
        raise ValueError(f"train.micro_batch_size={size}: runs choose a size for 0; here give the number of episodes")
    by_structure: dict[tuple, list[int]] = {}
    for k in indices:
        by_structure.setdefault(structure(episodes[k].segments), []).append(k)
    parts: list[list[int]] = []
    for own in by_structure.values():
        length = {k: replayed_tokens(episodes[k], draws) if tokens else 0 for k in own}
        part: list[int] = []
        for k in sorted(own, key=lambda k: -length[k]):
            if part and (len(part) == size or (len(part) + 1) * length[part[0]] > tokens > 0):
                parts.append(part)
                part = []
            part.append(k)
        parts.append(part)
    return parts


def replayed_tokens(episode: Episode, draws: int = 0) -> int:
    """Tokens of an episode in replay: its text, and each image once per network call for a step or draw."""
    count = 0
    for segment in episode.segments:
        if isinstance(segment, GivenText):
            count += len(segment.ids)
        elif isinstance(segment, TextActions):
            count += len(segment.opening) + len(segment.ids) + len(segment.closing)
        elif isinstance(segment, ImageActions):
            count += (draws or segment.window.size * segment.guidance.contexts) * (
                segment.grid[0] * segment.grid[1] + BOUNDARY
            )
        else:
            count += len(segment.latent) + BOUNDARY
    return count


def preamble_of(segments: Sequence[Segment]) -> Given:
    return tuple(takewhile(lambda s: isinstance(s, GivenText | GivenImage), segments))  # type: ignore[arg-type]


def split_up(parts: Sequence[list[int]], count: int) -> list[list[int]]:
    """Cut the largest part in two until there are `count`: the gradient stays the same."""
    found = list(parts)
    while len(found) < count:
        k = max(range(len(found)), key=lambda k: len(found[k]))
        half = len(found[k]) // 2
        found[k : k + 1] = [found[k][:half], found[k][half:]]
    return found


def collate(episodes: Sequence[Episode], device: torch.device | str = "cpu", draws: int = 0) -> Batch:
    """Stack episodes for replay.

    Args:
        draws: score velocities at so many noisings of each final latent, in place of its stochastic steps.

    Raises:
        ValueError: when their segments differ in kind or order, or their images in size or window.
    """
    if len({structure(episode.segments) for episode in episodes}) > 1:
        raise ValueError("episodes replayed together must have the same segments in the same order and sizes")
    chunks, text_log_probs, image_log_probs = [], [], []
    images: list[ImageSteps] = []
    noised: list[NoisedImage] = []
    temperatures = {s.temperature for e in episodes for s in e.segments if isinstance(s, TextActions)}
    if len(temperatures) > 1:
        raise ValueError(f"episodes replayed together must share one temperature, got {sorted(temperatures)}")
    guidances = {image.guidance for e in episodes for image in e.images}
    if len(guidances) > 1:
        raise ValueError(f"images replayed together must share one guidance, got {list(guidances)}")
    pending: list[list[GivenText | TextActions]] = [[] for _ in episodes]
    acted = 0
    for column in zip(*(e.segments for e in episodes), strict=True):
        if isinstance(column[0], ImageActions):
            painted = [s for s in column if isinstance(s, ImageActions)]
            if draws:
                seeds = [derive(e.seed, "draws", len(noised)) for e in episodes]
                noised.append(_noised(painted, seeds, draws, acted))
            else:
                images.append(_image_steps(painted, acted))
            acted += 1
            image_log_probs.append(torch.stack([s.log_prob for s in painted]))
            chunk = _chunk(pending, (noised if draws else images)[-1], painted[0].grid)
            times = [] if draws else painted[0].times[list(painted[0].window.steps)].tolist()
            chunks.append(replace(chunk, guided=tuple(k for k, t in enumerate(times) if painted[0].guidance.acts(t))))
            pending = [[] for _ in episodes]
        elif isinstance(column[0], GivenImage):
            if pending[0] or not chunks or chunks[-1].latent_BND is not None:
                chunks.append(_chunk(pending, None, (0, 0)))
                pending = [[] for _ in episodes]
            chunks[-1] = _looked_at(chunks[-1], [s for s in column if isinstance(s, GivenImage)])
        else:
            acted += isinstance(column[0], TextActions)
            for row, segment in zip(pending, column, strict=True):
                assert isinstance(segment, GivenText | TextActions)
                row.append(segment)
    if pending[0]:
        chunks.append(_chunk(pending, None, (0, 0)))
    at_segment: list[int] = []
    for episode in episodes:
        actions = [s for s in episode.segments if isinstance(s, TextActions | ImageActions)]
        texts = [(k, s) for k, s in enumerate(actions) if isinstance(s, TextActions)]
        text_log_probs.append(torch.cat([s.log_prob for _, s in texts]) if texts else torch.zeros(0))
        at_segment += [k for k, s in texts for _ in range(len(s.ids))]
    mask_BL = torch.cat([chunk.mask_BL for chunk in chunks], dim=1)
    behaviour = torch.zeros(mask_BL.shape)
    behaviour[mask_BL] = torch.cat(text_log_probs)
    segment_BL = torch.zeros(mask_BL.shape, dtype=torch.long)
    segment_BL[mask_BL] = torch.tensor(at_segment, dtype=torch.long)
    behaviour_image = torch.cat(image_log_probs, dim=1) if images else torch.zeros(len(episodes), 0)
    batch = Batch(
        tuple(chunks),
        Actions(mask_BL, segment_BL, tuple(images), tuple(noised)),
        temperatures.pop() if temperatures else 1.0,
        behaviour,
        behaviour_image,
        guidances.pop() if guidances else NO_GUIDANCE,
        tuple(preamble_of(episode.segments) for episode in episodes),
    )
    return batch if str(device) == "cpu" else _to(batch, device)


def _chunk(
    rows: list[list[GivenText | TextActions]], steps: ImageSteps | NoisedImage | None, grid: tuple[int, int]
) -> Chunk:
    """The text segments of every row, concatenated, and the image that is sampled after them."""
    ids, at, actions = [], [], []
    for row in rows:
        tokens: list[int] = []
        predictors: list[int] = []
        acted: list[int] = []
        for segment in row:
            if isinstance(segment, GivenText):
                tokens += segment.ids.tolist()
                continue
            tokens += segment.opening
            predictors += range(len(tokens) - 1, len(tokens) - 1 + len(segment.ids))
            acted += segment.ids.tolist()
            tokens += [*segment.ids.tolist(), *segment.closing]
        ids.append(torch.tensor(tokens, dtype=torch.long))
        at.append(torch.tensor(predictors, dtype=torch.long))
        actions.append(torch.tensor(acted, dtype=torch.long))
    lengths = torch.tensor([len(a) for a in actions])
    mask_BL = torch.arange(int(lengths.max())) < lengths[:, None]
    return Chunk(
        ids_BS=pad_sequence(ids, batch_first=True),
        length_B=[len(row) for row in ids],
        row_BL=pad_sequence(at, batch_first=True),
        action_BL=pad_sequence(actions, batch_first=True),
        mask_BL=mask_BL,
        acted_N=mask_BL.flatten().nonzero()[:, 0],
        image=None if steps is None else NoisyImage(steps.x_BKND, steps.t_BK, grid),
        latent_BND=None,
        grid=grid,
        view_BHWC=None,
    )


def _looked_at(chunk: Chunk, shown: Sequence[GivenImage]) -> Chunk:
    """The chunk with the image that every row looks at after it."""
    latent_BND = torch.stack([image.latent for image in shown])
    return replace(chunk, latent_BND=latent_BND, grid=shown[0].grid, view_BHWC=views_of(shown))


def _image_steps(painted: list[ImageActions], segment: int) -> ImageSteps:
    """The stochastic steps of one image per row, the acted segment of that number."""
    if len({(s.grid, s.window, s.sde, s.noise_level, *s.times.tolist()) for s in painted}) > 1:
        raise ValueError("images replayed together must share size, window, sde, noise level and times")
    times = torch.stack([s.times for s in painted])
    steps = list(painted[0].window.steps)
    return ImageSteps(
        x_BKND=torch.stack([s.before for s in painted]),
        x_next_BKND=torch.stack([s.after for s in painted]),
        t_BK=times[:, steps],
        t_next_BK=times[:, [k + 1 for k in steps]],
        t_second=times[0, 1],
        sde=painted[0].sde,
        noise_level=painted[0].noise_level,
        segment=segment,
    )


def _noised(painted: list[ImageActions], seeds: Sequence[int], draws: int, segment: int) -> NoisedImage:
    """Each row's final latent at times of its own grid, the end left out: none comes twice before all have come.

    Times and noise are functions of the seed, so every pass over the same episode gets the same.
    """
    times, latents, targets = [], [], []
    for image, seed in zip(painted, seeds, strict=True):
        grid_T = image.times[:-1]
        order = uniform(derive(seed, "times"), len(grid_T)).argsort()
        t_K = grid_T[order.repeat(math.ceil(draws / len(grid_T)))[:draws]]
        noise_KND = normal(derive(seed, "noise"), draws, *image.latent.shape)
        times.append(t_K)
        latents.append(flow.noised(image.latent, noise_KND, t_K[:, None, None]))
        targets.append(flow.path_velocity(image.latent, noise_KND))
    return NoisedImage(torch.stack(latents), torch.stack(times), torch.stack(targets), segment)


def _to(value, device):
    """A dataclass, tuple or tensor with every tensor inside it on `device`."""
    if isinstance(value, Tensor):
        pinned = torch.device(device).type == "cuda" and value.device.type == "cpu"
        return (value.pin_memory() if pinned else value).to(device, non_blocking=pinned)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    if isinstance(value, Batch | Chunk | Actions | ImageSteps | NoisedImage | NoisyImage):
        return replace(value, **{name: _to(v, device) for name, v in vars(value).items()})
    return value


def replay(
    policy: Policy,
    batch: Batch,
    *,
    grad_through_context: bool = True,
    grad_through_images: bool = False,
    image: bool = True,
    text: bool = True,
    copies: int | None = None,
) -> Scores:
    """Score recorded actions under the policy's current weights.

    Args:
        grad_through_context: the image loss also trains the text expert, through the context's keys and values. False:
            it trains only the image expert.
        grad_through_images: what is said and painted after a look also trains the experts through the keys and values
            of the picture. False: through those of texts alone.
        image: False leaves out velocities (a text-only objective).
        text: False leaves text unscored, for a reference that only needs velocities; log-probabilities are then 0.
        copies: noisy states of each row's image that one pass passes at; None takes the policy's
            `copies_at_once`. Rounding aside, scores and gradients are the same for any number.

    Raises:
        ValueError: on fewer than one copy.
    """
    if copies is not None and copies < 1:
        raise ValueError(f"copies={copies}: a pass takes one noisy state or more; None lets the policy choose")
    detach = not grad_through_context
    context, unconditional = policy.empty_context(len(batch.chunks[0].length_B)), None
    if image and any(chunk.guided for chunk in batch.chunks):
        unconditional = UnconditionalContexts(
            *(read_given(policy, [part(own) for own in batch.preambles]) for part in (without_text, texts_alone))
        )
    log_probs, entropies, velocities = [], [], []
    for k, chunk in enumerate(batch.chunks):
        noisy = chunk.image if image else None
        passes = [] if noisy is None else _passes_of(noisy, copies or policy.copies_at_once(noisy))
        has_text = chunk.ids_BS.shape[1] > 0
        out = PolicyOutput(context)
        if has_text or passes:
            out = policy.forward(
                context,
                chunk.ids_BS if has_text else None,
                chunk.length_B if has_text else None,
                passes[0] if passes else None,
                detach_context=detach,
            )
        if chunk.mask_BL.shape[1] and not text:
            log_probs.append(torch.zeros(chunk.mask_BL.shape, device=policy.device))
            entropies.append(log_probs[-1])
        elif chunk.mask_BL.shape[1]:
            assert out.hidden_BLC is not None
            at_N = chunk.acted_N
            hidden = out.hidden_BLC[at_N // chunk.mask_BL.shape[1], chunk.row_BL.flatten()[at_N]]
            ids = chunk.action_BL.flatten()[at_N]
            scored = token(policy.logits(hidden), temperature=batch.temperature, id=ids)
            log_probs.append(_scatter(scored.log_prob, at_N, chunk.mask_BL.shape))
            entropies.append(_scatter(scored.entropy, at_N, chunk.mask_BL.shape))
        if passes:
            others = [policy.forward(out.context, image=noisy, detach_context=detach) for noisy in passes[1:]]
            velocities.append(_all_velocities([out, *others]))
            if chunk.guided and unconditional is not None:
                velocities[-1] = _guided(policy, unconditional, chunk, velocities[-1], batch.guidance, copies, detach)
        context = out.context
        if chunk.latent_BND is not None and k + 1 < len(batch.chunks):
            context = policy.encode_image(
                context, chunk.latent_BND, chunk.grid, chunk.view_BHWC, detach=not grad_through_images
            )
            if unconditional is not None:
                unconditional = replace(unconditional, less_text=context)
    rows = len(batch.chunks[0].length_B)
    blank = torch.zeros(rows, 0, device=policy.device)
    return Scores(
        torch.cat(log_probs, dim=1) if log_probs else blank,
        torch.cat(entropies, dim=1) if entropies else blank,
        tuple(velocities),
    )


def _guided(
    policy: Policy,
    unconditional: UnconditionalContexts,
    chunk: Chunk,
    v_BKND: Tensor,
    guidance: Guidance,
    copies: int | None,
    detach: bool,
) -> Tensor:
    """Velocities with those of the chunk's guided states in the place of the policy's own."""
    assert chunk.image is not None
    at_K = torch.tensor(chunk.guided, device=v_BKND.device)
    noisy = NoisyImage(chunk.image.x_BKND[:, at_K], chunk.image.t_BK[:, at_K], chunk.grid)

    def flat(context: Context) -> Tensor:
        passes = _passes_of(noisy, copies or policy.copies_at_once(noisy))
        found = [policy.forward(context, image=part, detach_context=detach) for part in passes]
        return _all_velocities(found).flatten(0, 1)

    less_text = flat(unconditional.less_text)
    less_image = flat(unconditional.less_image) if guidance.image > 1 else None
    own = guided(v_BKND[:, at_K].flatten(0, 1), less_text, less_image, guidance)
    return v_BKND.index_copy(1, at_K, own.unflatten(0, (len(v_BKND), len(chunk.guided))))


def _passes_of(image: NoisyImage, copies: int) -> list[NoisyImage]:
    """The K noisy states in the fewest passes of at most `copies` states, as even as possible."""
    steps = image.x_BKND.shape[1]
    each = math.ceil(steps / max(1, math.ceil(steps / copies)))
    parts = zip(image.x_BKND.split(each, dim=1), image.t_BK.split(each, dim=1), strict=True)
    return [NoisyImage(x_BKND, t_BK, image.grid) for x_BKND, t_BK in parts]


def _all_velocities(passes: list[PolicyOutput]) -> Tensor:
    found = [out.velocity_BKND for out in passes if out.velocity_BKND is not None]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _scatter(values_N: Tensor, at_N: Tensor, shape: torch.Size) -> Tensor:
    """Values at flat positions of that shape; 0 elsewhere."""
    return values_N.new_zeros(shape.numel()).index_copy(0, at_N, values_N).view(shape)
