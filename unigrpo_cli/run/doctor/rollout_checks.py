"""Checks of what was drawn: does the record say what the network saw?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.rng import derive, uniform
from unigrpo_cli.episode import Episode, GivenImage, GivenText, ImageActions, TextActions, flatten
from unigrpo_cli.run.doctor.findings import FAULT, OK, WARN, Evidence, Outcome, judged, label, skipped
from unigrpo_cli.run.doctor.probe_step import accounts_of
from unigrpo_cli.run.doctor.recorder import Item, Look, Told

EXACT = 1e-4  # two ways to compute one log-probability in fp32
ROUNDED = 0.05  # share of fp32 latents that 16 bits may hold by chance: in fp16 about 1e-4 of them
ALIKE = 0.5  # correlation of two noises; of independent ones with 768 numbers it is below 0.2
SPREAD = (0.7, 1.4)  # deviation of standard normal noise as recovered from a step


@dataclass(frozen=True)
class Claim:
    """What an episode says was fed before its last image: items, None where a picture was shown.

    `words` holds each action: how many items came before it, id, recorded log-probability, draw number.
    """

    items: list[Item | None]
    words: list[tuple[int, int, float, int]]


def claim_of(episode: Episode) -> Claim:
    items: list[Item | None] = []
    words: list[tuple[int, int, float, int]] = []
    for segment in episode.segments[:-1]:
        if isinstance(segment, GivenText):
            items += segment.ids.tolist()
        elif isinstance(segment, GivenImage):
            items += [None] * (bool(len(segment.latent)) + (segment.view is not None))
        elif isinstance(segment, ImageActions):
            items.append(None)
        else:
            items += segment.opening
            recorded = zip(segment.ids.tolist(), segment.log_prob.tolist(), strict=False)
            words += [(len(items) + k, i, p, k) for k, (i, p) in enumerate(recorded)]
            items += [*segment.ids.tolist(), *segment.closing]
    return Claim(items, words)


def texts_of(e: Evidence) -> list[tuple[Episode, TextActions]]:
    return [(k, s) for k in e.drawn.episodes for s in k.segments if isinstance(s, TextActions)]


# ----- words


def tokens(e: Evidence) -> Outcome:
    """The ids recorded, and the ids replayed, are the ids that were fed."""
    wrong, where, count = 0, "", 0

    def compare(fed: Told, other: Sequence[Item | None], whose: str, episode: Episode) -> None:
        nonlocal wrong, where, count
        count += len(fed)
        at = _first_difference(fed, other)
        if at is not None:
            wrong += 1
            where = where or f"{label(episode)}: item {at} fed {_item(fed, at)}, {whose} {_item(other, at)}"

    for episode in e.drawn.episodes:
        compare(e.painting(episode)[0].told, claim_of(episode).items, "recorded", episode)
    for account, _, rows in accounts_of(e.replayed) if e.replayed else ():
        said = {look.row: look.told for look in account.looks} or dict(enumerate(account.ends))
        for b, k in enumerate(rows):
            episode = e.drawn.episodes[k]
            compare(e.painting(episode)[0].told, said.get(b, ()), "replayed", episode)
        if account.astray:
            wrong += account.astray
            where = where or f"{account.astray} words scored from padding"
    for k, scored in _scored_words(e):
        drawn = [i for s in e.drawn.episodes[k].segments if isinstance(s, TextActions) for i in s.ids.tolist()]
        if scored != drawn[: len(scored)]:
            wrong += 1
            where = where or f"{label(e.drawn.episodes[k])}: other ids are scored than were drawn"
    return judged(wrong, 0, where or f"{count} fed ids compared")


def _first_difference(fed: Told, other: Sequence[Item | None]) -> int | None:
    for k, (a, b) in enumerate(zip(fed, other, strict=False)):
        if a != b and not (b is None and isinstance(a, str)):
            return k
    return None if len(fed) == len(other) else min(len(fed), len(other))


def _item(items: Sequence[Item | None], at: int) -> str:
    return str(items[at]) if at < len(items) else "nothing"


def stop_token(e: Evidence) -> Outcome:
    """A finished text ends in its sampled stop token, a truncated one in a forced one; and so it was fed."""
    if not e.config.sampling.think:
        return skipped("nothing is written: sampling.think is false")
    stop, wrong, where = e.policy.stop_id, 0, ""
    for episode, text in texts_of(e):
        ids, problem = text.ids.tolist(), ""
        if text.finished and (not ids or ids[-1] != stop):
            problem = "finished, but its last action is no stop token"
        elif text.finished and text.closing:
            problem = "finished, but closed a second time"
        elif not text.finished and text.closing != (stop,):
            problem = "truncated, but not closed"
        elif not text.finished and len(ids) < e.config.sampling.max_new_tokens:
            problem = f"truncated after {len(ids)} of {e.config.sampling.max_new_tokens} tokens"
        elif stop in (ids[:-1] if text.finished else ids):
            problem = "goes on after a stop token"
        elif text is episode.segments[-2] and e.painting(episode)[0].told[-1:] != (stop,):
            problem = "the network was fed no stop token before the image"
        wrong += bool(problem)
        where = where or (f"{label(episode)}: {problem}" if problem else "")
    for k, said in _scored_words(e):
        own = [i for s in e.drawn.episodes[k].segments if isinstance(s, TextActions) for i in s.ids.tolist()]
        if said != own and len(said) < len(own) and stop in own[len(said) :]:
            wrong += 1
            where = where or f"{label(e.drawn.episodes[k])}: its stop token is not scored in replay"
    return judged(wrong, 0, where or f"{len(texts_of(e))} texts end as they should")


def _scored_words(e: Evidence) -> Iterator[tuple[int, list[int]]]:
    """Of each replayed row its episode and the ids that are scored as actions."""
    for m, rows in zip(e.replayed.batches, e.replayed.rows, strict=True) if e.replayed else ():
        ids_BL = torch.cat([turn.action_BL for turn in m.batch.turns], dim=1)
        mask_BL = m.batch.actions.mask_BL
        yield from ((k, ids_BL[b][mask_BL[b]].tolist()) for b, k in enumerate(rows))


@dataclass(frozen=True)
class _Words:
    """Actions with the logits that were witnessed before them."""

    logits_MV: Tensor
    id_M: Tensor
    log_prob_M: Tensor
    uniform_M: Tensor


def _witnessed_words(e: Evidence) -> _Words | None:
    """Of first texts, for later rounds draw from seeds of their own."""
    known = {told: row for account in e.drawn.accounts for told, row in account.words.items()}
    rows, ids, log_probs, draws = [], [], [], []
    for episode in e.drawn.episodes:
        told, claim = e.painting(episode)[0].told, claim_of(episode)
        numbers = uniform(derive(episode.seed, "text"), e.config.sampling.max_new_tokens)
        first = sum(isinstance(s, TextActions) for s in episode.segments) == 1
        for before, id, log_prob, k in claim.words if first else ():
            logits = known.get(told[:before])
            if logits is not None and k < len(numbers):
                rows.append(logits)
                ids.append(id)
                log_probs.append(log_prob)
                draws.append(numbers[k])
    if not rows:
        return None
    return _Words(torch.stack(rows), torch.tensor(ids), torch.tensor(log_probs), torch.stack(draws))


def temperature(e: Evidence) -> Outcome:
    """Words are drawn, recorded and scored at the configured temperature, from the logits that were seen."""
    if not e.config.sampling.think:
        return skipped("nothing is written: sampling.think is false")
    if e.config.sampling.temperature == 0:
        return skipped("greedy words are not drawn")
    wanted, words = e.config.sampling.temperature, _witnessed_words(e)
    if words is None:
        return skipped("no distribution that was seen belongs to a recorded word")
    recorded = _log_prob(words.logits_MV, wanted, words.id_M)
    gap = float((recorded - words.log_prob_M).abs().max())
    drawn = _drawn(words.logits_MV, wanted, words.uniform_M)
    missed = float((drawn != words.id_M).float().mean())
    if e.policy.device.type != "cpu" and missed <= 0.01:
        missed = 0.0  # drawn on another device, a number on the edge of a word may fall on its other side
    replayed = _replayed_gap(e)
    worst = max(gap, missed, replayed[0])
    if worst <= EXACT:
        return Outcome(OK, worst, EXACT, f"{len(drawn)} words drawn and scored at {wanted:g}")
    found = []
    if gap > EXACT:
        found.append(f"recorded as at {_fitting(words, by_draw=False):.2g}")
    if missed:
        found.append(f"{missed:.0%} of words drawn otherwise, as at {_fitting(words, by_draw=True):.2g}")
    if replayed[0] > EXACT:
        found.append(f"replayed at {replayed[1]:g}")
    return Outcome(FAULT, worst, EXACT, f"configured {wanted:g}; {', '.join(found)}")


def _log_prob(logits: Tensor, temperature: float, id: Tensor) -> Tensor:
    """By the definition, not by `algo.text.token`, in which the fault may be."""
    return (logits / temperature).log_softmax(dim=-1).gather(-1, id.unsqueeze(-1)).squeeze(-1)


def _drawn(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """The first word at which the cumulative distribution is above `uniform`; by the definition too."""
    cumulative = (logits / temperature).log_softmax(dim=-1).exp().double().cumsum(dim=-1)
    return (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(dim=-1).clamp_max(logits.shape[-1] - 1)


def _fitting(words: _Words, by_draw: bool) -> float:
    """The temperature that explains the recorded log-probabilities best, or the drawn words."""
    few = slice(0, 256)
    best, at = -math.inf, math.nan
    for value in torch.logspace(-1, 1, 161).tolist():
        if by_draw:
            ids = _drawn(words.logits_MV[few], value, words.uniform_M[few])
            fit = float((ids == words.id_M[few]).float().mean())
        else:
            said = _log_prob(words.logits_MV[few], value, words.id_M[few])
            fit = -float((said - words.log_prob_M[few]).abs().mean())
        if fit > best:
            best, at = fit, value
    return at


def _replayed_gap(e: Evidence) -> tuple[float, float]:
    """How far replayed log-probabilities are from those of the seen logits at the configured temperature."""
    gap, used = 0.0, e.config.sampling.temperature
    for account, m, rows in accounts_of(e.replayed) if e.replayed else ():
        mask = m.batch.actions.mask_BL.cpu()
        for b, k in enumerate(rows):
            claim = claim_of(e.drawn.episodes[k])
            told = {look.row: look.told for look in account.looks}.get(b) or account.ends[b]
            scored = m.old_scores.log_prob_BL[b].cpu()[mask[b]].tolist()
            for (before, id, _, _), value in zip(claim.words, scored, strict=False):
                logits = account.words.get(told[:before])
                if logits is None:
                    continue
                own = _log_prob(logits, e.config.sampling.temperature, torch.tensor(id))
                if abs(float(own) - value) > gap:
                    gap, used = abs(float(own) - value), m.batch.temperature
    return gap, used


def truncation(e: Evidence) -> Outcome:
    texts = texts_of(e)
    if not texts:
        return skipped("nothing is written: sampling.think is false")
    share = sum(not t.finished for _, t in texts) / len(texts)
    return judged(share, 0.5, f"{share:.0%} of texts cut off at {e.config.sampling.max_new_tokens} tokens", WARN)


def duplicates(e: Evidence) -> Outcome:
    """Groups in which all texts are the same, and pairs of the same picture."""
    same_texts = sum(len({k.reasoning for k in g.episodes}) == 1 for g in e.drawn.groups)
    if not e.config.sampling.think:
        same_texts = 0
    pairs = sum(torch.equal(a.pixels, b.pixels) for g in e.drawn.groups for a, b in _pairs(g.episodes) if a is not b)
    seen = f"{same_texts} of {len(e.drawn.groups)} groups with one text, {pairs} pairs of equal pictures"
    bad = (same_texts if same_texts == len(e.drawn.groups) else 0) + pairs
    return judged(bad, 0, seen, WARN)


def _pairs(items: Sequence) -> Iterator[tuple]:
    return ((a, b) for k, a in enumerate(items) for b in items[k + 1 :])


# ----- images


def group_noise(e: Evidence) -> Outcome:
    """Start and step noises, as recovered from the seen velocities: all different, all standard normal."""
    names, noises = [], []
    for episode in e.drawn.episodes:
        image, looks = episode.images[-1], e.painting(episode)
        names.append(f"start of {label(episode)}")
        noises.append(looks[0].x_ND.flatten().float())
        for j, k in enumerate(image.window.steps):
            if k < len(looks) and looks[k].v_ND.shape == image.before[j].shape:
                p = _density(image, looks[k].v_ND, image.before[j], k)
                names.append(f"step {k} of {label(episode)}")
                noises.append(((image.after[j] - p.mean) / p.std).flatten().float())
    if len(noises) < 2:
        return skipped("one episode has nothing to be compared with")
    deviation = torch.stack([n.std() for n in noises])
    common = min(len(n) for n in noises)  # edits may differ in size
    matrix = torch.nn.functional.normalize(torch.stack([n[:common] for n in noises]), dim=1)
    likeness = (matrix @ matrix.T).fill_diagonal_(0).abs()
    worst = int(likeness.argmax())
    a, b = divmod(worst, len(noises))
    value = float(likeness.max())
    if value > ALIKE:
        return Outcome(FAULT, value, ALIKE, f"{names[a]} is that of {names[b]} (correlation {value:.2f})")
    low, high = float(deviation.min()), float(deviation.max())
    if not (SPREAD[0] <= low and high <= SPREAD[1]):
        return Outcome(FAULT, high, SPREAD[1], f"noises have deviations from {low:.2f} to {high:.2f}, not 1")
    return Outcome(OK, value, ALIKE, f"largest correlation of {len(noises)} noises")


def _density(image: ImageActions, v_ND: Tensor, x_ND: Tensor, k: int) -> flow.Transition:
    t = image.times
    return flow.transition(image.sde, x_ND, v_ND.float(), t[k], t[k + 1], noise_level=image.noise_level, t_second=t[1])


def window(e: Evidence) -> Outcome:
    """One window for all, the one of this step, and noise in its steps and nowhere else."""
    s = e.config.sampling
    claimed = {(i.window.start, i.window.size) for k in e.drawn.episodes for i in k.images}
    if len(claimed) > 1:
        shown = ", ".join(str(w) for w in sorted(claimed))
        return Outcome(FAULT, len(claimed), 1, f"{len(claimed)} windows in one rollout (start, size): {shown}")
    start, size = claimed.pop()
    lo, hi = (0, s.steps - 1) if s.window == "all" else s.window_range
    wanted = s.steps - 1 if s.window == "all" else s.window_size
    if not (lo <= start and start + size <= hi and size == wanted):
        return Outcome(FAULT, 1, 1, f"steps {start} to {start + size - 1}, configured {wanted} within [{lo}, {hi})")
    for episode in e.drawn.episodes:
        noisy = _noisy_steps(episode.images[-1], e.painting(episode))
        if noisy != set(range(start, start + size)):
            seen = f"{label(episode)} has noise at steps {sorted(noisy)}, its window is {start} to {start + size - 1}"
            return Outcome(FAULT, 1, 0, seen)
    return Outcome(OK, 1, 1, f"steps {start} to {start + size - 1} in all {len(e.drawn.episodes)} episodes")


def _noisy_steps(image: ImageActions, looks: Sequence[Look]) -> set[int]:
    """The steps that did not go where Euler's would have."""
    ends = [look.x_ND for look in looks[1:]] + [image.latent]
    noisy = set()
    for k, (look, end) in enumerate(zip(looks, ends, strict=True)):
        if k + 1 < len(image.times):
            straight = flow.euler(look.x_ND.float(), look.v_ND.float(), image.times[k], image.times[k + 1])
            std = _density(image, look.v_ND, look.x_ND.float(), k).std.mean()
            if float((end - straight).abs().mean()) > 0.1 * float(std) + 1e-4:
                noisy.add(k)
    return noisy


