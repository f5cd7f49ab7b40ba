"""A training run from its first evaluation to its report: the chapters, and what a step that is done still owes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.table import Table

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import DiskError, UnigrpoError
from unigrpo_cli.evaluate import (
    NO_NOISE,
    Evaluation,
    compare,
    eval_sampling,
    evaluate,
    load_report,
    paired,
    samples_of,
)
from unigrpo_cli.io.atomic import point
from unigrpo_cli.models.policy import Policy
from unigrpo_cli.parallel.out_of_memory import out_of_memory_hint
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rollout import rollout
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.directory import Run
from unigrpo_cli.run.first_ratio import ratio_limits
from unigrpo_cli.run.memory import batch_of
from unigrpo_cli.run.monitor import Monitor
from unigrpo_cli.run.records import save_bad_step
from unigrpo_cli.run.samples import SHOWN, save_progress, save_samples
from unigrpo_cli.run.signals import DroppedError, Interrupts
from unigrpo_cli.suites import task_of
from unigrpo_cli.train import StepResult, train
from unigrpo_cli.training.rng_state import put_generators, read_generators
from unigrpo_cli.training.state import TrainState, checkpoints, prune_checkpoints, save_state

ABSTAINED = "abstained"
"""The fact that holds on which of the last samples each reward abstained, for `reward.max_abstain`."""
OWED = "owed"
"""The fact that names what a step that is done still lacks, an evaluation or samples, in order."""


class Trainer:
    """One run's moving parts, and the order of its chapters."""

    def __init__(
        self,
        config: Config,
        display: Display,
        listener: Interrupts,
        run: Run,
        state: TrainState,
        rewards: Scorer,
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
        asked = rewards.active("train")
        signs = {r.alias: 1 if getattr(r.reward, "higher_is_better", True) else -1 for r in asked}
        limits = ratio_limits(state.policy, config.objective)
        self.monitor = Monitor(state.facts.setdefault("watch", {}), config, rewards.weights, signs, limits)
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

                def after_step(step: StepResult) -> bool:
                    with self.interrupts.shield():
                        self._remember(step.metrics)
                        warnings = self.monitor.check(step.metrics, step.skipped)
                        run.log({"step": state.step} | step.metrics | self.monitor.row(step.skipped))
                        self.logged = state.step
                        for line in warnings:
                            self.display.warn(f"step {state.step}: {line}")
                        view.update(state.step, step.metrics, self.monitor.lasting)
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

                micro = min(config.train.micro_batch_size, batch_of(config).each)
                with out_of_memory_hint(
                    "replays or an update", "train.micro_batch_size", micro
                ):  # rollouts have their own
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
        self.state.facts[ABSTAINED] = self.rewards.abstentions()
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
            with self.state.policy.gathered() as sampler:
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
        with self.state.policy.gathered() as sampler, self.ranks.together():
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
            prune_checkpoints(self.run.directory, t.keep_checkpoints, t.keep_checkpoint_every, best)

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

    def _study(self, step: StepResult) -> None:
        """Keep the batch of a skipped step, and stop after too many of them."""
        if step.skipped is not None:
            found = (step.groups, step.scored, step.advantage_B, step.metrics)
            path = save_bad_step(self.bad_steps, self.state.step, step.skipped, *found)
            try:
                self.monitor.stop_if_diverged(self.state.step, step.skipped, str(path))
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
        table = Table(title=f"evaluation on {self.config.eval.suite}, {len(self.suite)} prompts", title_style="bold")
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
        f"UniGRPO on {base}, {t.finetune} tuning of {'both experts' if t.experts == 'both' else t.experts}",
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
    kept = "the layers sharded over them" if state.policy.is_sharded else "each with whole weights"
    return (
        f"{world} ranks, {kept}: each draws {prompts} prompts x {t.group_size} = {episodes} episodes, "
        f"{episodes // t.minibatches} of each optimizer step"
    )
