"""Checks of the first update: advantages, gradients, the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice

from unigrpo_cli.algo.credit import IMAGE
from unigrpo_cli.episode import Episode, ImageActions, TextActions
from unigrpo_cli.run.doctor.credit_checks import credited
from unigrpo_cli.run.doctor.findings import OK, WARN, Outcome, fault, judged, skipped
from unigrpo_cli.run.doctor.probe_step import difference
from unigrpo_cli.run.doctor.recording import Recording, label
from unigrpo_cli.run.doctor.replay_checks import NO_REPLAY, no_update
from unigrpo_cli.training.advantages import credit_of
from unigrpo_cli.training.micro_batch import MicroBatch

RESCORED = 1e-4  # a network's scores change this much with the batch they are in
SAME = {True: 1e-2, False: 1e-4}  # a reference elsewhere in memory may round differently: low precision, fp32


def advantages(r: Recording) -> Outcome:
    """Each action is weighted by the advantage of its own segment, and better episodes have larger ones."""
    if r.config.advantage.shuffle:
        return Outcome(WARN, None, None, "advantage.shuffle is on, a control in which nothing can be learned")
    by_episode = {id(e): a.tolist() for e, a in zip(r.episodes, r.scores.advantage_BS, strict=True)}
    for _, m, b, episode in r.replayed_rows():
        for s, used_N in enumerate(_used(m, b, episode)):
            own = by_episode[id(episode)][s]
            used = max(used_N, key=lambda a: abs(a - own), default=own)
            if used != own:
                seen = f"segment {s} of {label(episode)} is replayed with advantage {used:+.3f}, its own is {own:+.3f}"
                return fault(seen, abs(used - own), 0.0)
    return credited(r) or _order(r)


def _used(m: MicroBatch, row: int, episode: Episode) -> list[list[float]]:
    """The advantages of the actions of each acted segment of an episode, as the loss gets them."""
    texts = iter(m.advantages.text_BL[row][m.batch.actions.mask_BL[row]].tolist())
    images = iter(m.advantages.images)
    acted = [s for s in episode.segments if isinstance(s, TextActions | ImageActions)]
    return [
        next(images)[row].tolist() if isinstance(s, ImageActions) else list(islice(texts, len(s.ids))) for s in acted
    ]


def _order(r: Recording) -> Outcome:
    """Of two episodes of a group, the one with better rewards has the larger advantage."""
    kinds, compared, wrong = r.scores.kind_BS.tolist(), 0, []
    last = [max(s for s, kind in enumerate(own) if kind == IMAGE) for own in kinds]
    advantage_B = [own[s] for own, s in zip(r.scores.advantage_BS.tolist(), last, strict=True)]
    for a, b in _better(r):
        if kinds[a] != kinds[b]:  # pictures of different rounds are not compared
            continue
        compared += 1
        # Clamping may make unequal episodes equal, but not both 0.
        if not advantage_B[a] >= advantage_B[b] or advantage_B[a] == advantage_B[b] == 0.0:
            wrong.append(f"{label(r.episodes[a])} is better than {label(r.episodes[b])} but has the smaller advantage")
    if not compared:
        return skipped("no two episodes of a group differ in reward")
    seen = f"{len(wrong)} of {compared} pairs: {wrong[0]}" if wrong else f"{compared} pairs in order"
    if wrong and r.rewards.plugins.manager.hook.unigrpo_combine_rewards.get_hookimpls():
        return Outcome(WARN, len(wrong), 0, f"a plugin combines the rewards; {seen}")
    return judged(len(wrong), 0, seen)


def _better(r: Recording) -> Iterator[tuple[int, int]]:
    """Pairs of a group where each weighted reward of the first is clearly larger than or equal to the second's.

    Scores of episodes scored one by one are used where there are any.
    """
    columns, resolutions = [], []
    by_segment = {own.alias for own in r.rewards.rewards if own.segments and credit_of(r.config) == "reward-to-go"}
    for name, weight in r.rewards.weights.items():
        if weight and name not in by_segment:  # those are compared segment by segment
            scores = r.scores.alone.get(name) or r.scores.scored[name].scores.tolist()
            columns.append([weight * s for s in scores])
            resolutions.append(abs(weight) * _resolution(scores, r.scores.again.get(name)))
    members = r.config.train.group_size
    for a in range(len(r.episodes)):
        for b in range(a - a % members, a - a % members + members):
            gaps = [own[a] - own[b] for own in columns]
            larger = [gap > least for gap, least in zip(gaps, resolutions, strict=True)]
            if any(larger) and all(more or gap == 0 for more, gap in zip(larger, gaps, strict=True)):
                yield a, b


def _resolution(scores: list[float], again: list[float] | None) -> float:
    """The smallest difference that counts: rounding, or four deviations of a reward's own noise."""
    known = [abs(s) for s in scores if math.isfinite(s)]
    squares = [(a - b) ** 2 for a, b in zip(scores, again or [], strict=False) if math.isfinite(a - b)]
    noise = math.sqrt(sum(squares) / len(squares) / 2) if squares else 0.0
    return max(RESCORED * max([1.0, *known]), 4 * noise)


