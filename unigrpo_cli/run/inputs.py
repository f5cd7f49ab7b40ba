"""What a run reads before its model: rewards, prompts and the suite, all checked before anything is fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unigrpo_cli.config import Config, load_config, with_values
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import UsageError, suggest
from unigrpo_cli.evaluate import limited
from unigrpo_cli.models.hub import EMBEDDED
from unigrpo_cli.programs import PROGRAMS
from unigrpo_cli.rewards.batch import RewardContext
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rewards.spec import RewardSpec
from unigrpo_cli.run.answers import Answer, read_answers
from unigrpo_cli.run.setup import check_prompts, reward_choices
from unigrpo_cli.run.trackers import refuse_missing
from unigrpo_cli.suites import SHAPES, SuiteRegistry, default_suite, training_prompts
from unigrpo_cli.suites.prompts import TRAINING
from unigrpo_cli.training.maps import check_map

AUTO = "auto"


@dataclass(frozen=True)
class Inputs:
    """What a run trains on and is measured by.

    Args:
        config: with the suite that `eval.suite=auto` stands for.
        prompts: to train on, without those that are held out.
        suite: to evaluate on.
        answers: to imitate; there are no prompts then.
    """

    config: Config
    rewards: list[RewardSpec]
    prompts: list[Prompt]
    suite: list[Prompt]
    answers: tuple[Answer, ...] = ()


def read_inputs(config: Config, plugins: Plugins, say: Callable[[str], None], *, dry_run: bool = False) -> Inputs:
    """Read and check everything that needs no weights.

    Args:
        say: gets a line on prompts that are held out.
        dry_run: a reward need not be chosen yet; the verdict of the plan says so.
    """
    plugins.call("unigrpo_configure", config=config)
    refuse_missing(config)
    suites = SuiteRegistry()
    plugins.call("unigrpo_register_suites", registry=suites)
    automatic = config.eval.suite == AUTO
    config = with_suite(config)
    rewards = [] if dry_run and not config.reward.names else reward_choices(config)
    _refuse_unknown_best(config, rewards)
    answers = tuple(read_answers(config)) if config.sft.data else ()
    prompts = [] if answers else training_prompts(config.prompts, config.eval.suite)
    suite = limited(suites.prompts(config.eval.suite), config.eval.limit)
    program = PROGRAMS.find(config.sampling.program)
    for prompt in (*prompts, *suite):
        program.refuse_without_picture(prompt.text, prompt.image)
    _check_rewards(config, rewards, plugins, prompts, suite)
    if answers:
        thought = sum(answer.reasoning is not None for answer in answers)
        say(f"{len(answers)} answers to imitate, {thought} of them with reasoning")
    elif automatic and config.prompts not in TRAINING:
        say(_held_out_line(config, len(prompts), len(suite)))
    return Inputs(config, rewards, prompts, suite, answers)


def with_suite(config: Config) -> Config:
    """The configuration with the suite that `eval.suite=auto` stands for.

    The preset's eval.rewards are about shapes, so another suite drops them.
    """
    if config.eval.suite != AUTO:
        return config
    suite = default_suite(config.prompts)
    values: dict[str, object] = {"eval.suite": suite}
    if suite != SHAPES and config.eval.rewards == load_config(preset=config.preset).eval.rewards:
        values["eval.rewards"] = ()
    return with_values(config, values)


def _held_out_line(config: Config, training: int, held_out: int) -> str:
    if config.eval.suite == config.prompts:
        return (
            f"{config.prompts} has too few prompts to hold some out: evaluation and samples use the training prompts; "
            "set eval.suite=FILE to evaluate on others"
        )
    return (
        f"{config.prompts}: {training} prompts to train on, {held_out} held out (a tenth, by hash) for evaluation and "
        "samples; set eval.suite to evaluate on others"
    )


def _refuse_unknown_best(config: Config, rewards: Sequence[RewardSpec]) -> None:
    names = [reward.alias for reward in rewards]
    if config.eval.best and config.eval.best not in names:
        hint = suggest(config.eval.best, names)
        raise UsageError(f"eval.best={config.eval.best} is not a reward of this run: {hint}")


def _check_rewards(
    config: Config,
    rewards: Sequence[RewardSpec],
    plugins: Plugins,
    prompts: Sequence[Prompt],
    suite: Sequence[Prompt],
) -> None:
    """Find every reward and map, check options and what a reward needs of each prompt; set up nothing."""
    check_map(config, plugins)
    embedded = config.model == EMBEDDED or Path(config.model).exists()  # a model of the hub is not; a directory may be
    context = RewardContext(device="cpu", seed=config.seed, embedded=embedded, offline=True)
    with Scorer(rewards, plugins, context, local=False) as scorer:
        for split, asked in (("train", prompts), ("eval", suite)):
            check_prompts(scorer, asked, config.sampling.think, split)
            scorer.check_options([prompt.metadata for prompt in asked], split)
