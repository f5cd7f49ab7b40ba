"""Checks of replay and of the first update: ratios, drift, gradients, advantages, the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.objective import step_densities
from unigrpo_cli.run.doctor.findings import FAULT, OK, WARN, Evidence, Outcome, judged, label, skipped
from unigrpo_cli.run.doctor.probe_step import difference
from unigrpo_cli.train import MicroBatch

RESCORED = 1e-4  # a network's scores move this much with the batch they are in
DRIFT = {True: (0.5, 0.1), False: (1e-3, 1e-3)}  # largest text and image drift, by whether it computes below fp32
SAME = {True: 1e-2, False: 1e-4}  # a reference in other memory may round another way


def replayable(e: Evidence) -> Outcome:
    """Recorded episodes can be stacked and scored."""
    if "replay" in e.trouble:
        return Outcome(FAULT, None, None, e.trouble["replay"])
    assert e.replayed is not None
    count = sum(len(m.advantage_B) for m in e.replayed.batches)
    whole = sorted(k for rows in e.replayed.rows for k in rows) == list(range(len(e.drawn.episodes)))
    seen = f"{count} episodes in {len(e.replayed.batches)} micro-batches"
    return Outcome(OK if whole else FAULT, None, None, seen if whole else f"{seen}, not each episode once")


def text_ratio(e: Evidence) -> Outcome:
    return _ratio(e, "text", e.writes, "no words are trained")


def image_ratio(e: Evidence) -> Outcome:
    return _ratio(e, "image", e.paints, "no denoising steps are trained")


def _ratio(e: Evidence, kind: str, trained: bool, otherwise: str) -> Outcome:
    """Log-ratio before an update, exactly 0: at first, and again after the weights have moved."""
    if not trained or e.replayed is None:
        return skipped(otherwise if not trained else "replay failed")
    first = max((t.get(f"{kind}/max_abs_log_ratio", 0.0) for t in e.replayed.terms), default=math.nan)
    if e.moved is None:
        seen = f"before any update; {_no_update(e)}"
        return Outcome(WARN, first, 0.0, seen) if "update" in e.trouble and first == 0 else judged(first, 0.0, seen)
    later = e.moved.step.metrics.get(f"{kind}/first_max_abs_log_ratio", math.nan)
    seen = (
        "before an update, and after one" if later == 0 == first else f"at first {first:.3g}, a step later {later:.3g}"
    )
    return judged(max(first, later, key=lambda x: math.inf if math.isnan(x) else x), 0.0, seen)


def text_drift(e: Evidence) -> Outcome:
    if not e.writes or e.replayed is None:
        return skipped("no words are trained" if not e.writes else "replay failed")
    found = []
    for m, rows in zip(e.replayed.batches, e.replayed.rows, strict=True):
        mask = m.batch.actions.mask_BL
        gaps = torch.where(mask, (m.old_scores.log_prob_BL - m.batch.behaviour_text_BL).abs(), 0.0)
        for b, k in enumerate(rows):
            own = gaps[b][mask[b]].tolist()
            found += [(gap, f"word {j} of {label(e.drawn.episodes[k])}") for j, gap in enumerate(own)]
    return _drift(e, found, e.config.doctor.text_drift or DRIFT[e.coarse][0])


def image_drift(e: Evidence) -> Outcome:
    if not e.paints or e.replayed is None:
        return skipped("no denoising steps are trained" if not e.paints else "replay failed")
    found = []
    for m, rows in zip(e.replayed.batches, e.replayed.rows, strict=True):
        pairs = zip(m.batch.actions.images, m.old_scores.velocities, strict=True)
        scores = [flow.log_prob(s.sde, s.x_next_BKND, step_densities(s, v)) for s, v in pairs]
        gaps = (torch.cat(scores, dim=1) - m.batch.behaviour_image_BK).abs()
        for b, k in enumerate(rows):
            steps = [s for i in e.drawn.episodes[k].images for s in i.window.steps]
            found += [
                (gap, f"step {at} of {label(e.drawn.episodes[k])}")
                for at, gap in zip(steps, gaps[b].tolist(), strict=True)
            ]
    return _drift(e, found, e.config.doctor.image_drift or DRIFT[e.coarse][1])


def _drift(e: Evidence, found: list[tuple[float, str]], limit: float) -> Outcome:
    """The largest of |replayed - recorded| with its place, and the mean."""
    if not found:
        return skipped("nothing was drawn")
    worst, where = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    mean = sum(gap for gap, _ in found) / len(found)
    rounding = e.coarse and mean <= limit / 10  # of thousands of words in bf16, a few are far off
    return judged(worst, limit, f"largest at {where}, mean {mean:.2g}", WARN if rounding else FAULT)


# ----- advantages


EVEN = 0.05  # how far weights of actions may be apart, relative: the same but for rounding


def advantages(e: Evidence) -> Outcome:
    """Each row is weighed by its own episode's advantage, and better episodes have larger ones."""
    if e.config.advantage.shuffle:
        return Outcome(WARN, None, None, "advantage.shuffle is on: a control, nothing can be learnt")
    for m, rows in _rows(e):
        for b, k in enumerate(rows):
            own, wanted = float(m.advantage_B[b]), float(e.judged.advantage_B[k])
            if own != wanted:
                seen = f"{label(e.drawn.episodes[k])} is replayed with {own:+.3f}, its own is {wanted:+.3f}"
                return Outcome(FAULT, abs(own - wanted), 0.0, seen)
    uneven = _uneven(e)
    if uneven is not None:
        return uneven
    compared, wrong, where = 0, 0, ""
    for a, b in _better(e):
        compared += 1
        if not e.judged.advantage_B[a] >= e.judged.advantage_B[b] or _equal_but_zero(e, a, b):
            wrong += 1
            names = label(e.drawn.episodes[a]), label(e.drawn.episodes[b])
            where = where or f"{names[0]} is better than {names[1]} and has the smaller advantage"
    if not compared:
        return skipped("no two episodes of a group differ in reward")
    if wrong and e.rewards.plugins.manager.hook.unigrpo_combine_rewards.get_hookimpls():
        return Outcome(WARN, wrong, 0, f"{wrong} of {compared} pairs, as a plugin combines rewards: {where}")
    return judged(wrong, 0, f"{wrong} of {compared} pairs: {where}" if wrong else f"{compared} pairs in order")


