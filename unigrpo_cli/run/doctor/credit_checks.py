"""Does each segment of an episode answer for the rewards that it should?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from unigrpo_cli.algo.credit import IMAGE, same_segment
from unigrpo_cli.run.doctor.findings import Outcome, fault
from unigrpo_cli.run.doctor.recording import Recording, label
from unigrpo_cli.training.advantages import credit_of

TIE = 1e-9  # relative difference of returns below which they are equal


def credited(r: Recording) -> Outcome | None:
    """The fault of an advantage that goes to the wrong segment; None without one."""
    if r.rewards.plugins.manager.hook.unigrpo_combine_rewards.get_hookimpls():
        return None  # a plugin may give any advantages
    return _terminal(r) if credit_of(r.config) == "terminal" else _to_go(r)


def _terminal(r: Recording) -> Outcome | None:
    """With terminal credit all segments of an episode have one advantage."""
    for episode, kinds, own in zip(r.episodes, r.scores.kind_BS.tolist(), r.scores.advantage_BS.tolist(), strict=True):
        acted = [a for a, kind in zip(own, kinds, strict=True) if kind]
        if any(a != acted[0] for a in acted):
            return fault(f"segments of {label(episode)} have different advantages, but their credit is terminal")
    return None


def _to_go(r: Recording) -> Outcome | None:
    """Of the same segment of two members, the one with the larger returns has the larger advantage."""
    members = r.config.train.group_size
    masks = {name: at_BS.tolist() for name, at_BS in same_segment(r.scores.kind_BS).items()}
    names = [
        [next(name for name, at in masks.items() if at[b][s]) for s, kind in enumerate(kinds) if kind]
        for b, kinds in enumerate(r.scores.kind_BS.tolist())
    ]
    for name in masks:
        having = [b for b, own in enumerate(names) if name in own]
        returns = {b: _returns(r, b, names[b], names[b].index(name)) for b in having}
        advantage = {b: float(r.scores.advantage_BS[b, names[b].index(name)]) for b in having}
        for a, b in combinations(having, 2):
            if a // members == b // members:
                better, worse = (a, b) if _above(returns[a], returns[b]) else (b, a)
                order = advantage[better], advantage[worse]
                # Clamping may make unequal ones equal, but not both 0.
                if _above(returns[better], returns[worse]) and (order[0] < order[1] or order == (0.0, 0.0)):
                    return fault(
                        f"{name} of {label(r.episodes[better])} has larger returns than that of "
                        f"{label(r.episodes[worse])}, but no larger advantage: a reward is credited to another segment"
                    )
    return None


def _above(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether no weighted return of `a` is below that of `b`, and one is above; abstentions compare with nothing."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    ties = [TIE * (abs(x) + abs(y)) for x, y in zip(a, b, strict=True)]
    return all(gap >= -tie for gap, tie in zip(gaps, ties, strict=True)) and any(
        gap > tie for gap, tie in zip(gaps, ties, strict=True)
    )


def _returns(r: Recording, b: int, names: Sequence[str], s: int) -> list[float]:
    """The return of an episode's segment by each trained reward, times the sign of its weight."""
    found = []
    for alias, weight in r.rewards.weights.items():
        if weight:
            scores, discount = r.scores.scored[alias].segments[b], r.config.advantage.discount
            rounds = max(row.count(IMAGE) for row in r.scores.kind_BS.tolist())
            own = return_of(scores, names, s, discount, rounds)
            found.append(own if weight > 0 else -own)
    return found


def return_of(scores: Mapping[str, float], names: Sequence[str], s: int, discount: float, rounds: int) -> float:
    """G_s by its sum over later segments, and over the rounds in which the last picture stands."""
    pictures = [name for name in names if name.startswith("image")]
    before = [sum(name in pictures for name in names[:t]) for t in range(len(names))]
    total = sum(discount ** (before[t] - before[s]) * scores.get(names[t], 0.0) for t in range(s, len(names)))
    for k in range(len(pictures), rounds):
        total += discount ** (k - before[s]) * scores.get(pictures[-1], 0.0)
    return total
