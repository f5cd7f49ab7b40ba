"""All checks in one table, with what a fault means and what to do; docs/troubleshooting.md is generated from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.doctor import image_checks, replay_checks, reward_checks, text_checks, update_checks
from unigrpo_cli.run.doctor.findings import OK, SKIPPED, Finding, Outcome
from unigrpo_cli.run.doctor.probe_step import record
from unigrpo_cli.run.doctor.recording import Recording
from unigrpo_cli.training.state import TrainState

REPORT = "run without --plugin; if the fault stays, report it with the output of `unigrpo doctor --json`"


@dataclass(frozen=True)
class DoctorCheck:
    """One check.

    Args:
        run: reads the recording.
        means: what a fault means for training.
        remedy: what to do.
        short: part of the examination at the start of a run.
    """

    name: str
    run: Callable[[Recording], Outcome]
    means: str
    remedy: str
    short: bool = True


CHECKS = (
    DoctorCheck(
        "tokens",
        text_checks.tokens,
        "recorded or replayed ids or images are not those the network received (decoded text was encoded again, say), "
        "so training reinforces tokens that were not sampled, or under another image",
        REPORT,
    ),
    DoctorCheck(
        "stop-token",
        text_checks.stop_token,
        "the stop token is an action: if it is not scored, the policy does not learn to stop; if the network does not "
        "receive it, the image has another context in rollout than in replay",
        REPORT,
    ),
    DoctorCheck(
        "temperature",
        text_checks.temperature,
        "tokens are sampled, recorded or scored at different temperatures, so another policy is trained than sampled",
        REPORT,
    ),
    DoctorCheck(
        "truncation",
        text_checks.truncation,
        "images are painted from unfinished text, and the policy does not learn to stop",
        "raise sampling.max_new_tokens, or add the reward length",
    ),
    DoctorCheck(
        "group-noise",
        image_checks.group_noise,
        "episodes or rounds share noise, or it has the wrong size, so a group explores less than its size suggests",
        REPORT,
    ),
    DoctorCheck(
        "window",
        image_checks.window,
        "members of a group have noise at different steps, so their rewards cannot be compared and training collapses",
        REPORT,
    ),
    DoctorCheck(
        "schedule",
        image_checks.schedule,
        "a step is sampled at one time and scored at another, or a network call is missing",
        REPORT,
    ),
    DoctorCheck(
        "latents",
        image_checks.latents,
        "latents were rounded or changed between sampling and replay, so the log-ratio is of another step",
        REPORT,
    ),
    DoctorCheck(
        "looks",
        image_checks.looks,
        "an episode looks at an image that it did not paint, or in another way than sampling.show_images says, so its "
        "words and its next image are about something else",
        REPORT,
    ),
    DoctorCheck(
        "repeats",
        image_checks.repeats,
        "the seed does not determine the episodes: a run can be neither repeated nor resumed exactly",
        "use a plugin or a model that draws no random numbers of its own",
        short=False,
    ),
    DoctorCheck(
        "replay",
        replay_checks.replayable,
        "the sampled episodes cannot be scored again, so nothing can be trained",
        "fix the faults above first; the cause is usually the window or the temperature",
    ),
    DoctorCheck(
        "text-ratio",
        replay_checks.text_ratio,
        "old and current policy have the same weights but give tokens different probabilities: stale old scores, "
        "dropout, or an attention kernel that rounds differently with gradients",
        "turn off dropout and plugins that change the network; with a GPU try dtype=float32",
    ),
    DoctorCheck(
        "image-ratio",
        replay_checks.image_ratio,
        "old and current policy have the same weights but give denoising steps different probabilities: stale old "
        "scores, dropout, or an attention kernel that rounds differently with gradients",
        "turn off dropout and plugins that change the network; with a GPU try dtype=float32",
    ),
    DoctorCheck(
        "text-drift",
        replay_checks.text_drift,
        "decoding and replay give tokens different probabilities, by more than rounding",
        "fix faults of the check tokens first; if bfloat16 alone is the cause, raise doctor.text_drift",
    ),
    DoctorCheck(
        "image-drift",
        replay_checks.image_drift,
        "sampling and replay give denoising steps different probabilities, by more than rounding",
        "fix faults of the checks schedule, latents and tokens first; if bfloat16 alone is the cause, raise "
        "doctor.image_drift",
    ),
    DoctorCheck(
        "advantages",
        update_checks.advantages,
        "episodes are weighted by the advantage of another episode, or worse episodes have larger advantages, so the "
        "policy learns something else or the opposite",
        "check higher_is_better and the weight of each reward, the order of a reward's scores (one per sample, in the "
        "order of the batch), and plugins with unigrpo_combine_rewards",
    ),
    DoctorCheck(
        "gradients",
        update_checks.gradients,
        "some weights that should be trained get no gradient and stay as they are",
        "check train.experts, train.extra_modules and plugins that freeze weights",
    ),
    DoctorCheck(
        "reference",
        update_checks.reference,
        "the penalty does not compare the policy with its starting point, so nothing holds the policy",
        "remove plugins that wrap the network or its adapters; start from the model that the reference should be",
    ),
    DoctorCheck(
        "reward-spread",
        reward_checks.reward_spread,
        "equal rewards within a group give all its members an advantage of 0",
        "run `unigrpo rewards test NAME`; for a rare success raise doctor.members or use a graded reward",
    ),
    DoctorCheck(
        "reward-repeats",
        reward_checks.reward_repeats,
        "a large part of the advantage is the reward's own randomness",
        "let the judge decode greedily, or average several answers",
    ),
    DoctorCheck(
        "reward-abstains",
        reward_checks.reward_abstains,
        "episodes without a score teach nothing",
        "read `info` in rewards.json of `unigrpo rollout`; choose other prompts, or raise reward.max_abstain",
    ),
)


def examine(
    state: TrainState, prompts: Sequence[Prompt], rewards: Scorer, config: Config, *, thorough: bool
) -> list[Finding]:
    """Record a small training step and run the checks on it; without `thorough` only the short ones."""
    recording = record(state, prompts, rewards, config, thorough=thorough)
    return [_finding(check, check.run(recording)) for check in CHECKS if check.short or thorough]


def _finding(check: DoctorCheck, o: Outcome) -> Finding:
    if o.verdict in (OK, SKIPPED):
        return Finding(check.name, o.verdict, o.value, o.limit, o.seen, "", "")
    return Finding(check.name, o.verdict, o.value, o.limit, o.seen, o.means or check.means, o.remedy or check.remedy)
