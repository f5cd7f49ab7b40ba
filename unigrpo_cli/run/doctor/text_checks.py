"""Checks of sampled text: tokens and truncation."""

from __future__ import annotations

from collections.abc import Sequence

from unigrpo_cli.episode import Episode, TextActions
from unigrpo_cli.run.doctor.findings import WARN, Outcome, judged, skipped
from unigrpo_cli.run.doctor.recorder import Item, Prefix
from unigrpo_cli.run.doctor.recording import (
    Recording,
    action_ids,
    label,
    recorded_inputs,
    scored_ids,
)


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
        compare(r.received(episode), recorded_inputs(episode), "recorded is", episode)
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


def truncation(r: Recording) -> Outcome:
    """At most half of the texts are truncated."""
    texts = [s for e in r.episodes for s in e.segments if isinstance(s, TextActions)]
    if not texts:
        return skipped("no text is sampled: sampling.think is false")
    share = sum(not text.finished for text in texts) / len(texts)
    s = r.config.sampling
    seen = f"{share:.0%} of texts are truncated at {s.round_max_new_tokens or s.max_new_tokens} tokens"
    return judged(share, 0.5, seen, WARN)
