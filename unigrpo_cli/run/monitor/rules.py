"""What is worth a warning: one row per rule, with its remedy; a part of docs/troubleshooting.md is made from it.

A rule looks at the course of a run, for one subject at a time (an expert, a reward, a phase), and says what it
sees, or None. Comparisons with what is not there are comparisons with NaN, and so not true.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from unigrpo_cli.run.monitor.history import FIRST, LAST, Course, parting, trend

KINDS = ("text", "image")
PHASES = ("rollout", "reward", "old", "update")
FALLING = -4.0  # t of a trained reward: one stretch of noise in two thousand
ONE_SIDE, SHIFT = 0.9, 0.5  # share of clipped actions on one side; mean log-ratio in deviations
NEAR = 0.05  # of the clip range: a policy that moves less between updates hardly moves
TEXT_FAR = math.log(2)  # deviation of the log-ratio
IMAGE_FAR = 30.0  # mean log-ratio, in image_clips
FASTER = 5.0  # growth of the penalty in ten steps; growth with the square of time ends below it
LONGER, SHORTER = 3.0, 0.3  # entropy and length, in what they were
LOST = 1e-3  # of the ratio of the experts' gradient norms at first
SPIKE = 20.0  # medians
SHARE = 0.2  # of a step's seconds: a phase below it may take as long as it likes
LEAK, LEAKED = 0.05, 0.25  # growth in LAST steps: relative, and GiB


@dataclass(frozen=True)
class Rule:
    """One thing that a run may be warned of.

    Args:
        name: by which it is logged.
        look: what is seen now of a subject, in words, or None.
        subjects: what it is looked at for.
        lasting: n, m: it is said when it is seen in n of the last m steps.
        when: the condition in words.
        means: what it usually means.
        remedy: what to type or look at.
    """

    name: str
    look: Callable[[Course, str], str | None]
    subjects: Callable[[Course], tuple[str, ...]]
    lasting: tuple[int, int]
    when: str
    means: str
    remedy: str


def _one(course: Course) -> tuple[str, ...]:
    return ("",)


def _kinds(course: Course) -> tuple[str, ...]:
    return KINDS


def _only(kind: str) -> Callable[[Course], tuple[str, ...]]:
    return lambda course: (kind,)


def _phases(course: Course) -> tuple[str, ...]:
    return PHASES


def _trained(course: Course) -> tuple[str, ...]:
    return tuple(course.trained)


def _held_out(course: Course) -> tuple[str, ...]:
    return tuple(course.held_out)


def _asked(course: Course) -> tuple[str, ...]:
    return tuple(course.weights)


def _stale(course: Course, kind: str) -> str | None:
    told = [v for v in course.series(f"{kind}/first_max_abs_log_ratio") if not math.isnan(v)]
    value = told[-1] if told else 0.0  # most steps do not tell
    return f"the {kind} log-ratio of the first update is {value:.3g}, not exactly 0" if value else None


def _drift(course: Course, kind: str) -> str | None:
    value = course.now(f"{kind}/drift_mean")
    limit = course.config.train.drift_limit if kind == "text" else course.config.monitor.drift_image
    if not value > limit:
        return None
    return f"rollout and replay log-probabilities of {kind} differ by {value:.3g} on average (limit {limit:g})"


def _one_sided(course: Course, kind: str) -> str | None:
    clipped = course.now(f"{kind}/clip_fraction")
    above = course.now(f"{kind}/clip_fraction_above")
    mean, std = course.now(f"{kind}/log_ratio_mean"), course.now(f"{kind}/log_ratio_std")
    lopsided = above > ONE_SIDE * clipped or above < (1 - ONE_SIDE) * clipped
    if not (clipped > 0.05 and lopsided and abs(mean) > SHIFT * std):
        return None
    side = "above" if above > clipped / 2 else "below"
    return f"{clipped:.0%} of {kind} actions are clipped, nearly all {side} (mean log-ratio {mean:.3g})"


def _clip_high(course: Course, kind: str) -> str | None:
    value = course.now(f"{kind}/clip_fraction")
    return f"{value:.0%} of {kind} actions are clipped" if value > course.config.monitor.clip_fraction else None


def _clip_never(course: Course, kind: str) -> str | None:
    t, o = course.config.train, course.config.objective
    if not course.full() or t.minibatches * t.epochs == 1:  # one update: the ratio is 1 and nothing can be clipped
        return None
    clip = o.text_clip if kind == "text" else o.image_clip
    if not max(course.series(f"{kind}/max_abs_log_ratio")) < NEAR * clip:
        return None
    return f"no {kind} ratio has come near its clip range {clip:g} for {LAST} steps"


def _ratio_far(course: Course, kind: str) -> str | None:
    if kind == "text":
        value, limit = course.now("text/log_ratio_std"), TEXT_FAR
    else:
        value, limit = course.now("image/abs_log_ratio"), IMAGE_FAR * course.config.objective.image_clip
    return f"{kind} ratios are far from 1: log-ratios of size {value:.3g}" if value > limit else None


def _kl_large(course: Course, kind: str) -> str | None:
    monitor = course.config.monitor
    key, limit = ("approx_kl", monitor.kl_text) if kind == "text" else ("kl_old", monitor.kl_image)
    value = course.now(f"{kind}/{key}")
    return f"one step's updates move {kind} by a KL of {value:.3g} (limit {limit:g})" if value > limit else None


def _penalty(course: Course) -> str:
    return course.config.objective.penalty


def _penalty_stuck(course: Course, kind: str) -> str | None:
    t = course.config.train
    moved = len(course.last) > 1 and course.last[-2].get("image/grad_norm", 0.0) > 0 and t.lr_image > 0
    if not (moved and course.now(f"image/first_{_penalty(course)}") == 0):
        return None
    return f"the {_penalty(course)} penalty is exactly 0 at the first update of a step, though the policy has moved"


def _penalty_growing(course: Course, kind: str) -> str | None:
    values = course.series(f"image/{_penalty(course)}")
    if not course.full() or not (values[-1] > FASTER * values[-11] > FASTER**2 * values[0] > 0):
        return None
    growth = values[-1] / values[0]
    return f"the {_penalty(course)} penalty grew {growth:.0f}-fold in {LAST} steps, to {values[-1]:.3g}"


def _entropy_low(course: Course, kind: str) -> str | None:
    value, start = course.now("text/entropy"), course.start("text/entropy")
    if not value < course.config.monitor.entropy * start:
        return None
    return f"entropy of text has fallen to {value:.3g} nats per token, from {start:.3g}"


def _entropy_high(course: Course, kind: str) -> str | None:
    value, start = course.now("text/entropy"), course.start("text/entropy")
    if not value > LONGER * start:
        return None
    return f"entropy of text has risen to {value:.3g} nats per token, from {start:.3g}"


def _truncated(course: Course, kind: str) -> str | None:
    value = course.now("text/truncated")
    if not value > course.config.monitor.truncated:
        return None
    return f"{value:.0%} of texts are cut off at sampling.max_new_tokens={course.config.sampling.max_new_tokens}"


def _short(course: Course, kind: str) -> str | None:
    value, start = course.now("text/length"), course.start("text/length")
    return f"texts have shrunk to {value:.1f} tokens, from {start:.1f}" if value < SHORTER * start else None


def _same_images(course: Course, kind: str) -> str | None:
    value = course.now("image/duplicates")
    if not value > course.config.monitor.duplicates:
        return None
    return f"{value:.0%} of images equal another one of their group to the bit"


def _same_texts(course: Course, kind: str) -> str | None:
    value = course.now("text/duplicates")
    return "every text equals another one of its group" if value == 1 else None


def _zero_groups(course: Course, kind: str) -> str | None:
    value = course.now("advantage/zero_groups")
    if not value > course.config.monitor.zero_groups:
        return None
    return f"{value:.0%} of groups have advantage 0: their rewards have no spread"


def _constant(course: Course, name: str) -> str | None:
    if course.now(f"reward/{name}/spread") != 0:
        return None
    return f"reward {name} gives {course.now(f'reward/{name}'):.4g} to everything"


def _falling(course: Course, name: str) -> str | None:
    values = [row[name] for row in course.rewards()]
    if not course.full() or not trend(values) < FALLING:
        return None
    return f"trained reward {name} has been getting worse for {LAST} steps"


def _held_out_falling(course: Course, name: str) -> str | None:
    if not course.full() or not parting(course.rewards(), course.trained, [name]):
        return None
    return f"held-out reward {name} has been falling for {LAST} steps while a trained one rises"


def _abstaining(course: Course, name: str) -> str | None:
    key = f"reward/{name}/abstained"
    value, start = course.now(key), course.start(key)
    if not (value > course.config.monitor.abstained and value > 2 * start):
        return None
    return f"reward {name} abstains on {value:.0%} of samples, at first on {start:.0%}"


def _no_gradient(course: Course, kind: str) -> str | None:
    taught = f"{kind}/loss" in course.last[-1] and course.now("advantage/zero") < 1
    if not taught or course.now(f"{kind}/grad_norm", 0.0):
        return None
    return f"the {kind} expert gets no gradient, though its loss is trained on"


def _experts_part(course: Course, kind: str) -> str | None:
    other = "image" if kind == "text" else "text"
    own, its = f"{kind}/grad_norm", f"{other}/grad_norm"
    if not (course.start(own) > 0 and course.start(its) > 0 and course.now(own) > 0 and course.now(its) > 0):
        return None
    now, start = course.now(own) / course.now(its), course.start(own) / course.start(its)
    if not now < LOST * start:
        return None
    return f"the gradient of the {kind} expert has vanished beside the other's: {now:.3g} of it, at first {start:.3g}"


def _always_clipped(course: Course, kind: str) -> str | None:
    values = course.series("grad_clipped")[-10:]
    if len(values) < 10 or not all(v == 1 for v in values):
        return None
    return f"every gradient of the last 10 steps was cut to train.grad_clip={course.config.train.grad_clip:g}"


def _spike(course: Course, kind: str) -> str | None:
    before = [v for v in course.series(f"{kind}/grad_norm")[:-1] if v > 0]
    value = course.now(f"{kind}/grad_norm")
    if len(before) < 2 * FIRST or not value > SPIKE * median(before):
        return None
    return f"the gradient norm of the {kind} expert jumps: {value:.3g}, usually {median(before):.3g}"


def _slower(course: Course, phase: str) -> str | None:
    now = {p: course.now(f"seconds/{p}") for p in PHASES}
    start = {p: course.start(f"seconds/{p}") for p in PHASES}
    others = [now[p] / start[p] for p in PHASES if p != phase and start[p] > 0]
    usual = start[phase] * max(1.0, median(others or [1.0]))  # a machine that others use is slower in everything
    if not (now[phase] > course.config.monitor.slower * usual and now[phase] > SHARE * sum(now.values())):
        return None
    return f"{phase} takes {now[phase]:.1f} s a step, at first {start[phase]:.1f} s"


def _memory(course: Course, kind: str) -> str | None:
    values = course.series("memory/process")
    if not course.full():
        return None
    grown = values[-1] - values[0]
    steady = all(b >= a for a, b in pairwise(values))
    if not (steady and grown > LEAKED and grown > LEAK * values[0]):
        return None
    return f"memory of the process grew at every one of {LAST} steps, to {values[-1]:.2f} GiB"


COURSE = (3, 5)  # of the last steps: single outliers do not shout
AT_ONCE = (1, 1)

RULES = (
    Rule(
        "stale-old-policy",
        _stale,
        _kinds,
        AT_ONCE,
        "`first_max_abs_log_ratio` is not 0",
        "the old policy is stale, or replay computes the same weights another way each time: dropout, a changing "
        "kernel, weights written between replay and update",
        "look with `unigrpo doctor`; a plugin that touches the network is the first suspect",
    ),
    Rule(
        "rollout-drift",
        _drift,
        _kinds,
        (2, 5),
        "`drift_mean` is above `train.drift_limit` (text) or `monitor.drift_image`",
        "their numerics differ; the ratio is still exact, sampling is not from the policy that is trained",
        "try --set dtype=float32; if it stays, `unigrpo doctor` says where they part",
    ),
    Rule(
        "clip-one-sided",
        _one_sided,
        _kinds,
        COURSE,
        f"over 5 % are clipped, {ONE_SIDE:.0%} of these on one side, and the mean log-ratio is off by "
        f"{SHIFT:g} deviations",
        "a shift of all ratios, which is no learning: latents or log-probabilities were rounded, to bf16 say, "
        "between rollout and replay",
        "keep latents in float32, or give --set dtype=float32",
    ),
    Rule(
        "clip-high",
        _clip_high,
        _kinds,
        COURSE,
        "`clip_fraction` is above `monitor.clip_fraction`",
        "updates are too large for the clip range, and most of the batch teaches nothing",
        "lower train.lr_text or train.lr_image, or widen objective.text_clip or objective.image_clip",
    ),
    Rule(
        "clip-never",
        _clip_never,
        _kinds,
        AT_ONCE,
        f"with several updates a step, no log-ratio came to {NEAR:.0%} of the clip range in {LAST} steps",
        "the policy hardly moves between updates: the learning rate is far too low, or the clip range far too wide",
        "raise train.lr_text or train.lr_image, or set objective.image_clip near image/abs_log_ratio",
    ),
    Rule(
        "ratio-far",
        _ratio_far,
        _kinds,
        COURSE,
        f"text: `log_ratio_std` above log 2; image: `abs_log_ratio` above {IMAGE_FAR:g} `objective.image_clip`",
        "the later updates of a step train a policy that is no longer the one that was sampled",
        "lower train.lr_text or train.lr_image, or make fewer updates: train.minibatches, train.epochs",
    ),
    Rule(
        "kl-large",
        _kl_large,
        _kinds,
        COURSE,
        "`text/approx_kl` is above `monitor.kl_text`, or `image/kl_old` above `monitor.kl_image`",
        "each step moves the policy far, which is how a run begins to fall apart",
        "lower the learning rate, or hold with objective.text_kl and objective.penalty_weight",
    ),
    Rule(
        "penalty-stuck",
        _penalty_stuck,
        _only("image"),
        (2, 2),
        "the penalty at the first update of a step is exactly 0, though a step before it had a gradient",
        "the reference moves with the policy: adapters left on, or a frozen copy that shares its weights",
        "look at the policy's `reference()`; a plugin that wraps the network is the first suspect",
    ),
    Rule(
        "penalty-growing",
        _penalty_growing,
        _only("image"),
        AT_ONCE,
        f"the penalty grew {FASTER:g}-fold in ten steps, twice in a row",
        "images run away from the start ever faster, and their quality soon goes",
        "raise objective.penalty_weight or lower train.lr_image; look at samples/progress.png",
    ),
    Rule(
        "entropy-collapse",
        _entropy_low,
        _only("text"),
        COURSE,
        f"`text/entropy` is below `monitor.entropy` times its median of the first {FIRST} steps",
        "the policy writes one and the same, and has nothing left to choose from",
        "lower train.lr_text, or hold it with --set objective.text_kl=0.01",
    ),
    Rule(
        "entropy-explosion",
        _entropy_high,
        _only("text"),
        COURSE,
        f"`text/entropy` is above {LONGER:g} times its median of the first {FIRST} steps",
        "text turns into noise",
        "lower train.lr_text, and read the reasoning in samples/",
    ),
    Rule(
        "text-truncated",
        _truncated,
        _only("text"),
        COURSE,
        "`text/truncated` is above `monitor.truncated`",
        "reasoning never ends, and images are painted from halves of it",
        "raise sampling.max_new_tokens, or add the reward length",
    ),
    Rule(
        "text-shrinking",
        _short,
        _only("text"),
        COURSE,
        f"`text/length` is below {SHORTER:.0%} of its median of the first {FIRST} steps",
        "reasoning is being given up, which is the shortest way to a reward that it does not help",
        "read the reasoning in samples/; add the reward length or format, or lower train.lr_text",
    ),
    Rule(
        "identical-images",
        _same_images,
        _only("image"),
        COURSE,
        "`image/duplicates` is above `monitor.duplicates`",
        "members of a group share their noise, or pictures have collapsed: equal members teach nothing",
        "look at the seeds in `unigrpo rollout --out DIR`: each episode must have its own",
    ),
    Rule(
        "identical-texts",
        _same_texts,
        _only("text"),
        (5, 5),
        "`text/duplicates` is 1",
        "nothing is left to compare in words: sampling is greedy or entropy is gone",
        "give --set sampling.temperature=1, or see entropy-collapse",
    ),
    Rule(
        "zero-spread",
        _zero_groups,
        _one,
        COURSE,
        "`advantage/zero_groups` is above `monitor.zero_groups`",
        "prompts are too easy or too hard, or the reward is too coarse: these groups teach nothing",
        "choose other --prompts, a graded reward, or a larger train.group_size",
    ),
    Rule(
        "constant-reward",
        _constant,
        _trained,
        COURSE,
        "`reward/NAME/spread` of a trained reward is 0",
        "a judge that answers without looking, a server that fails quietly, or a parser that never matches",
        "try it alone with `unigrpo rewards test NAME` and look at samples/",
    ),
    Rule(
        "reward-falling",
        _falling,
        _trained,
        COURSE,
        f"the trend of a trained reward over {LAST} steps has t < {FALLING:g}",
        "training works against it: a sign, a rate that is too high, or another reward that outweighs it",
        "check higher_is_better with `unigrpo rewards info NAME`; raise its weight or lower the learning rates",
    ),
    Rule(
        "held-out-falling",
        _held_out_falling,
        _held_out,
        AT_ONCE,
        f"trends over {LAST} steps: a held-out reward t < -3, a trained one t > 3",
        "it may be learning a judge's weakness",
        "look at samples/progress.png, train on both or stop early",
    ),
    Rule(
        "abstentions",
        _abstaining,
        _asked,
        COURSE,
        "`abstained` is above `monitor.abstained` and twice what it was at first",
        "samples leave what the judge can read, or the judge fails ever more often",
        "read the remarks in rewards.json of `unigrpo rollout`; reward.max_abstain is where a run stops",
    ),
    Rule(
        "gradient-lost",
        _no_gradient,
        _kinds,
        COURSE,
        "an expert's loss is in the row, its `grad_norm` is 0 or missing, and not all advantages are 0",
        "its weights are frozen or cut off from the loss",
        "check train.experts, train.extra_modules and objective.grad_through_context; "
        "a plugin that freezes weights is a suspect",
    ),
    Rule(
        "gradient-vanished",
        _experts_part,
        _kinds,
        COURSE,
        f"the ratio of the experts' gradient norms is below {LOST:g} times that of the first {FIRST} steps",
        "one of the two no longer learns",
        "compare text/loss and image/loss; raise objective.text_weight or objective.image_weight",
    ),
    Rule(
        "gradient-clipped",
        _always_clipped,
        _one,
        AT_ONCE,
        "`grad_clipped` is 1 in ten steps on end",
        "the size of gradients no longer counts, and one expert's crowds out the other's",
        "raise train.grad_clip above the usual grad_norm, or lower the learning rates",
    ),
    Rule(
        "gradient-spikes",
        _spike,
        _kinds,
        (2, 5),
        f"`grad_norm` is above {SPIKE:g} times its median over the last {LAST} steps",
        "single batches pull hard: outliers of a reward, or a policy at the edge of its numerics",
        "set advantage.clamp lower, or lower the learning rates; monitor.explosion is where an update is skipped",
    ),
    Rule(
        "phase-slower",
        _slower,
        _phases,
        COURSE,
        f"seconds of a phase have grown, since the first {FIRST} steps, `monitor.slower` times more than "
        "those of other phases, to a fifth of a step or more",
        "reward: a judge that waits or is overrun; rollout: texts that grow; old and update: memory that is short",
        "try each reward with `unigrpo rewards test` and its --max-ms, see reward.overlap, and look at text/length",
    ),
    Rule(
        "memory-growing",
        _memory,
        _one,
        AT_ONCE,
        f"memory of the process rose at each of {LAST} steps, by {LEAK:.0%} and {LEAKED:g} GiB",
        "something keeps what it should let go: a reward that remembers its pictures, say",
        "run with one reward less to find which; rewards can live elsewhere: `unigrpo rewards serve`",
    ),
)
