"""The rules of the monitor in one table. docs/troubleshooting.md is generated from it.

A rule's check reads the history for one subject (an expert or a reward) and returns what it sees, or None. A missing
metric is NaN, and every comparison with NaN is false.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from unigrpo_cli.run.monitor.history import FIRST, LAST, History, reward_hacking, trend

FALLING = -4.0  # t statistic of a falling trained reward; false-alarm rate: about 1 in 2,000 windows of 20 steps
RISEN, SHRUNK = 3.0, 0.3  # entropy and text length, relative to the start
Scope = Literal["run", "text", "image", "expert", "trained", "held-out", "reward"]


@dataclass(frozen=True)
class Rule:
    """One warning.

    Args:
        name: its name in metrics.jsonl.
        check: what is seen of a subject now, in words, or None.
        scope: which subjects are checked.
        persistence: (n, m): warn when the check holds in n of the last m steps.
        when: the condition in words.
        cause: the usual cause.
        remedy: what to do; NAME stands for the subject.
    """

    name: str
    check: Callable[[History, str], str | None]
    scope: Scope
    persistence: tuple[int, int]
    when: str
    cause: str
    remedy: str

    def subjects(self, history: History) -> tuple[str, ...]:
        match self.scope:
            case "run":
                return ("",)
            case "expert":
                return ("text", "image")
            case "trained":
                return history.trained
            case "held-out":
                return history.held_out
            case "reward":
                return tuple(history.weights)
            case kind:
                return (kind,)


def _first_ratio(h: History, kind: str) -> str | None:
    measured = [v for v in h.series(f"{kind}/first_max_abs_log_ratio") if not math.isnan(v)]
    if not measured or measured[-1] <= h.ratio_limits[kind]:
        return None
    return f"the {kind} log-ratio of the first update is {measured[-1]:.3g} (limit {h.ratio_limits[kind]:.3g})"


def _drift(h: History, kind: str) -> str | None:
    value = h.now(f"{kind}/drift_mean")
    limit = h.config.train.drift_limit if kind == "text" else h.config.monitor.drift_image
    if not value > limit:
        return None
    return f"rollout and replay log-probabilities of {kind} differ by {value:.3g} on average (limit {limit:g})"


def _clip_high(h: History, kind: str) -> str | None:
    value = h.now(f"{kind}/clip_fraction")
    return f"{value:.0%} of {kind} actions are clipped" if value > h.config.monitor.clip_fraction else None


def _kl_large(h: History, kind: str) -> str | None:
    monitor = h.config.monitor
    key, limit = ("approx_kl", monitor.kl_text) if kind == "text" else ("kl_old", monitor.kl_image)
    value = h.now(f"{kind}/{key}")
    return f"the updates of one step move {kind} by a KL of {value:.3g} (limit {limit:g})" if value > limit else None


def _entropy_low(h: History, kind: str) -> str | None:
    value, start = h.now("text/entropy"), h.start("text/entropy")
    if not value < h.config.monitor.entropy * start:
        return None
    return f"text entropy has fallen from {start:.3g} to {value:.3g} nats per token"


def _entropy_high(h: History, kind: str) -> str | None:
    value, start = h.now("text/entropy"), h.start("text/entropy")
    return f"text entropy has risen from {start:.3g} to {value:.3g} nats per token" if value > RISEN * start else None


def _truncated(h: History, kind: str) -> str | None:
    value = h.now("text/truncated")
    if not value > h.config.monitor.truncated:
        return None
    return f"{value:.0%} of texts are truncated at sampling.max_new_tokens={h.config.sampling.max_new_tokens}"


def _short(h: History, kind: str) -> str | None:
    value, start = h.now("text/length"), h.start("text/length")
    return f"texts have shrunk from {start:.1f} to {value:.1f} tokens" if value < SHRUNK * start else None


def _same_images(h: History, kind: str) -> str | None:
    value = h.now("image/duplicates")
    if not value > h.config.monitor.duplicates:
        return None
    return f"{value:.0%} of images are identical to another image of their group"


def _zero_groups(h: History, kind: str) -> str | None:
    value = h.now("advantage/zero_groups")
    if not value > h.config.monitor.zero_groups or h.config.advantage.shuffle:  # shuffled ones are of no group
        return None
    return f"{value:.0%} of groups have only zero advantages: their members have equal rewards"


def _constant(h: History, name: str) -> str | None:
    if h.now(f"reward/{name}/spread") != 0:
        return None
    return f"reward {name} gives {h.now(f'reward/{name}'):.4g} to every sample"


def _falling(h: History, name: str) -> str | None:
    if not h.full() or not trend([row[name] for row in h.rewards()]) < FALLING:
        return None
    return f"trained reward {name} has been getting worse for {LAST} steps"


def _held_out_falling(h: History, name: str) -> str | None:
    if not h.full() or not reward_hacking(h.rewards(), h.trained, [name]):
        return None
    return f"held-out reward {name} has been falling for {LAST} steps while a trained reward rises"


def _abstaining(h: History, name: str) -> str | None:
    value, start = h.now(f"reward/{name}/abstained"), h.start(f"reward/{name}/abstained")
    if not (value > h.config.monitor.abstained and value > 2 * start):
        return None
    return f"reward {name} abstains on {value:.0%} of samples; at the start it was {start:.0%}"


PERSISTENT = (3, 5)  # a single outlier does not warn
AT_ONCE = (1, 1)

RULES = (
    Rule(
        "first-ratio",
        _first_ratio,
        "expert",
        AT_ONCE,
        "`first_max_abs_log_ratio` is above 0 (CPU), or above what rounding explains (other devices)",
        "replay does not repeat itself: dropout, weights changed between two passes, or an attention kernel that "
        "rounds differently with gradients",
        "run `unigrpo doctor`; suspect a plugin that changes the network first",
    ),
    Rule(
        "rollout-drift",
        _drift,
        "expert",
        (2, 5),
        "`drift_mean` is above `train.drift_limit` (text) or `monitor.drift_image`",
        "rollout and replay round differently, so samples come from a slightly different policy",
        "try --set dtype=float32; if the warning stays, `unigrpo doctor` shows where they diverge",
    ),
    Rule(
        "clip-high",
        _clip_high,
        "expert",
        PERSISTENT,
        "`clip_fraction` is above `monitor.clip_fraction`",
        "updates are too large for the clip range, and clipped actions have no gradient",
        "lower train.lr_text or train.lr_image, or widen objective.text_clip or objective.image_clip",
    ),
    Rule(
        "kl-large",
        _kl_large,
        "expert",
        PERSISTENT,
        "`text/approx_kl` is above `monitor.kl_text`, or `image/kl_old` above `monitor.kl_image`",
        "each step changes the policy a lot, which often precedes a collapse",
        "lower the learning rate, or raise objective.text_kl or objective.penalty_weight",
    ),
    Rule(
        "entropy-collapse",
        _entropy_low,
        "text",
        PERSISTENT,
        f"`text/entropy` is below `monitor.entropy` times its median over the first {FIRST} steps",
        "the policy writes nearly the same text every time and stops exploring",
        "lower train.lr_text, or set objective.text_kl=0.01",
    ),
    Rule(
        "entropy-explosion",
        _entropy_high,
        "text",
        PERSISTENT,
        f"`text/entropy` is above {RISEN:g} times its median over the first {FIRST} steps",
        "text turns into noise",
        "lower train.lr_text, and read the texts in samples/",
    ),
    Rule(
        "text-truncated",
        _truncated,
        "text",
        PERSISTENT,
        "`text/truncated` is above `monitor.truncated`",
        "the reasoning does not end, and images are painted from unfinished text",
        "raise sampling.max_new_tokens, or add the reward length",
    ),
    Rule(
        "text-shrinking",
        _short,
        "text",
        PERSISTENT,
        f"`text/length` is below {SHRUNK:.0%} of its median over the first {FIRST} steps",
        "the policy stops reasoning because the reward does not need it",
        "read the texts in samples/; add the reward length or format, or lower train.lr_text",
    ),
    Rule(
        "identical-images",
        _same_images,
        "image",
        PERSISTENT,
        "`image/duplicates` is above `monitor.duplicates`",
        "the members of a group share their noise, or the images have collapsed; equal members teach nothing",
        "compare the members in `unigrpo rollout --out DIR`: each needs its own seed",
    ),
    Rule(
        "zero-spread",
        _zero_groups,
        "run",
        PERSISTENT,
        "`advantage/zero_groups` is above `monitor.zero_groups`",
        "the prompts are too easy or too hard, or the reward is too coarse",
        "choose other --prompts, a graded reward, or a larger train.group_size",
    ),
    Rule(
        "constant-reward",
        _constant,
        "trained",
        PERSISTENT,
        "`reward/NAME/spread` of a trained reward is 0",
        "a judge ignores its input, a server fails silently, or a parser never matches",
        "run `unigrpo rewards test NAME`, and look at samples/",
    ),
    Rule(
        "reward-falling",
        _falling,
        "trained",
        PERSISTENT,
        f"the trend of a trained reward over {LAST} steps has t < {FALLING:g}",
        "a wrong sign, a learning rate that is too high, or another reward that outweighs this one",
        "check higher_is_better with `unigrpo rewards info NAME`; raise its weight or lower the learning rates",
    ),
    Rule(
        "held-out-falling",
        _held_out_falling,
        "held-out",
        AT_ONCE,
        f"over {LAST} steps a held-out reward has a trend of t < -3 and a trained one t > 3",
        "the policy may be exploiting a weakness of the trained reward",
        "look at samples/progress.png; train on both rewards or stop early",
    ),
    Rule(
        "abstentions",
        _abstaining,
        "reward",
        PERSISTENT,
        "`abstained` is above `monitor.abstained` and above twice its share at the start",
        "samples have become unreadable for the reward, or its server fails more often",
        "read `info` in rewards.json of `unigrpo rollout`; reward.max_abstain sets when a run stops",
    ),
)