def schedule(e: Evidence) -> Outcome:
    """The network saw the recorded grid, in rollout and in replay; a step's record is that of its velocity."""
    s = e.config.sampling
    u = torch.linspace(1, 0, s.steps + 1, dtype=torch.float64)
    wanted = s.shift * u / (1 + (s.shift - 1) * u)
    for episode in e.drawn.episodes:
        image, looks = episode.images[-1], e.painting(episode)
        seen = torch.tensor([look.t for look in looks], dtype=torch.float64)
        if len(seen) != s.steps:
            return Outcome(FAULT, len(seen), s.steps, f"{len(seen)} network calls for sampling.steps={s.steps}")
        for what, times, whole in (("the network saw", seen, wanted[:-1]), ("the record has", image.times, wanted)):
            if len(times) != len(whole):
                return Outcome(FAULT, len(times), len(whole), f"{what} {len(times)} times, the grid has {len(whole)}")
            gap = float((times.double() - whole).abs().max())
            if gap > 1e-6:
                at = int((times.double() - whole).abs().argmax())
                told = f"{what} t = {float(times[at]):.4f} at step {at}, the grid has {float(whole[at]):.4f}"
                return Outcome(FAULT, gap, 1e-6, told)
    for episode, recorded, replayed in _replayed_times(e):
        gap = float((recorded - replayed).abs().max()) if len(recorded) == len(replayed) else math.inf
        if gap > 1e-6:
            told = f"{label(episode)}: drawn at t = {_times(recorded)}, replayed at {_times(replayed)}"
            return Outcome(FAULT, gap, 1e-6, told)
    gap, where = _record_gap(e)
    limit = EXACT
    if gap > limit:
        return Outcome(FAULT, gap, limit, f"{where}: recorded log-probability is not that of the velocity seen there")
    return Outcome(OK, gap, limit, f"{s.steps} calls from 1 to 0, steps scored as seen")


