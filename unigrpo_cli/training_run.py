"""A training run from start to report: evaluate, train, evaluate again, and leave a directory behind."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.table import Table

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.doctor import examine_at_start
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import DiskError, NotFetchedError, UnigrpoError, UsageError, WeightsError, suggest
from unigrpo_cli.estimate import batch_of, left_open
from unigrpo_cli.evaluate import (
    NO_NOISE,
    Evaluation,
    compare,
    eval_sampling,
    evaluate,
    limited,
    load_report,
    paired,
    samples_of,
)
from unigrpo_cli.models import Policy
from unigrpo_cli.models.checkpoint import restore_weights
from unigrpo_cli.models.hub import locate
from unigrpo_cli.models.release import read_release, weights_digest
from unigrpo_cli.models.sharding import gathered, is_sharded
from unigrpo_cli.models.unified import UnifiedModel
from unigrpo_cli.outgrown import outgrown
from unigrpo_cli.peers import launched
from unigrpo_cli.plan import Plan, plan_of, refuse_too_large, said_of_sizes
from unigrpo_cli.ranks import ALONE, Ranks
from unigrpo_cli.rewards.grammar import RewardChoice
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scoring import RewardSet
from unigrpo_cli.rollout import rollout
from unigrpo_cli.runtime.batches import save_bad_step
from unigrpo_cli.runtime.changes import Change, Effect, flat
from unigrpo_cli.runtime.display import Display
from unigrpo_cli.runtime.durable import locked, point
from unigrpo_cli.runtime.generators import put_generators, read_generators, seed_generators
from unigrpo_cli.runtime.interrupts import DroppedError, Interrupts
from unigrpo_cli.runtime.resume import (
    choose_checkpoint,
    not_comparable,
    refuse_changes,
    set_later_aside,
    with_kept_sizes,
)
from unigrpo_cli.runtime.run import Run, fresh_directory, scratch_directory
from unigrpo_cli.runtime.samples import SHOWN, save_progress, save_samples
from unigrpo_cli.runtime.state import (
    Origin,
    Reference,
    TrainState,
    checkpoints,
    prompt_list,
    prune_checkpoints,
    read_state,
    restore_state,
    save_state,
)
from unigrpo_cli.seeds import derive
from unigrpo_cli.session import (
    find_checkpoint,
    is_embedded,
    load_policy,
    model_of,
    open_rewards,
    reward_choices,
    warn_of_unknown_words,
)
from unigrpo_cli.suites import SuiteRegistry, task_of, training_prompts
from unigrpo_cli.train import Step, train
from unigrpo_cli.tuning import make_optimizer, prepare_policy, shards
from unigrpo_cli.watch import Watch

ABSTAINED = "abstained"
"""The fact that holds on which of the last samples each reward abstained, for `reward.max_abstain`."""
OWED = "owed"
"""The fact that names what a step that is done still lacks, an evaluation or samples, in order."""


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


def go_on(
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


def plan(config: Config, checkpoint: Path | None) -> Plan:
    """What a run would take, by the model's headers: reads no weight, opens no reward, writes nothing.

    Raises:
        UsageError: when groups cannot be shared out among the ranks.
    """
    rank, world, here = launched()
    Ranks(rank, world, here).refuse_uneven(config.train.prompts_per_step, config.train.updates)
    if checkpoint is not None:
        content = read_state(checkpoint)
        config = with_kept_sizes(content, config)
        refuse_changes(content, checkpoint, config)
    return plan_of(config, *_origin(config, checkpoint, fetch=False), elsewhere=True)


def with_sizes(
    config: Config,
    checkpoint: Path | None,
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> Config:
    """The configuration with numbers for the sizes of batches that it leaves open: those that fit every rank."""
    if not left_open(config):
        return config
    with ranks.together():
        pictures = any(prompt.image for prompt in prompts)
        planned = plan_of(config, *_origin(config, checkpoint), pictures=pictures)
    every = ranks.gather(planned.sizes)
    sizes = {key: min(own[key] for own in every) for key in planned.sizes}
    say(said_of_sizes(sizes, planned.free))
    return with_values(config, sizes)


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
    plugins.call("unigrpo_configure", config=config)
    choices = reward_choices(config)
    _refuse_unknown_best(config, choices)
    suites = SuiteRegistry()
    plugins.call("unigrpo_register_suites", registry=suites)
    prompts = training_prompts(config.prompts)
    _refuse_what_ranks_cannot_share(config, prompts, ranks)
    suite = limited(suites.prompts(config.eval.suite), config.eval.limit)
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
    rewards = held.enter_context(open_rewards(choices, plugins, config, embedded=embedded, ranks=ranks))
    with ranks.together():
        rewards.check_needs([p.metadata for p in prompts], has_reasoning=thinks, split="train")
        rewards.check_needs([p.metadata for p in suite], has_reasoning=thinks, split="eval")
    rewards.remember(state.facts.get(ABSTAINED, {}))
    state.origin = Origin(config, reference, prompt_list(prompts), rewards.identities())
    for line in [] if content is None else not_comparable(content, state.origin):
        display.warn(line)
    fresh = run is None
    with ranks.together():
        if run is None:
            run = Run(fresh_directory(out, "train") if ranks.first else held.enter_context(scratch_directory(())))
            held.enter_context(locked(run.directory))
        else:
            set_later_aside(run.directory, checkpoint, "damaged" if wanted is None else "later", display.warn)
    try:
        with ranks.together():
            if changed := run.environment_changed():
                display.warn(f"this run goes on with {', '.join(changed)}: as before, but no longer to the bit")
            run.describe(config)
            run.forget_after(state.step, evaluated="eval" not in state.facts.get(OWED, ()))
            _examine(state, prompts, rewards, config, run, display)
        return _Session(config, display, listener, run, state, rewards, prompts, suite, began).go()
    except DiskError as error:
        raise DiskError(f"{error}, then go on with `unigrpo train --resume {run.directory}`") from error
    finally:
        if fresh:
            run.remove_if_only_described()


def _examine(
    state: TrainState, prompts: Sequence[Prompt], rewards: RewardSet, config: Config, run: Run, display: Display
) -> None:
    """The doctor's short examination: on the first rank, which has the others' weights, while they wait."""
    if is_sharded(state.policy.network):
        display.say("the doctor looks at whole weights only, so this run is not examined: `unigrpo doctor` does it")
    elif state.ranks.first:
        examine_at_start(replace(state, ranks=ALONE), prompts, rewards, config, run, display)


def _refuse_what_ranks_cannot_share(config: Config, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    """Groups are never split; and ranks with sharded weights make their passes together, so all need equally many.

    Raises:
        UsageError: for a number of prompts, or prompts of two kinds, that do not fit that.
    """
    ranks.refuse_uneven(config.train.prompts_per_step, config.train.updates)
    if shards(config, ranks) and len({prompt.image is None for prompt in prompts}) > 1:
        raise UsageError(
            "prompts with and without pictures cannot be mixed where weights are sharded: ranks would make other "
            "numbers of passes; give ranks.weights=whole, train.tune=lora, or prompts of one kind"
        )


def _refuse_unknown_best(config: Config, choices: Sequence[RewardChoice]) -> None:
    """`eval.best` must name a reward that evaluations ask."""
    names = [choice.alias for choice in choices]
    if config.eval.best and config.eval.best not in names:
        raise UsageError(
            f"eval.best={config.eval.best} is no reward of this run: {suggest(config.eval.best, names)}"
        )


def _say_changes(found: Sequence[Change], display: Display) -> None:
    """One line for each setting that is not what it was; those that decide results are warnings."""
    for change in found:
        if change.effect in (Effect.NONE, Effect.ROUNDING):
            display.say(f"changed: {change}")
        else:
            display.warn(f"changed: {change}")


def _origin(config: Config, checkpoint: Path | None, fetch: bool = True) -> tuple[str, str | None]:
    """The base, and the adapter that it begins with: of a fresh run, or as a checkpoint has them."""
    if checkpoint is None:
        try:
            name = model_of(config, fetch)
        except NotFetchedError:
            name = config.model
        base, own_adapter = find_checkpoint(name)
        adapter = config.adapter or own_adapter
        if adapter and config.train.tune == "full":
            raise UsageError("train.tune=full cannot start from an adapter; use --set train.tune=lora")
        return base, adapter
    content = read_state(checkpoint)
    base = content["base"]
    if Path(base).is_absolute() and not Path(base).exists():  # it was moved: take it where it is now said to be
        base = find_checkpoint(model_of(config, fetch))[0]
    return base, str(checkpoint) if content["tune"] == "lora" else None


def prepare(
    config: Config,
    checkpoint: Path | None,
    content: dict[str, Any] | None,
    warn: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> tuple[TrainState, Reference, Plan]:
    """Policy, optimizer, what the base is and what it will take, fresh or as a checkpoint left them.

    The reference is always the base: never the weights that a run is resumed from, and with adapters the network
    without them, also when training starts from an adapter.
    """
    base, adapter = _origin(config, checkpoint)
    planned = plan_of(config, base, adapter)
    refuse_too_large(planned)
    if planned.present is not None and planned.available > planned.present:
        warn(f"memory_gb={config.memory_gb:g}, but there are only {planned.present:.1f} GiB")
    reference = Reference(base, weights_digest(read_release(*locate(base))))
    if content is None or checkpoint is None:
        policy = load_policy(model_of(config), config.adapter, config)
        _warn_of_rank(policy, config, warn)
        policy = prepare_policy(policy, config, ranks)
        return TrainState(policy, make_optimizer(policy, config), ranks=ranks), reference, planned
    if reference.digest != content["reference"]:
        raise WeightsError(
            f"{base} does not hold the weights that this run began with, which stay its reference; put those of "
            f"{content['base']} back, or begin a new run from the checkpoint with --model {checkpoint}"
        )
    policy = prepare_policy(load_policy(base, adapter, config), config, ranks)
    if adapter is None:
        restore_weights(policy.network, checkpoint)
    state = TrainState(policy, make_optimizer(policy, config), ranks=ranks)
    restore_state(state, checkpoint, content)
    return state, reference, planned


def _warn_of_rank(policy: UnifiedModel, config: Config, warn: Callable[[str], None]) -> None:
    """An adapter that training starts from has a rank of its own."""
    own = getattr(policy.network, "adapter_config", None)
    if own is not None and (own.r, own.lora_alpha) != (config.train.lora_rank, config.train.lora_alpha):
        warn(
            f"the adapter has rank {own.r} and alpha {own.lora_alpha:g}, which stay; train.lora_rank and "
            "train.lora_alpha are for fresh adapters"
        )


class _Session:
    """One run's moving parts, and the order of its chapters."""

    def __init__(
        self,
        config: Config,
        display: Display,
        listener: Interrupts,
        run: Run,
        state: TrainState,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        suite: Sequence[Prompt],
        began: float,
    ):
        assert state.origin is not None
        self.config, self.display, self.interrupts, self.run, self.state = config, display, listener, run, state
        self.base, self.ranks = state.origin.reference.base, state.ranks
        self.rewards, self.prompts, self.suite, self.began = rewards, prompts, suite, began
        self.shown = _a_few_of_each_task(suite, SHOWN)
        self.bad_steps = Path(self.ranks.from_first(str(run.directory))) / "bad_steps"
        if not self.ranks.first:  # each keeps the episodes that it drew
            self.bad_steps /= f"rank_{self.ranks.rank}"
        asked = rewards.asked("train")
        signs = {r.alias: 1 if getattr(r.reward, "higher_is_better", True) else -1 for r in asked}
        self.watch = Watch(state.facts.setdefault("watch", {}), config, rewards.weights, signs)
        self.logged = state.step  # the last step whose metrics are on disk
        self.settled: dict[str, Any] = {}  # facts as they were when it was done

    def go(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again. A first interrupt ends it after the step at hand."""
        config, state, display = self.config, self.state, self.display
        display.say(_headline(config, self.base, self.run.directory, state))
        if state.step > config.train.steps:
            display.warn(f"the checkpoint is of step {state.step}, beyond train.steps={config.train.steps}")
        if state.generators is not None:
            put_generators(state.generators)
        self._settle()
        with self._listening():
            self._begin()
            trained = time.perf_counter()
            self._train()
            seconds = time.perf_counter() - trained
            if not self.run.checkpoint(state.step).exists():
                self.checkpoint()
            after = self._evaluated_after()
        summary = self._summary(seconds, interrupted=after is None)
        if after is None:
            display.say(
                f"interrupted after step {state.step}; go on with `unigrpo train --resume {self.run.directory}`"
            )
        else:
            summary |= self._compared(after)
            self._report(summary)
        summary["seconds"] = time.perf_counter() - self.began
        self.run.write_json("summary.json", summary)
        return summary

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """From here on an interrupt asks, and drops only what can be done again or has not begun to count.

        Raises:
            KeyboardInterrupt: when one came while everything was loaded.
        """
        listener = self.interrupts
        listener.tell = self.display.warn
        listener.ranks = None if self.ranks.alone else self.ranks
        listener.moving = lambda: self.state.between or self.state.step != self.logged
        if listener:
            raise KeyboardInterrupt
        listener.training = True
        try:
            yield
        finally:
            listener.training = False

    def _begin(self) -> None:
        """What comes before the first step, or what a step before an interrupt still owes."""
        facts = self.state.facts
        if "eval_before" not in facts:
            with self.interrupts.droppable():
                facts["eval_before"] = self.evaluate("before").means()
                self.samples()
            self._settle()
        if facts.get(OWED):
            self._pay()
            if not facts[OWED]:
                self.checkpoint()

    def _train(self) -> None:
        """Training steps. Whatever stops one before its weights move, a reward say, loses no step before it."""
        config, state, run = self.config, self.state, self.run
        self.interrupts.agree()
        if self.interrupts:
            return
        try:
            with self.display.training(config.train.steps, state.step, list(self.rewards.weights)) as view:

                def after_step(step: Step) -> bool:
                    with self.interrupts.shield():
                        self._remember(step.metrics)
                        warnings = self.watch.see(step.metrics, step.skipped)
                        run.log({"step": state.step} | step.metrics | self.watch.row(step.skipped))
                        self.logged = state.step
                        for line in warnings:
                            self.display.warn(f"step {state.step}: {line}")
                        view.update(state.step, step.metrics, self.watch.lasting)
                        self._owe()
                        with self.ranks.together():
                            self._study(step)
                    self.interrupts.agree()
                    self._pay()
                    best = state.facts.get("best") or {}
                    last = bool(self.interrupts) or state.step == config.train.steps
                    if last or self._due(config.train.checkpoint_every) or best.get("step") == state.step:
                        self.checkpoint()
                    return bool(self.interrupts)

                micro = min(config.train.micro_batch, batch_of(config).each)
                with outgrown("replays or an update", "train.micro_batch", micro):  # rollouts have their own
                    train(state, self.prompts, self.rewards, config, after_step)
        except DiskError:  # another checkpoint would not find room either
            raise
        except (Exception, KeyboardInterrupt) as error:
            whole = not state.between and self.logged == state.step
            here = self.ranks.alone or getattr(error, "everywhere", False)  # else the others are somewhere else
            if whole and here and not run.checkpoint(state.step).exists():
                state.facts = self.settled
                self.checkpoint()
            if checkpoints(run.directory):
                self.display.warn(
                    f"stopped after step {state.step}; when the cause is mended, go on with "
                    f"`unigrpo train --resume {run.directory}`"
                )
            raise

    def _owe(self) -> None:
        """Note what is to be done now that a step is done, so that a run that stops before can do it later."""
        owed = []
        if self._due(self.config.eval.every):
            owed.append("eval")
        if self._due(self.config.train.samples_every) or self.state.step == self.config.train.steps:
            owed.append("samples")
        self.state.facts[OWED] = owed
        self._settle()

    def _pay(self) -> None:
        """Do it, until an interrupt comes."""
        facts = self.state.facts
        while facts[OWED]:
            try:
                with self.interrupts.droppable():
                    if facts[OWED][0] == "eval":
                        self._evaluate_within()
                    else:
                        self.samples()
            except DroppedError:
                return
            facts[OWED] = facts[OWED][1:]
            self._settle()

    def _settle(self) -> None:
        """Note where things stand, for a checkpoint that is made because something after it failed."""
        self.state.generators = read_generators()
        self.state.facts[ABSTAINED] = self.rewards.recent()
        self.settled = copy.deepcopy(self.state.facts)

    def _evaluate_within(self) -> None:
        """A held-out evaluation between steps: a line of metrics, and whether it is the best so far."""
        step, facts, name = self.state.step, self.state.facts, self.config.eval.best
        means = self._evaluation(f"evaluating step {step}").means()
        with self.interrupts.shield():
            self.run.log({"step": step} | {f"eval/{key}": value for key, value in means.items()})
            sign = {r.alias: 1 if getattr(r.reward, "higher_is_better", True) else -1 for r in self.rewards.rewards}
            best = facts.get("best") or {}
            if best.get("reward") != name:
                best = {}
            value = means.get(name)
            if value is not None and (not best or sign[name] * value > sign[name] * best["value"]):
                facts["best"] = {"reward": name, "value": value, "step": step}

    def _evaluated_after(self) -> Evaluation | None:
        """The last evaluation; None when an interrupt has come before it was done."""
        try:
            with self.interrupts.droppable():
                return self.evaluate("after")
        except DroppedError:
            return None

    def _compared(self, after: Evaluation) -> dict[str, Any]:
        """The last evaluation beside the first, if that is still there and was made the same way."""
        found: dict[str, Any] = {"eval_after": after.means(), "intervals": {"after": _intervals(after)}}
        try:
            before = load_report(self.run.directory / "eval_before.json")
        except UnigrpoError as error:
            self.display.warn(f"no difference is reported: {error}")
            return found | {"difference": {}}
        if not paired(before, after):
            self.display.warn("no difference is reported: the evaluations used other prompts or settings")
            return found | {"difference": {}}
        found["intervals"]["before"] = _intervals(before)
        return found | {"difference": compare(before, after, self.config.eval.seed)}

    def evaluate(self, when: str) -> Evaluation:
        """The suite, written to eval_<when>.json."""
        result = self._evaluation(f"evaluating {when} training")
        with self.interrupts.shield():
            self.run.write_json(f"eval_{when}.json", result.report(values=True))
        return result

    def _evaluation(self, what: str) -> Evaluation:
        config = self.config
        with self.display.progress(len(self.suite) * config.eval.samples, what) as advance:
            with gathered(self.state.policy) as sampler:
                return evaluate(
                    sampler,
                    self.suite,
                    self.rewards,
                    eval_sampling(config),
                    samples=config.eval.samples,
                    seed=config.eval.seed,
                    ranks=self.ranks,
                    on_rows=lambda rows: advance(rows * self.ranks.world),
                )

    def samples(self) -> None:
        """The same held-out prompts on the same noise, as pictures."""
        if not self.shown:
            return
        with gathered(self.state.policy) as sampler, self.ranks.together():
            if self.ranks.first:
                self._paint(sampler)

    def _paint(self, sampler: Policy) -> None:
        config, step = self.config, self.state.step
        groups = rollout(sampler, self.shown, 1, eval_sampling(config), NO_NOISE, config.eval.seed)
        scored = self.rewards.score(samples_of(groups), step=step, split="eval")
        folder = self.run.directory / "samples"
        with self.interrupts.shield():
            save_samples(groups, scored, folder, step)
            save_progress(folder)

    def checkpoint(self) -> None:
        """Save the state, point to it, and remove those that need not stay."""
        t, best = self.config.train, (self.state.facts.get("best") or {}).get("step")
        folder = self.run.directory / "checkpoints"
        with self.interrupts.shield():
            self.run.keep_metrics()
            path = self.run.checkpoint(self.state.step)
            save_state(self.state, path)
            point(folder / "last", path.name)
            if best is None or not self.run.checkpoint(best).exists():
                (folder / "best").unlink(missing_ok=True)
            else:
                point(folder / "best", self.run.checkpoint(best).name)
            prune_checkpoints(self.run.directory, t.keep_checkpoints, t.keep_every, best)

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _remember(self, metrics: dict[str, float]) -> None:
        """Facts for the report: the first step's ratios, and the largest drift of all steps."""
        facts = self.state.facts
        for kind in ("text", "image"):
            first = metrics.get(f"{kind}/first_max_abs_log_ratio")
            facts.setdefault("ratio_step0_max_abs_log", {}).setdefault(kind, first)
            drift = metrics.get(f"{kind}/drift_max")
            known = facts.setdefault("rollout_drift_max_abs", {}).setdefault(kind, drift)
            if drift is not None and known is not None:
                facts["rollout_drift_max_abs"][kind] = max(drift, known)

    def _study(self, step: Step) -> None:
        """Keep the batch of a skipped step, and stop after too many of them."""
        if step.skipped is not None:
            found = (step.groups, step.scored, step.advantage_B, step.metrics)
            path = save_bad_step(self.bad_steps, self.state.step, step.skipped, *found)
            try:
                self.watch.stop_if_diverged(self.state.step, step.skipped, str(path))
            finally:
                self._settle()  # the count begins anew in the checkpoint of this stop, too

    def _summary(self, train_seconds: float, interrupted: bool) -> dict[str, Any]:
        facts = self.state.facts
        empty = {"text": None, "image": None}
        return {
            "run": str(self.run.directory),
            "steps": self.state.step,
            "interrupted": interrupted,
            "train_seconds": train_seconds,
            "eval_before": facts.get("eval_before"),
            "eval_after": None,
            "intervals": {},
            "difference": {},
            "ratio_step0_max_abs_log": facts.get("ratio_step0_max_abs_log", empty),
            "rollout_drift_max_abs": facts.get("rollout_drift_max_abs", empty),
            "checkpoint": str(self.run.checkpoint(self.state.step)),
        }

    def _report(self, summary: dict[str, Any]) -> None:
        table = Table(title=f"held-out {self.config.eval.suite}, {len(self.suite)} prompts", title_style="bold")
        table.add_column("reward")
        for name in ("before", "after", "difference, 95 %"):
            table.add_column(name, justify="right")
        for name, after in summary["eval_after"].items():
            before = summary["eval_before"].get(name)
            low_high = summary["difference"].get(name)
            table.add_row(
                name,
                "-" if before is None else f"{before:.3f}",
                f"{after:.3f}",
                f"{low_high['mean']:+.3f}, {low_high['ci95'][0]:+.3f} to {low_high['ci95'][1]:+.3f}"
                if low_high
                else "-",
            )
        self.display.say(table)
        run = self.run.directory
        self.display.say(
            f"checkpoint {summary['checkpoint']}\npictures   {run / 'samples' / 'progress.png'}\n"
            f'try        unigrpo generate --model {run} "a red circle above a blue square"'
        )


def _intervals(result: Evaluation) -> dict[str, tuple[float, float]]:
    return {name: estimate.ci95 for name, estimate in result.scores.items()}


def _a_few_of_each_task(suite: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first prompt of every task, then the second ones, and so on up to `count`, no text twice."""
    by_task: dict[str, dict[str, Prompt]] = {}
    for prompt in suite:
        by_task.setdefault(task_of(prompt), {}).setdefault(prompt.text, prompt)
    rounds = zip_longest(*(prompts.values() for prompts in by_task.values()))
    return [prompt for turn in rounds for prompt in turn if prompt is not None][:count]


def _headline(config: Config, base: str, directory: Path, state: TrainState) -> str:
    """The batch arithmetic, so that nobody has to guess it."""
    t, step, ranks = config.train, state.step, state.ranks
    lines = [
        f"UniGRPO on {base}, {t.tune} tuning of {'both experts' if t.experts == 'both' else t.experts}",
        batch_of(config).lines()[0],
        *([] if ranks.alone else [_share_of_each(config, state)]),
        f"writing {directory}" + (f", going on from step {step}" if step else ""),
    ]
    return "\n".join(lines)


def _share_of_each(config: Config, state: TrainState) -> str:
    """What a rank does of a step."""
    t, world = config.train, state.ranks.world
    prompts = t.prompts_per_step // world
    episodes = prompts * t.group_size
    kept = "the layers sharded over them" if is_sharded(state.policy.network) else "each with whole weights"
    return (
        f"{world} ranks, {kept}: each draws {prompts} prompts x {t.group_size} = {episodes} episodes, "
        f"{episodes // t.updates} of each optimizer step"
    )
