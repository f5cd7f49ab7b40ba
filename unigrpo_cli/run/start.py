"""Start a training run, or resume one. What cannot work is refused before anything is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unigrpo_cli.algo.rng import derive
from unigrpo_cli.config import Config, with_values
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import DiskError, UsageError, quoted
from unigrpo_cli.io.atomic import locked
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.run.answers import demonstrations
from unigrpo_cli.run.checkpoint import StateFile, checkpoints, read_state
from unigrpo_cli.run.config_diff import Change, Effect, effect_of, flat
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.directory import Run, fresh_directory, scratch_directory
from unigrpo_cli.run.doctor import examine_at_start
from unigrpo_cli.run.inputs import read_inputs, with_suite
from unigrpo_cli.run.memory import left_open
from unigrpo_cli.run.prepare import prepare, with_sizes
from unigrpo_cli.run.resume import (
    choose_checkpoint,
    not_comparable,
    quarantine_later,
    refuse_changes,
    with_kept_sizes,
)
from unigrpo_cli.run.setup import check_prompts, is_embedded, open_rewards, warn_of_unknown_words
from unigrpo_cli.run.signals import Interrupts
from unigrpo_cli.run.trackers import open_trackers
from unigrpo_cli.run.trainer import Trainer
from unigrpo_cli.training.optimizer import shards
from unigrpo_cli.training.rng_state import seed_generators
from unigrpo_cli.training.state import Origin, TrainState, prompt_list


@dataclass(frozen=True)
class Place:
    """Where a run writes, and where it continues.

    Args:
        out: `--out` of a new run.
        files: the directory of a run that is resumed; None makes one.
        checkpoint, content: the checkpoint to resume from, and its state file; None starts at step 0.
        wanted: the checkpoint was named by the user.
    """

    out: Path | None = None
    files: Run | None = None
    checkpoint: Path | None = None
    content: StateFile | None = None
    wanted: bool = False


@dataclass(frozen=True)
class FinishedRun:
    """A resumed run without steps left: `run` returns the summary it has."""

    summary: dict[str, Any]

    def run(self) -> dict[str, Any]:
        return self.summary


@contextmanager
def opened_run(
    config: Config,
    plugins: Plugins,
    display: Display,
    out: Path | None,
    directory: Path | None,
    wanted: Path | None,
    interrupts: Interrupts,
    ranks: Ranks,
) -> Iterator[Trainer | FinishedRun]:
    """The trainer of a new run in `out`, or of the one that is resumed in `directory`.

    All that can be refused is refused before a new directory is made. A run is resumed from `wanted`, or its newest
    intact checkpoint, or else from the start; one that is finished stays as it is.
    """
    with ExitStack() as held:
        place = Place(out)
        if directory is not None:
            found: dict[str, Any] = {}
            with ranks.together():
                if ranks.first:
                    held.enter_context(locked(directory))
                    for path in Run(directory).remove_partial():
                        display.warn(f"removed {path}, which a killed process left half written")
                    chosen = choose_checkpoint(directory, wanted, display.warn)
                    finished = None if chosen is None else _finished(directory, chosen, config, display)
                    names = [path.name for path in checkpoints(directory)]
                    found = {"checkpoint": chosen and str(chosen), "names": names, "finished": finished}
            found = ranks.from_first(found)
            if found["finished"] is not None:
                yield FinishedRun(found["finished"])
                return
            checkpoint = None if found["checkpoint"] is None else Path(found["checkpoint"])
            content = None if checkpoint is None else read_state(checkpoint)
            directory = directory if ranks.first else held.enter_context(scratch_directory(found["names"]))
            place = Place(None, Run(directory), checkpoint, content, wanted is not None)
        with _prepared(config, plugins, display, interrupts, ranks, held, place) as trainer:
            yield trainer


def _finished(directory: Path, checkpoint: Path, config: Config, display: Display) -> dict[str, Any] | None:
    """The summary of a run that has no steps left; None for one that has something to do."""
    content, summary = read_state(checkpoint), Run(directory).summary()
    config = with_kept_sizes(content, with_suite(config))
    changed = [change.key for change in refuse_changes(content, checkpoint, config)]
    unfinished = content.record.pending or content.step < config.train.steps
    if summary is None or unfinished or summary.get("steps") != content.step:
        return None
    for line in Run(directory).forget_after(content.step):
        display.warn(line)
    unused = [key for key in changed if effect_of(key) in (Effect.LEARNED, Effect.MEASURED)]
    if unused:
        display.say(f"not used, because no step is left: {', '.join(unused)}")
    display.say(
        f"nothing to do: the run has finished its {content.step} steps and stays as it is; train further with --steps "
        f"{content.step + 100}, or score it with unigrpo eval --model {quoted(directory)}"
    )
    return summary


@contextmanager
def _prepared(
    config: Config,
    plugins: Plugins,
    display: Display,
    interrupts: Interrupts,
    ranks: Ranks,
    held: ExitStack,
    place: Place,
) -> Iterator[Trainer]:
    """Load, check and describe a run. `held` keeps rewards and locks until it ends."""
    began = time.perf_counter()
    content, files = place.content, place.files
    inputs = read_inputs(config, plugins, display.say)
    config, suite = inputs.config, inputs.suite
    prompts: Sequence[Prompt] = inputs.prompts
    _refuse_uneven_ranks(config, prompts, ranks)
    asked, config = left_open(config), with_kept_sizes(content, config)
    if content is not None and place.checkpoint is not None:
        if asked:
            values = flat(config.model_dump())
            kept = ", ".join(f"{key}={values[key]}" for key in asked)
            display.say(f"{kept}: chosen when this run started; give a number to change it")
        _say_changes(refuse_changes(content, place.checkpoint, config), display)
    config = with_sizes(config, place.checkpoint, [*prompts, *suite], display.say, ranks)
    state, reference = prepare(config, place.checkpoint, content, display.warn, ranks)
    if inputs.answers:
        with ranks.together():
            prompts = demonstrations(state.policy, inputs.answers, config)
    warn_of_unknown_words(state.policy, [*prompts, *suite], display.warn)
    seed_generators(derive(config.seed, "generators"))
    embedded, thinks = is_embedded(state.policy), config.sampling.think
    rewards = held.enter_context(open_rewards(inputs.rewards, plugins, config, embedded=embedded, ranks=ranks))
    with ranks.together():
        check_prompts(rewards, prompts, thinks, "train")
        check_prompts(rewards, suite, thinks, "eval")
    rewards.restore_abstentions(state.record.abstained)
    state.origin = Origin(config, reference, prompt_list(prompts), rewards.identities())
    for line in [] if content is None else not_comparable(content, state.origin):
        display.warn(line)
    with ranks.together():
        if files is None:
            scratch = None if ranks.first else held.enter_context(scratch_directory(()))
            files = Run(scratch or fresh_directory(place.out, config.command))
            held.enter_context(locked(files.directory))
        else:
            quarantine_later(files.directory, place.checkpoint, "later" if place.wanted else "damaged", display.warn)
    try:
        with ranks.together():
            if changed := files.environment_changed():
                versions = ", ".join(changed)
                display.warn(f"package versions changed ({versions}): resuming is no longer bitwise reproducible")
            files.describe(config)
            for line in files.forget_after(state.step, evaluated="eval" not in state.record.pending):
                if ranks.first:
                    display.warn(line)
            _examine(state, prompts, rewards, config, files, display)
        observed = config if ranks.first else with_values(config, {"train.report_to": ()})
        trackers = held.enter_context(open_trackers(observed, files, state.step, display))
        yield Trainer(config, display, interrupts, files, state, rewards, trackers, prompts, suite, began)
    except DiskError as error:
        raise DiskError(f"{error}, then resume: unigrpo {config.command} --resume {quoted(files.directory)}") from error
    finally:
        if place.files is None:
            files.remove_if_only_described()


def _examine(
    state: TrainState, prompts: Sequence[Prompt], rewards: Scorer, config: Config, files: Run, display: Display
) -> None:
    """The doctor's short checks, on the first rank while the others wait. They are about reinforcement learning."""
    if config.sft.data:
        return
    if state.policy.is_sharded:
        display.say("weights are sharded, so the doctor's checks are left out here; run `unigrpo doctor` for them")
    elif state.ranks.first:
        examine_at_start(replace(state, ranks=ALONE), prompts, rewards, config, files, display)


