"""All checks by name, with what it means when one is not ok and what to do then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unigrpo_cli.run.doctor import environment, replay_checks, reward_checks, rollout_checks
from unigrpo_cli.run.doctor.findings import OK, SKIPPED, Evidence, Finding, Outcome


@dataclass(frozen=True)
class Check:
    """One thing that is looked at."""

    name: str
    look: Callable[[Evidence], Outcome]
    means: str
    remedy: str
    short: bool = True  # part of the examination at the start of a run


CHECKS = (
    Check(
        "tokens",
        rollout_checks.tokens,
        "the ids that are recorded or replayed are not those the network was fed, so other words are trained than "
        "were written",
        "store the sampled ids and feed those; never encode decoded text again (rollout.sample_text, replay.collate)",
    ),
    Check(
        "stop-token",
        rollout_checks.stop_token,
        "when to stop is an action too: unscored it is never learnt, unfed the painter sees another context",
        "keep the sampled stop token in TextActions.ids, and put a forced one into closing (rollout.sample_text)",
    ),
    Check(
        "temperature",
        rollout_checks.temperature,
        "words are drawn, recorded or scored at different temperatures: the policy is not the one that is trained",
        "one temperature for all three: sampling.temperature; no top-k or top-p in the sampler (algo.text.token)",
    ),
    Check(
        "truncation",
        rollout_checks.truncation,
        "most texts are cut off, so the image is painted from half a thought and stopping is not learnt",
        "raise sampling.max_new_tokens, or ask for shorter texts with the reward length",
    ),
    Check(
        "duplicates",
        rollout_checks.duplicates,
        "members of a group that are the same teach nothing by comparison",
        "raise sampling.temperature, or sampling.noise_level for pictures; look at episodes with `unigrpo rollout`",
    ),
    Check(
        "group-noise",
        rollout_checks.group_noise,
        "episodes share noise, or noise of the wrong size, so a group explores less than its size says",
        "derive the seed of start and steps from the prompt and the member (algo.rng.derive in rollout.sample_image)",
    ),
    Check(
        "window",
        rollout_checks.window,
        "members of a group have noise at different steps, which swamps the comparison and ends in collapse",
        "draw one window per training step (train.window_of) and give it to all rows of a rollout",
    ),
    Check(
        "schedule",
        rollout_checks.schedule,
        "a step is drawn at one time and scored at another, or a network call is missing",
        "take both from the recorded grid: step k goes from times[k] to times[k + 1] (rollout.sample_image, "
        "replay._image_steps)",
    ),
    Check(
        "latents",
        rollout_checks.latents,
        "latents lost bits between the draw and its record, so the log-ratio is of another step than was made",
        "keep latents in fp32 from end to end, whatever the network computes in (rollout.sample_image, ImageActions)",
    ),
    Check(
        "repeats",
        rollout_checks.repeats,
        "the seed does not decide what is drawn: a run can be neither repeated nor resumed exactly",
        "draw from seeds.uniform and seeds.normal with a derived seed, from no global generator",
        short=False,
    ),
    Check(
        "replay",
        replay_checks.replayable,
        "what was drawn cannot be scored again, so nothing can be trained",
        "episodes of one structure share size, window, kernel, noise level, times and temperature (replay.collate)",
    ),
    Check(
        "text-ratio",
        replay_checks.text_ratio,
        "before an update old and new policy are one, and yet their words differ in probability",
        "score the old policy in each step with its present weights, by the same replay on the same micro-batch "
        "(train.replay_fixed); no dropout",
    ),
    Check(
        "image-ratio",
        replay_checks.image_ratio,
        "before an update old and new policy are one, and yet their denoising steps differ in probability",
        "score the old policy in each step with its present weights, by the same replay on the same micro-batch "
        "(train.replay_fixed); no dropout",
    ),
    Check(
        "text-drift",
        replay_checks.text_drift,
        "decoding and replay disagree about words by more than rounding: they see different contexts or weights",
        "compare what both feed (the check tokens); with bf16 alone to blame, raise doctor.text_drift",
    ),
    Check(
        "image-drift",
        replay_checks.image_drift,
        "painting and replay disagree about a step by more than rounding: other times, context, latents or weights",
        "compare times and latents (schedule, latents, tokens); with bf16 alone to blame, raise doctor.image_drift",
    ),
    Check(
        "advantages",
        replay_checks.advantages,
        "episodes are weighed by the advantage of another, or worse ones by the larger: the policy learns "
        "something else or the opposite",
        "keep episodes, scores and advantages in one order, and index them by episode (train.advantages, "
        "train.replay_fixed); a reward to be lowered declares higher_is_better = False",
    ),
    Check(
        "gradients",
        replay_checks.gradients,
        "part of what is to be trained gets no gradient and stays as it is",
        "look for a detach or a no_grad on the way from the loss, for requires_grad in optimizer.prepare_policy, "
        "and "
        "at train.experts",
    ),
    Check(
        "reference",
        replay_checks.reference,
        "the penalty compares the policy with something else than its beginning, so nothing holds it",
        "the reference is a frozen copy, or the network with all its adapters off (UnifiedModel.reference); only "
        "its scores are made without gradients (train.replay_fixed)",
    ),
    Check(
        "reward-spread",
        reward_checks.reward_spread,
        "a reward that is the same for all members of a group gives all of them an advantage of 0",
        "look at it with `unigrpo rewards test NAME`; for a rare success take more members (doctor.members) or a "
        "graded reward",
    ),
    Check(
        "reward-repeats",
        reward_checks.reward_repeats,
        "much of the advantage is the judge's own chance",
        "have the judge answer greedily, or average several answers",
    ),
    Check(
        "reward-errors",
        reward_checks.reward_errors,
        "a failure becomes a score, so an episode is punished for what went wrong in the reward",
        "let the reward raise, or return None or NaN for no opinion; catch nothing broadly in its score()",
    ),
    Check(
        "reward-abstains",
        reward_checks.reward_abstains,
        "episodes without an opinion teach nothing",
        "look at its reasons with `unigrpo rollout`, or raise reward.max_abstain",
    ),
    Check(
        "memory",
        environment.memory,
        "the run fills nearly all memory, or more than there is",
        "`unigrpo train --dry-run` names the settings that save most",
        short=False,
    ),
    Check(
        "versions",
        environment.versions,
        "packages are other ones than this version was made for",
        "install this package again with pip, which brings what it asks for",
        short=False,
    ),
    Check(
        "bf16",
        environment.bf16,
        "in bf16 words have other probabilities than in fp32 by more than is usual",
        "try dtype=float32, or look for a layer that should compute wide",
        short=False,
    ),
)


def findings(evidence: Evidence) -> list[Finding]:
    """What all checks say; in a short examination those that belong to it."""
    return [_finding(check, evidence) for check in CHECKS if check.short or evidence.thorough]


def _finding(check: Check, evidence: Evidence) -> Finding:
    o = check.look(evidence)
    fine = o.verdict in (OK, SKIPPED)
    return Finding(
        check.name, o.verdict, o.value, o.limit, o.seen, "" if fine else check.means, "" if fine else check.remedy
    )