def _rows(e: Evidence) -> Iterator[tuple[MicroBatch, list[int]]]:
    if e.replayed is not None:
        yield from zip(e.replayed.batches, e.replayed.rows, strict=True)


def _uneven(e: Evidence) -> Outcome | None:
    """An action that the loss does not weigh by its own episode's advantage, as it weighs the others."""
    if e.replayed is None:
        return None
    for pushes, rows in zip(e.replayed.pushes, e.replayed.rows, strict=False):
        # All words weigh the same; a step weighs by its noise, so it is compared with that step of other rows.
        columns = [("word", pushes.text_BL)] if e.writes else []
        columns += [("step", pushes.image_BK[:, [k]]) for k in range(pushes.image_BK.shape[1])] if e.paints else []
        for what, weight in columns:
            known = weight[weight.isfinite()]
            usual = float(known.abs().median()) if len(known) else 0.0
            off = torch.nan_to_num((weight - usual).abs(), nan=0.0)
            if off.numel() and float(off.max()) > EVEN * usual:
                b = int(off.max(dim=1).values.argmax())
                value = float(weight[b][off[b].argmax()]) / usual if usual else 0.0
                seen = (
                    f"a {what} of {label(e.drawn.episodes[rows[b]])} is pushed by {value:+.2f} times its own "
                    "advantage in the loss"
                )
                return Outcome(FAULT, value, 1.0, seen)
            if len(known) and not usual:
                return Outcome(FAULT, 0.0, 1.0, f"no {what} is pushed by its advantage in the loss")
    return None