def gradients(r: Recording) -> Outcome:
    """Every trained expert gets a gradient in each of its layers."""
    if "gradients" in r.trouble:
        return fault(r.trouble["gradients"])
    if r.replay is None:
        return skipped(NO_REPLAY)
    names = {id(p): name for name, p in r.policy.named_parameters()}
    reached = {
        "text": r.trains_text or (r.trains_image and r.config.objective.grad_through_context),
        "image": r.trains_image,
    }
    largest: dict[str, float] = {}
    for expert, parameters in r.policy.trainable().items():
        own = {id(p) for p in parameters}
        if r.config.train.experts not in ("both", expert):
            continue
        if not own:
            return fault(f"the {expert} expert has no trainable weights", 0.0, 0.0)
        if not reached[expert]:
            continue
        values = {names[i]: r.replay.gradients.get(names[i]) or 0.0 for i in own}
        largest[expert] = max(values.values())
        if not largest[expert] > 0:
            return fault(f"the {expert} expert gets no gradient", 0.0, 0.0)
        if empty := _layers_without(values):
            return fault(f"layers {empty} of the {expert} expert get no gradient", 0.0, 0.0)
    if not largest:
        return skipped("the objective trains no expert")
    seen = ", ".join(f"{expert} up to {value:.2g}" for expert, value in largest.items())
    idle = sum(not value for value in r.replay.gradients.values())
    return Outcome(OK, min(largest.values()), 0.0, f"{seen}; {idle} of {len(r.replay.gradients)} tensors have none")


def _layers_without(values: dict[str, float]) -> str:
    """Layers in which no tensor has a gradient."""
    layers: dict[int, float] = {}
    for name, value in values.items():
        found = re.search(r"\.layers\.(\d+)\.", name)
        if found:
            layers[int(found[1])] = max(value, layers.get(int(found[1]), 0.0))
    return ", ".join(str(k) for k, value in sorted(layers.items()) if not value > 0)


def reference(r: Recording) -> Outcome:
    """The reference is the starting model: it stands still while the policy moves, and the penalty pulls back."""
    if r.replay is None:
        return skipped(NO_REPLAY)
    first, limit = r.replay.micro_batches[0], SAME[r.low_precision]
    if first.reference is None:
        return skipped("the objective has no penalty and no objective.text_kl")
    start = difference(first.reference, first.old_scores, r.config.objective.text_kl > 0)
    fresh = _at_reference(r)
    if fresh and not start <= limit:
        return fault("the reference differs from the policy before any update", start, limit)
    if not fresh and not start > 0:
        return fault("training starts from changed weights, but the reference equals them", start, limit)
    if r.trial is None:
        return Outcome(WARN if "update" in r.trouble else OK, start, limit, f"difference at the start; {no_update(r)}")
    t = r.trial
    if t.reference_moved > (0.0 if r.policy.device.type == "cpu" else SAME[False]):
        return fault("an update of the policy moved the reference", t.reference_moved, 0.0)
    if t.distance == start or (fresh and t.distance < start):
        return fault("an update did not move the policy away from the reference", t.distance, start)
    if not t.pull > 0:
        return fault("away from the reference, the penalty has no gradient", t.pull, 0.0)
    if fresh and t.outward is not None and t.outward < 0:
        return fault("the penalty drives the policy away from the reference", t.outward, 0.0)
    if t.step.metrics.get(f"image/first_{r.config.objective.penalty}") == 0:
        return fault("in the step after an update the penalty is exactly 0", 0.0, 0.0)
    return Outcome(OK, t.reference_moved, 0.0, f"it stood still while the policy moved {t.distance:.2g} away")


def _at_reference(r: Recording) -> bool:
    """Whether the policy still equals its reference: a frozen copy just made, or adapters without effect."""
    if r.config.train.finetune == "full":
        return r.state.step == 0
    return r.policy.adapter is None or r.policy.adapter.idle