def _replayed_times(e: Evidence) -> Iterator[tuple[Episode, Tensor, Tensor]]:
    """Of each replayed episode the times of its stochastic steps as drawn and as replayed: befores, then afters."""
    for account, m, rows in accounts_of(e.replayed) if e.replayed else ():
        for b, k in enumerate(rows):
            episode = e.drawn.episodes[k]
            image, steps = episode.images[-1], m.batch.actions.images[-1]
            own = list(image.window.steps)
            after = image.times[[k + 1 for k in own]]
            looks = [look.t for look in account.looks if look.row == b][-len(own) :]
            befores = torch.tensor(looks) if looks else steps.t_BK[b].cpu()
            yield episode, torch.cat([image.times[own], after]), torch.cat([befores, steps.t_next_BK[b].cpu()])


def _times(times: Tensor) -> str:
    return " ".join(f"{t:.4f}" for t in times[: len(times) // 2].tolist())


def _record_gap(e: Evidence) -> tuple[float, str]:
    """Largest difference of a recorded step's log-probability and that by the velocity seen at that step."""
    gap, where = 0.0, ""
    for episode in e.drawn.episodes:
        image, looks = episode.images[-1], e.painting(episode)
        for j, k in enumerate(image.window.steps):
            if not _configured(e, image):
                return math.inf, f"{label(episode)}: kernel {image.sde}, noise {image.noise_level:g}"
            p = _density(image, looks[k].v_ND, image.before[j], k)
            own = float(flow.log_prob(image.sde, image.after[j], p) - image.log_prob[j])
            if not abs(own) <= gap:
                gap, where = abs(own), f"step {k} of {label(episode)}"
    return gap, where


def _configured(e: Evidence, image: ImageActions) -> bool:
    s = e.config.sampling
    return image.sde == s.sde and image.noise_level == s.noise_level


def latents(e: Evidence) -> Outcome:
    """Latents are fp32 and use it, are finite, join, and are the ones that were fed, in rollout and in replay."""
    worst, where = 0.0, ""
    for episode in e.drawn.episodes:
        image, looks = episode.images[-1], e.painting(episode)
        for name, x in (("before", image.before), ("after", image.after), ("fed", looks[-1].x_ND)):
            if x.dtype != torch.float32:
                return Outcome(FAULT, None, None, f"{label(episode)}: {name} is {x.dtype}")
            if not x.isfinite().all():
                return Outcome(FAULT, None, None, f"{label(episode)}: {name} is not finite")
            share = max(float((x.to(d).float() == x).float().mean()) for d in (torch.bfloat16, torch.float16))
            if share > worst:
                worst, where = share, f"{name} of {label(episode)}"
        if not torch.equal(image.after[:-1], image.before[1:]):
            return Outcome(FAULT, None, None, f"{label(episode)}: a step does not begin where the last one ended")
        fed = torch.stack([looks[k].x_ND for k in image.window.steps if k < len(looks)])
        if worst <= ROUNDED and not (fed.shape == image.before.shape and torch.equal(fed, image.before)):
            return Outcome(FAULT, None, None, f"{label(episode)}: the network was fed other latents than are recorded")
    if worst > ROUNDED:
        return Outcome(FAULT, worst, ROUNDED, f"{worst:.0%} of numbers fit 16 bits ({where}): they were rounded")
    for account, m, rows in accounts_of(e.replayed) if e.replayed else ():
        for b, k in enumerate(rows):
            image, steps = e.drawn.episodes[k].images[-1], m.batch.actions.images[-1]
            for name, x, y in (("before", steps.x_BKND, image.before), ("after", steps.x_next_BKND, image.after)):
                if not torch.equal(x[b].cpu(), y):
                    seen = f"{label(e.drawn.episodes[k])}: replay scores other latents ({name}) than are recorded"
                    return Outcome(FAULT, None, None, seen)
            own = [look.x_ND for look in account.looks if look.row == b][-len(image.before) :]
            if own and not torch.equal(torch.stack(own), image.before):
                return Outcome(FAULT, None, None, f"{label(e.drawn.episodes[k])}: replay is fed other latents")
    return Outcome(OK, worst, ROUNDED, "share of numbers that 16 bits could hold")


def repeats(e: Evidence) -> Outcome:
    """The same seed draws the same episodes, another one others."""
    if e.drawn.again is None or e.drawn.other is None:
        return skipped("the short examination draws once")
    own = e.drawn.episodes
    gap = max(_unlike(a, b) for a, b in zip(own, flatten(e.drawn.again), strict=True))
    limit = 0.0 if e.policy.device.type == "cpu" else 1e-3
    if gap > limit:
        return Outcome(FAULT, gap, limit, "the same seed draws other episodes")
    if min(_unlike(a, b) for a, b in zip(own, flatten(e.drawn.other), strict=True)) <= limit:
        return Outcome(FAULT, 0.0, limit, "another seed draws the same episodes")
    return Outcome(OK, gap, limit, "same seed, same episodes; other seed, others")


def _unlike(a: Episode, b: Episode) -> float:
    words = [[s.ids.tolist() for s in k.segments if isinstance(s, TextActions)] for k in (a, b)]
    if words[0] != words[1]:
        return math.inf
    return float((a.images[-1].latent - b.images[-1].latent).abs().max())
