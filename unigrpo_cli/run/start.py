"""A training run in its directory: begun or gone on with, and refused before anything is written that cannot be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import DiskError, UsageError
from unigrpo_cli.io.atomic import locked
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.config_diff import Change, Effect, flat
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.directory import Run, fresh_directory, scratch_directory
from unigrpo_cli.run.doctor import examine_at_start
from unigrpo_cli.run.inputs import read_inputs
from unigrpo_cli.run.memory import left_open
from unigrpo_cli.run.prepare import prepare, with_sizes
from unigrpo_cli.run.resume import (
    choose_checkpoint,
    not_comparable,
    quarantine_later,
    refuse_changes,
    with_kept_sizes,
)
from unigrpo_cli.run.setup import is_embedded, open_rewards, warn_of_unknown_words
from unigrpo_cli.run.signals import Interrupts
from unigrpo_cli.run.trainer import ABSTAINED, OWED, Trainer
from unigrpo_cli.training.optimizer import shards
from unigrpo_cli.training.rng_state import seed_generators
from unigrpo_cli.training.state import Origin, TrainState, checkpoints, prompt_list, read_state


def start(
    config: Config,
    plugins: Plugins,
    display: Display,
    out: Path | None,
    listener: Interrupts,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """A new run. Everything that can be refused is refused before its directory is made."""
    with ExitStack() as held:
        return _run(config, plugins, display, listener, ranks, held, out, None, None, None)


def resume(
    config: Config,
    plugins: Plugins,
    display: Display,
    directory: Path,
    wanted: Path | None,
    listener: Interrupts,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Go on with a run in its directory: from `wanted`, or its newest whole checkpoint, or else from the start.

    Raises:
        UsageError: when another process writes it, or settings are asked for that cannot change.
        WeightsError: when there is no whole checkpoint, or the model is not the one it began with.
    """
    with ExitStack() as held:
        found: dict[str, Any] = {}
        with ranks.together():
            if ranks.first:
                held.enter_context(locked(directory))
                for left in Run(directory).sweep():
                    display.warn(f"{left} was left half written by a process that was killed; it is removed")
                chosen = choose_checkpoint(directory, wanted, display.warn)
                found = {"from": chosen and str(chosen), "there": [path.name for path in checkpoints(directory)]}
        found = ranks.from_first(found)
        checkpoint = None if found["from"] is None else Path(found["from"])
        place = directory if ranks.first else held.enter_context(scratch_directory(found["there"]))
        return _run(config, plugins, display, listener, ranks, held, None, Run(place), checkpoint, wanted)


def _run(
    config: Config,
    plugins: Plugins,
    display: Display,
    listener: Interrupts,
    ranks: Ranks,
    held: ExitStack,
    out: Path | None,
    run: Run | None,
    checkpoint: Path | None,
    wanted: Path | None,
) -> dict[str, Any]:
    """All of a run.

    Args:
        run: the directory to go on in; None makes one at `out`.
        checkpoint: where to go on from; None begins.
    """
    began = time.perf_counter()
    inputs = read_inputs(config, plugins, display.say)
    config, prompts, suite = inputs.config, inputs.prompts, inputs.suite
    _refuse_what_ranks_cannot_share(config, prompts, ranks)
    content = None if checkpoint is None else read_state(checkpoint)
    asked, config = left_open(config), with_kept_sizes(content, config)
    if content is not None and asked:
        values = flat(config.model_dump())
        kept = ", ".join(f"{key}={values[key]}" for key in asked)
        display.say(f"{kept}: found when this run began; type a number to change it")
    if content is not None and checkpoint is not None:
        _say_changes(refuse_changes(content, checkpoint, config), display)
    config = with_sizes(config, checkpoint, [*prompts, *suite], display.say, ranks)
    state, reference, _ = prepare(config, checkpoint, content, display.warn, ranks)
    warn_of_unknown_words(state.policy, [*prompts, *suite], display.warn)
    seed_generators(derive(config.seed, "generators"))
    embedded, thinks = is_embedded(state.policy), config.sampling.think
    rewards = held.enter_context(open_rewards(inputs.rewards, plugins, config, embedded=embedded, ranks=ranks))
    with ranks.together():
        rewards.check_needs([p.metadata for p in prompts], has_reasoning=thinks, split="train")
        rewards.check_needs([p.metadata for p in suite], has_reasoning=thinks, split="eval")
    rewards.restore_abstentions(state.facts.get(ABSTAINED, {}))
    state.origin = Origin(config, reference, prompt_list(prompts), rewards.identities())
    for line in [] if content is None else not_comparable(content, state.origin):
        display.warn(line)
    fresh = run is None
    with ranks.together():
        if run is None:
            run = Run(fresh_directory(out, "train") if ranks.first else held.enter_context(scratch_directory(())))
            held.enter_context(locked(run.directory))
        else:
            quarantine_later(run.directory, checkpoint, "damaged" if wanted is None else "later", display.warn)
    try:
        with ranks.together():
            if changed := run.environment_changed():
                display.warn(f"this run goes on with {', '.join(changed)}: as before, but no longer to the bit")
            run.describe(config)
            run.forget_after(state.step, evaluated="eval" not in state.facts.get(OWED, ()))
            _examine(state, prompts, rewards, config, run, display)
        return Trainer(config, display, listener, run, state, rewards, prompts, suite, began).go()
    except DiskError as error:
        raise DiskError(f"{error}, then go on with `unigrpo train --resume {run.directory}`") from error
    finally:
        if fresh:
            run.remove_if_only_described()


def _examine(
    state: TrainState, prompts: Sequence[Prompt], rewards: Scorer, config: Config, run: Run, display: Display
) -> None:
    """The doctor's short examination: on the first rank, which has the others' weights, while they wait."""
    if state.policy.is_sharded:
        display.say("the doctor looks at whole weights only, so this run is not examined: `unigrpo doctor` does it")
    elif state.ranks.first:
        examine_at_start(replace(state, ranks=ALONE), prompts, rewards, config, run, display)


def _refuse_what_ranks_cannot_share(config: Config, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    """Groups are never split; and ranks with sharded weights make their passes together, so all need equally many.

    Raises:
        UsageError: for a number of prompts, or prompts of two kinds, that do not fit that.
    """
    ranks.refuse_uneven(config.train.prompts_per_step, config.train.minibatches)
    if shards(config, ranks) and len({prompt.image is None for prompt in prompts}) > 1:
        raise UsageError(
            "prompts with and without pictures cannot be mixed where weights are sharded: ranks would make other "
            "numbers of passes; give ranks.weights=whole, train.finetune=lora, or prompts of one kind"
        )


def _say_changes(found: Sequence[Change], display: Display) -> None:
    """One line for each setting that is not what it was; those that decide results are warnings."""
    for change in found:
        if change.effect in (Effect.NONE, Effect.ROUNDING):
            display.say(f"changed: {change}")
        else:
            display.warn(f"changed: {change}")