def _refuse_uneven_ranks(config: Config, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    """Groups are never split, and ranks with sharded weights need equally many passes."""
    ranks.refuse_uneven(config.train.prompts_per_step, config.train.minibatches)
    if shards(config, ranks) and len({len(prompt.pictures) for prompt in prompts}) > 1:
        raise UsageError(
            "prompts with different numbers of pictures cannot be mixed when weights are sharded, because ranks would "
            "make different numbers of passes; give ranks.weights=whole, train.finetune=lora, or prompts of one kind"
        )
    if shards(config, ranks) and config.sft.data and config.sft.drop > 0:
        raise UsageError(
            f"sft.drop={config.sft.drop} leaves out texts, so ranks with sharded weights would make different numbers "
            "of passes; give ranks.weights=whole, train.finetune=lora, or sft.drop=0"
        )
    if shards(config, ranks) and config.sampling.rounds > 1 and config.sampling.stop_phrase:
        raise UsageError(
            f"episodes may stop early (sampling.stop_phrase={config.sampling.stop_phrase}), so ranks with sharded "
            "weights would make different numbers of passes; give ranks.weights=whole, train.finetune=lora, or "
            'sampling.stop_phrase=""'
        )


def _say_changes(found: Sequence[Change], display: Display) -> None:
    """One line per changed setting; a warning when it decides results."""
    for change in found:
        if change.effect in (Effect.NONE, Effect.ROUNDING):
            display.say(f"changed: {change}")
        else:
            display.warn(f"changed: {change}")
