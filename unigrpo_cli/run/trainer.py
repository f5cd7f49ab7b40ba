"""One training run from its first evaluation to its report: train, evaluate, draw samples, save checkpoints."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt, flatten
from unigrpo_cli.errors import DiskError, UnigrpoError, quoted
from unigrpo_cli.evaluate import NO_NOISE, Evaluation, eval_sampling, evaluate, samples_of
from unigrpo_cli.io.atomic import update_symlink, write_text
from unigrpo_cli.models.policy import Policy
from unigrpo_cli.parallel.out_of_memory import out_of_memory_hint
from unigrpo_cli.rewards.scorer import Scorer
from unigrpo_cli.rollout import rollout
from unigrpo_cli.run import summary
from unigrpo_cli.run.card import Trained, card_of, evaluation_of, metrics_until
from unigrpo_cli.run.checkpoint import CARD, checkpoints, prune_checkpoints, save_checkpoint
from unigrpo_cli.run.console import Display, TrainingView
from unigrpo_cli.run.directory import Run
from unigrpo_cli.run.first_ratio import ratio_limits
from unigrpo_cli.run.memory import batch_of
from unigrpo_cli.run.monitor import Monitor
from unigrpo_cli.run.records import save_bad_step
from unigrpo_cli.run.samples import SHOWN, save_progress, save_samples
from unigrpo_cli.run.signals import DroppedError, Interrupts
from unigrpo_cli.run.trace_files import save_trace
from unigrpo_cli.run.traces import score_again, step_trace
from unigrpo_cli.run.trackers import Trackers
from unigrpo_cli.sft import sft_step
from unigrpo_cli.suites import task_of
from unigrpo_cli.train import StepResult, train
from unigrpo_cli.training.maps import advantage_maps
from unigrpo_cli.training.rng_state import put_generators, read_generators
from unigrpo_cli.training.state import Best, Job, TrainState


class Trainer:
    """The moving parts of a run. `run` is called once."""

    def __init__(
        self,
        config: Config,
        display: Display,
        interrupts: Interrupts,
        files: Run,
        state: TrainState,
        rewards: Scorer,
        trackers: Trackers,
        prompts: Sequence[Prompt],
        suite: Sequence[Prompt],
        began: float,
    ):
        """`began`: `time.perf_counter()` when loading began."""
        self.config, self.display, self.interrupts, self.files, self.state = config, display, interrupts, files, state
        self.rewards, self.prompts, self.suite, self.ranks = rewards, prompts, suite, state.ranks
        self.trackers = trackers
        self.shown = _some_of_each_task(suite, SHOWN)
        self.bad_steps = Path(self.ranks.from_first(str(files.directory))) / "bad_steps"
        if not self.ranks.first:  # each rank keeps the episodes it drew
            self.bad_steps /= f"rank_{self.ranks.rank}"
        self.signs = {r.alias: 1 if getattr(r.reward, "higher_is_better", True) else -1 for r in rewards.active("eval")}
        trained = {r.alias: self.signs[r.alias] for r in rewards.active("train")}
        limits = ratio_limits(state.policy, config.objective)
        self.monitor = Monitor(state.record.monitor, config, rewards.weights, trained, limits)
        self.logged = state.step  # the last step whose metrics are on disk
        self.saved_record = state.record
        self.began = began

    def run(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again; returns the summary. A first interrupt stops it after the current step."""
        config, state, display = self.config, self.state, self.display
        display.say(summary.headline(config, self.files.directory, state))
        if state.step > config.train.steps:
            display.warn(f"the checkpoint is of step {state.step}, beyond train.steps={config.train.steps}")
        if state.generators is not None:
            put_generators(state.generators)
        self.snapshot()
        with self._accept_interrupts():
            self._evaluate_before()
            self._run_pending()
            training_began = time.perf_counter()
            self._train()
            train_seconds = time.perf_counter() - training_began
            if not self.files.checkpoint(state.step).exists():
                self.save_checkpoint()
            after = self._evaluate_after()
            with self.interrupts.shield():
                return self._finish(after, train_seconds)

    def _finish(self, after: Evaluation | None, train_seconds: float) -> dict[str, Any]:
        """Write and show the summary; `after` is None for a run that was interrupted."""
        config, files, say = self.config, self.files, self.display.say
        if after is not None and (card := self._card(after)):  # the checkpoint is older than its evaluation
            write_text(files.checkpoint(self.state.step) / CARD, card)
        content = summary.of_run(self.state, files, after, config.eval.seed, self.display.warn)
        content |= {"train_seconds": train_seconds, "seconds": time.perf_counter() - self.began}
        files.write_json("summary.json", content)
        if after is None:
            resume = f"unigrpo {config.command} --resume {quoted(files.directory)}"
            say(f"interrupted after step {self.state.step}; resume: {resume}")
        else:
            summary.show(content, config, len(self.suite), self.display)
        return content

    # ----- steps

    def _train(self) -> None:
        """Training steps. An error before the weights of a step move loses no earlier step."""
        config, state = self.config, self.state
        self.interrupts.agree()
        if self.interrupts:
            return
        micro = min(config.train.micro_batch_size, batch_of(config).each)
        try:
            with (
                self.display.training(config.train.steps, state.step, list(self.rewards.weights)) as view,
                out_of_memory_hint("replays or an update", "train.micro_batch_size", micro),  # rollouts have their own
            ):
                own = sft_step if config.sft.data else None
                train(state, self.prompts, self.rewards, config, lambda step: self._after_step(step, view), own)
        except DiskError:  # a checkpoint would not find room either
            raise
        except (Exception, KeyboardInterrupt) as error:
            self._save_after(error)
            raise

    def _after_step(self, step: StepResult, view: TrainingView) -> bool:
        """Log a step, run what is due after it, save; whether to stop."""
        state, train_settings = self.state, self.config.train
        with self.interrupts.shield():
            state.record.add_step(step.metrics)
            warnings = self.monitor.check(step.metrics, step.skipped)
            self.files.log(row := {"step": state.step} | step.metrics | self.monitor.row(step.skipped))
            self.logged = state.step
            self._tell_observers(row, step)
            for line in warnings:
                self.display.warn(f"step {state.step}: {line}")
            view.update(state.step, step.metrics, self.monitor.lasting)
            state.record.pending = self._due_jobs()
            self.snapshot()
            with self.ranks.together():
                self._keep_bad_step(step)
            if step.traced:
                self._trace(step)
        self.interrupts.agree()
        self._run_jobs()
        best = state.record.best
        last = bool(self.interrupts) or state.step == train_settings.steps
        if last or self._is_due(train_settings.checkpoint_every) or (best is not None and best.step == state.step):
            self.save_checkpoint()
        return bool(self.interrupts)

    def _tell_observers(self, row: dict[str, Any], step: StepResult) -> None:
        """Trackers and plugins get the step; one that fails is a warning."""
        self.trackers.log(row)
        if self.ranks.first:
            try:
                self.rewards.plugins.call("unigrpo_after_step", step=row["step"], metrics=row, groups=step.groups)
            except UnigrpoError as error:
                self.display.warn(str(error))

    def _save_after(self, error: BaseException) -> None:
        """Save the last whole step when an error stops training, and say how to resume."""
        state, directory = self.state, self.files.directory
        whole = not state.between and self.logged == state.step
        same_everywhere = self.ranks.alone or getattr(error, "everywhere", False)
        if whole and same_everywhere and not self.files.checkpoint(state.step).exists():
            state.record = self.saved_record
            self.save_checkpoint()
        if checkpoints(directory):
            self.display.warn(
                f"stopped after step {state.step}; fix the cause, then resume: "
                f"unigrpo {self.config.command} --resume {quoted(directory)}"
            )

    def _keep_bad_step(self, step: StepResult) -> None:
        """Write the batch of a skipped step, and stop after too many of them."""
        if step.skipped is None:
            return
        found = (step.groups, step.scored, step.advantage_BS, step.metrics)
        path = save_bad_step(self.bad_steps, self.state.step, step.skipped, *found)
        try:
            self.monitor.stop_if_diverged(self.state.step, step.skipped, str(path))
        finally:
            self.snapshot()  # the count starts again at 0, in the checkpoint of this stop too

    def _trace(self, step: StepResult) -> None:
        """Write what the step's updates saw of some groups of the first rank; other ranks share the passes."""
        state = self.state
        again = score_again(state.policy, step.traced, self.config, self.ranks)
        with self.ranks.together():
            if self.ranks.first:
                trace = step_trace(step, again, state.step, state.policy, self.config, self.rewards.weights)
                save_trace(trace, self.files.trace(state.step))

    # ----- jobs between steps

    def _due_jobs(self) -> list[Job]:
        """What is due after this step. Saved with it, so that a run that stops before can do it on resume."""
        jobs: list[Job] = ["eval"] if self._is_due(self.config.eval.every) else []
        if self._is_due(self.config.train.samples_every) or self.state.step == self.config.train.steps:
            jobs.append("samples")
        return jobs

    def _run_jobs(self) -> None:
        """Run the pending jobs in order, until an interrupt."""
        record = self.state.record
        while record.pending:
            try:
                with self.interrupts.droppable():
                    if record.pending[0] == "eval":
                        self._evaluate_between()
                    else:
                        self.draw_samples()
            except DroppedError:
                return
            record.pending = record.pending[1:]
            self.snapshot()

    def _run_pending(self) -> None:
        """Jobs that an interrupt left; then the step is complete and is saved."""
        if self.state.record.pending:
            self._run_jobs()
            if not self.state.record.pending:
                self.save_checkpoint()

    def snapshot(self) -> None:
        """Keep generators and record as they are now, for a checkpoint that is saved because something later failed."""
        self.state.generators = read_generators()
        self.state.record.abstained = self.rewards.abstentions()
        self.saved_record = copy.deepcopy(self.state.record)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    # ----- evaluations and samples

    def _evaluate_before(self) -> None:
        record = self.state.record
        if record.eval_before is None:
            with self.interrupts.droppable():
                record.eval_before = self._evaluate_to_file("before").means()
                self.draw_samples()
            self.snapshot()

    def _evaluate_between(self) -> None:
        """A held-out evaluation between steps: a line of metrics, and whether it is the best so far."""
        step, record, name = self.state.step, self.state.record, self.config.eval.best
        means = self.evaluate(f"evaluating step {step}").means()
        with self.interrupts.shield():
            self.files.log(row := {"step": step} | {f"eval/{key}": value for key, value in means.items()})
            self.trackers.log(row)
            value, best = means.get(name), record.best
            if value is not None:
                sign = self.signs[name]
                if best is None or best.reward != name or sign * value > sign * best.value:
                    record.best = Best(name, value, step)

    def _evaluate_after(self) -> Evaluation | None:
        """The last evaluation; None when an interrupt came before it was done."""
        try:
            with self.interrupts.droppable():
                return self._evaluate_to_file("after")
        except DroppedError:
            return None

    def _evaluate_to_file(self, when: str) -> Evaluation:
        result = self.evaluate(f"evaluating {when} training")
        with self.interrupts.shield():
            self.files.write_json(f"eval_{when}.json", result.report(values=True))
        return result

    def evaluate(self, what: str) -> Evaluation:
        """Score the suite with the present weights; nothing is sampled where no reward scores it."""
        config, suite = self.config, self.suite if self.rewards.active("eval") else ()
        with (
            self.display.progress(len(suite) * config.eval.samples, what) as advance,
            self.state.policy.gathered() as sampler,
        ):
            return evaluate(
                sampler,
                suite,
                self.rewards,
                eval_sampling(config),
                samples=config.eval.samples,
                seed=config.eval.seed,
                ranks=self.ranks,
                on_rows=lambda rows: advance(rows * self.ranks.world),
            )

    def draw_samples(self) -> None:
        """Pictures of the same held-out prompts with the same noise, by the first rank."""
        if self.shown:
            with self.state.policy.gathered() as sampler, self.ranks.together():
                if self.ranks.first:
                    self._draw(sampler)

    def _draw(self, sampler: Policy) -> None:
        config, step = self.config, self.state.step
        groups = rollout(sampler, self.shown, 1, eval_sampling(config), NO_NOISE, config.eval.seed)
        samples = samples_of(groups)
        scored = self.rewards.score(samples, step=step, split="eval")
        maps = advantage_maps(flatten(groups), samples, self.rewards, config, step=step, split="eval")
        folder = self.files.directory / "samples"
        with self.interrupts.shield():
            sheet = save_samples(groups, scored, folder, step, maps)
            save_progress(folder)
            self.trackers.show(sheet, step)

    # ----- checkpoints and interrupts

    def _card(self, after: Evaluation | None = None) -> str | None:
        """The model card of the present weights, on the first rank."""
        state, files = self.state, self.files
        if not self.ranks.first or state.origin is None:
            return None
        kind = "adapter" if self.config.train.finetune == "lora" else "weights"
        before, lines = evaluation_of(files, "before"), metrics_until(files, state.step)
        origin = state.origin
        return card_of(
            Trained(origin.config, origin.reference.base, kind, state.step, origin.rewards, lines, before, after)
        )

    def save_checkpoint(self) -> None:
        """Save the state, update the links, and remove checkpoints that are not kept."""
        t, best = self.config.train, self.state.record.best
        folder = self.files.directory / "checkpoints"
        with self.interrupts.shield():
            self.files.sync_metrics()
            path = self.files.checkpoint(self.state.step)
            save_checkpoint(self.state, path, self._card())
            update_symlink(folder / "last", path.name)
            if best is None or not self.files.checkpoint(best.step).exists():
                (folder / "best").unlink(missing_ok=True)
            else:
                update_symlink(folder / "best", self.files.checkpoint(best.step).name)
            kept = None if best is None else best.step
            prune_checkpoints(self.files.directory, t.keep_checkpoints, t.keep_checkpoint_every, kept)

    @contextmanager
    def _accept_interrupts(self) -> Iterator[None]:
        """From here on an interrupt stops the run after the current step.

        Raises:
            KeyboardInterrupt: when one came while everything was loaded.
        """
        interrupts = self.interrupts
        interrupts.tell = self.display.warn
        interrupts.ranks = None if self.ranks.alone else self.ranks
        interrupts.moving = lambda: self.state.between or self.state.step != self.logged
        if interrupts:
            raise KeyboardInterrupt
        interrupts.training = True
        try:
            yield
        finally:
            interrupts.training = False


def _some_of_each_task(suite: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first prompt of every task, then the second ones, and so on up to `count`, without repeated texts."""
    by_task: dict[str, dict[str, Prompt]] = {}
    for prompt in suite:
        by_task.setdefault(task_of(prompt), {}).setdefault(prompt.text, prompt)
    rounds = zip_longest(*(prompts.values() for prompts in by_task.values()))
    return [prompt for turn in rounds for prompt in turn if prompt is not None][:count]