def _equal_but_zero(e: Evidence, a: int, b: int) -> bool:
    """Equal advantages of unequal rewards: clamping may do that, but not to nothing."""
    return float(e.judged.advantage_B[a]) == float(e.judged.advantage_B[b]) == 0.0


def _better(e: Evidence) -> Iterator[tuple[int, int]]:
    """Pairs within a group of which the first has each weighted reward clearly larger, or the same.

    By the rewards of episodes scored one by one, where that could be asked. Rewards that abstain decide nothing.
    """
    columns, least = [], []
    for name, weight in e.rewards.weights.items():
        if weight:
            scores = e.judged.alone.get(name) or e.judged.scored[name].scores.tolist()
            columns.append([weight * s for s in scores])
            least.append(abs(weight) * _resolution(scores, e.judged.again.get(name)))
    members = e.config.train.group_size
    for k in range(len(e.drawn.episodes)):
        for j in range(k - k % members, k - k % members + members):
            gaps = [own[k] - own[j] for own in columns]
            larger = [g > s for g, s in zip(gaps, least, strict=True)]
            if any(larger) and all(more or g == 0 for more, g in zip(larger, gaps, strict=True)):
                yield k, j


def _resolution(scores: list[float], again: list[float] | None) -> float:
    """The least difference that counts: rounding, or four deviations of a reward's own noise."""
    known = [abs(s) for s in scores if math.isfinite(s)]
    squares = [(a - b) ** 2 for a, b in zip(scores, again or [], strict=False) if math.isfinite(a - b)]
    noise = math.sqrt(sum(squares) / len(squares) / 2) if squares else 0.0
    return max(RESCORED * max([1.0, *known]), 4 * noise)


# ----- gradients and reference


def gradients(e: Evidence) -> Outcome:
    """Every expert that is to be trained gets a gradient, in each of its layers."""
    if "gradients" in e.trouble:
        return Outcome(FAULT, None, None, e.trouble["gradients"])
    if e.replayed is None:
        return skipped("replay failed")
    trained = {expert: {id(p) for p in own} for expert, own in e.policy.trainable().items()}
    held = {id(p) for group in e.state.optimizer.param_groups for p in group["params"]}
    reached = {
        "text": e.writes or (e.paints and e.config.objective.grad_through_context),
        "image": e.paints,
    }
    by_id = {id(p): name for name, p in e.policy.named_parameters()}
    largest = {}
    for expert, own in trained.items():
        if e.config.train.experts not in ("both", expert):
            continue
        if not own:
            return Outcome(FAULT, 0.0, 0.0, f"the {expert} expert has nothing that is trained")
        if not own <= held:
            return Outcome(FAULT, 0.0, 0.0, f"the optimizer lacks {len(own - held)} tensors of the {expert} expert")
        rates = {g["full_lr"] for g in e.state.optimizer.param_groups if own & {id(p) for p in g["params"]}}
        wanted = e.config.train.lr_text if expert == "text" else e.config.train.lr_image
        if rates != {wanted}:
            found = ", ".join(f"{rate:g}" for rate in sorted(rates))
            seen = f"the optimizer's rate for the {expert} expert is {found}, train.lr_{expert} is {wanted:g}"
            return Outcome(FAULT, max(rates), wanted, seen)
        if not reached[expert]:
            continue
        lost = _lost_on_the_way(e, expert)
        if lost:
            return Outcome(FAULT, 0.0, 0.0, lost)
        values = {by_id[i]: e.replayed.gradients.get(by_id[i]) or 0.0 for i in own}
        largest[expert] = max(values.values())
        if not largest[expert] > 0:
            return Outcome(FAULT, largest[expert], 0.0, f"no gradient reaches the {expert} expert")
        empty = _empty_layers(values)
        if empty:
            return Outcome(FAULT, 0.0, 0.0, f"no gradient reaches layers {empty} of the {expert} expert")
    if not largest:
        return skipped("the objective gives neither expert a gradient")
    seen = ", ".join(f"{expert} up to {value:.2g}" for expert, value in largest.items())
    idle = sum(not value for value in e.replayed.gradients.values())
    return Outcome(OK, min(largest.values()), 0.0, f"{seen}; {idle} of {len(e.replayed.gradients)} tensors have none")


