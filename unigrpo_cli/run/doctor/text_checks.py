"""Checks of sampled text: tokens, stop tokens, temperature, truncation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unigrpo_cli.algo.rng import derive, uniform
from unigrpo_cli.episode import Episode, TextActions
from unigrpo_cli.evaluate import train_sampling
from unigrpo_cli.run.doctor.findings import OK, WARN, Outcome, fault, judged, skipped
from unigrpo_cli.run.doctor.recorder import Item, Prefix
from unigrpo_cli.run.doctor.recording import (
    RecordedText,
    Recording,
    action_ids,
    label,
    recorded_inputs,
    scored_ids,
)

EXACT = 1e-4  # two ways to compute one log-probability in fp32
NO_TEXT = "no text is sampled: sampling.think is false"


def texts_of(r: Recording) -> list[tuple[Episode, TextActions]]:
    return [(e, s) for e in r.episodes for s in e.segments if isinstance(s, TextActions)]


def tokens(r: Recording) -> Outcome:
    """The recorded and the replayed ids are those that the network received."""
    wrong: list[str] = []
    count = 0

    def compare(received: Prefix, other: Sequence[Item], which: str, episode: Episode) -> None:
        nonlocal count
        count += len(received)
        at = _first_difference(received, other)
        if at is not None:
            seen = f"the network received {_item(received, at)}, {which} {_item(other, at)}"
            wrong.append(f"{label(episode)}: item {at}: {seen}")

    for episode in r.episodes:
        compare(r.received(episode), recorded_inputs(episode).items, "recorded is", episode)
    for trace, m, b, episode in r.replayed_rows():
        replayed = [call.prefix for call in trace.calls if call.row == b] + list(trace.prefixes[b : b + 1])
        if replayed:
            compare(r.received(episode), max(replayed, key=len), "replayed is", episode)
        scored = scored_ids(m, b)
        if scored != action_ids(episode)[: len(scored)]:
            wrong.append(f"{label(episode)}: replay scores other ids than were sampled")
    return judged(len(wrong), 0, wrong[0] if wrong else f"{count} ids compared")


def _first_difference(received: Prefix, other: Sequence[Item]) -> int | None:
    for k, (a, b) in enumerate(zip(received, other, strict=False)):
        if a != b:
            return k
    return None if len(received) == len(other) else min(len(received), len(other))


def _item(items: Sequence[Item], at: int) -> str:
    if at >= len(items):
        return "nothing"
    return f"the image {items[at]}" if isinstance(items[at], str) else str(items[at])


def stop_token(r: Recording) -> Outcome:
    """A finished text ends in its sampled stop token, a truncated text in a forced one, as the network received it."""
    if not r.config.sampling.think:
        return skipped(NO_TEXT)
    found = [(e, _stop_problem(r, e, t)) for e in r.episodes for t in recorded_inputs(e, budget_of(r)).texts]
    wrong = [f"{label(episode)}: {problem}" for episode, problem in found if problem]
    for _, m, b, episode in r.replayed_rows():
        scored, sampled = scored_ids(m, b), action_ids(episode)
        if len(scored) < len(sampled) and r.policy.stop_id in sampled[len(scored) :]:
            wrong.append(f"{label(episode)}: its stop token is not scored in replay")
    return judged(len(wrong), 0, wrong[0] if wrong else f"{len(found)} texts end correctly")


def budget_of(r: Recording) -> Callable[[int], int]:
    """The most tokens of a text, by its round."""
    return train_sampling(r.config).budget


def _stop_problem(r: Recording, episode: Episode, recorded: RecordedText) -> str:
    text, longest = recorded.text, recorded.budget
    stop, ids = r.policy.stop_id, text.ids.tolist()
    if text.finished and (not ids or ids[-1] != stop):
        return "finished, but its last action is no stop token"
    if text.finished and text.closing:
        return "finished, but closed a second time"
    if not text.finished and text.closing != (stop,):
        return "truncated, but not closed"
    if not text.finished and len(ids) < longest:
        return f"truncated after {len(ids)} of {longest} tokens"
    if stop in (ids[:-1] if text.finished else ids):
        return "continues after a stop token"
    if any(text is s for s in episode.segments[-2:]) and r.received(episode)[-1:] != (stop,):
        return "the network received no stop token before the image"
    return ""


def temperature(r: Recording) -> Outcome:
    """Tokens are sampled, recorded and replayed at the configured temperature."""
    wanted = r.config.sampling.temperature
    if not r.config.sampling.think:
        return skipped(NO_TEXT)
    if wanted == 0:
        return skipped("greedy sampling has no temperature")
    other = sorted({m.batch.temperature for _, m, _, _ in r.replayed_rows()} - {wanted})
    if other:
        return fault(f"the configured temperature is {wanted:g}, replay uses {other[0]:g}", other[0], wanted)
    known = {prefix: logits for trace in r.rollout.traces for prefix, logits in trace.logits.items()}
    count, missed, gap = 0, 0, 0.0
    for episode in r.episodes:
        prefix = r.received(episode)
        for said in recorded_inputs(episode, budget_of(r)).texts:
            draws = uniform(derive(said.seed, "text"), said.budget)
            actions = zip(said.text.ids.tolist(), said.text.log_prob.tolist(), draws, strict=False)
            for k, (id, recorded, draw) in enumerate(actions):
                logits = known.get(prefix[: said.before + k])
                if logits is not None:
                    # By definition, not by `algo.text.token`, which may be at fault.
                    log_prob = (logits / wanted).log_softmax(dim=-1)
                    cumulative = log_prob.exp().double().cumsum(dim=-1)
                    sampled = int((cumulative <= draw * cumulative[-1]).sum().clamp_max(len(logits) - 1))
                    count, missed = count + 1, missed + (sampled != id)
                    gap = max(gap, abs(float(log_prob[id]) - recorded))
    if not count:
        return skipped("no recorded logits belong to a sampled token")
    share = missed / count
    if r.policy.device.type != "cpu" and share <= 0.01:
        share = 0.0  # on another device a random number at the edge of a token may fall on its other side
    if max(gap, share) <= EXACT:
        return Outcome(OK, gap, EXACT, f"{count} tokens sampled and recorded at {wanted:g}")
    problems = [f"recorded log-probabilities are off by up to {gap:.2g}"] if gap > EXACT else []
    problems += [f"{share:.0%} of tokens would be sampled differently"] if share else []
    return fault(f"at the configured temperature {wanted:g}, {' and '.join(problems)}", max(gap, share), EXACT)


def truncation(r: Recording) -> Outcome:
    """At most half of the texts are truncated."""
    texts = texts_of(r)
    if not texts:
        return skipped(NO_TEXT)
    share = sum(not text.finished for _, text in texts) / len(texts)
    s = r.config.sampling
    seen = f"{share:.0%} of texts are truncated at {s.round_max_new_tokens or s.max_new_tokens} tokens"
    return judged(share, 0.5, seen, WARN)