def _lost_on_the_way(e: Evidence, expert: str) -> str:
    """The term that should teach an expert and does not, or should not and does; empty when all is well."""
    assert e.replayed is not None
    full = e.config.objective.grad_through_context
    for term, trained in (("text", e.writes), ("image", e.paints)):
        if not trained or term not in e.replayed.by_term or (expert, term) == ("image", "text"):
            continue
        if expert != term and not e.replayed.by_term[term][term] > 0:
            continue  # it reaches nobody, which is said of the expert it is for
        value = e.replayed.by_term[term][expert]
        if expert == term or full:
            if not value > 0:
                return f"no gradient of the {term} term reaches the {expert} expert"
        elif value > 0:
            return f"the {term} term reaches the {expert} expert, though objective.grad_through_context is false"
    return ""


def _empty_layers(values: dict[str, float]) -> str:
    """Layers none of whose tensors has a gradient."""
    layers: dict[int, float] = {}
    for name, value in values.items():
        found = re.search(r"\.layers\.(\d+)\.", name)
        if found:
            layers[int(found[1])] = max(value, layers.get(int(found[1]), 0.0))
    return ", ".join(str(k) for k, value in sorted(layers.items()) if not value > 0)


def reference(e: Evidence) -> Outcome:
    """The reference is where training began: it stands still while the policy moves, and pulls it back."""
    if e.replayed is None:
        return skipped("replay failed")
    first = e.replayed.batches[0]
    if first.reference is None:
        return skipped("nothing is held near a reference: no penalty and no objective.text_kl")
    limit = SAME[e.coarse]
    start = difference(first.reference, first.old_scores, e.config.objective.text_kl > 0)
    if _fresh(e) and not start <= limit:
        return Outcome(FAULT, start, limit, "before any update the reference already differs from the policy")
    if not _fresh(e) and not start > 0:
        return Outcome(FAULT, start, limit, "training goes on from moved weights, and the reference has them too")
    if e.moved is None:
        verdict = WARN if "update" in e.trouble else OK
        return Outcome(verdict, start, limit, f"difference at the start; {_no_update(e)}")
    m = e.moved
    if m.reference_moved > (0.0 if e.policy.device.type == "cpu" else SAME[False]):
        return Outcome(FAULT, m.reference_moved, 0.0, "an update of the policy moved the reference")
    if m.distance == start or (_fresh(e) and m.distance < start):
        return Outcome(FAULT, m.distance, start, "an update of the policy moved it no further from the reference")
    if not m.pull > 0:
        return Outcome(FAULT, m.pull, 0.0, "away from the reference, the penalty has no gradient")
    if _fresh(e) and m.outward is not None and m.outward < 0:
        return Outcome(FAULT, m.outward, 0.0, "the penalty drives the policy away from the reference")
    later = m.step.metrics.get(f"image/first_{e.config.objective.penalty}")
    if later == 0:
        return Outcome(FAULT, 0.0, 0.0, "a step after an update, the penalty is exactly 0 all the same")
    return Outcome(OK, m.reference_moved, 0.0, f"stood still while the policy went to {m.distance:.2g} from it")


def _no_update(e: Evidence) -> str:
    """Why there was no trial update: it failed, or was not made."""
    return e.trouble.get("update") or e.trouble.get("no update") or "no update was tried"


def _fresh(e: Evidence) -> bool:
    """Whether the policy is where its reference is: a frozen copy just made, or adapters that do nothing yet."""
    if e.config.train.finetune == "full":
        return e.state.step == 0
    return e.policy.adapter is None or e.policy.adapter.idle
