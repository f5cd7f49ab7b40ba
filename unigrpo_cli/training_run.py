"""A training run from start to report: evaluate, train, evaluate again, and leave a directory behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.table import Table

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import NotFetchedError, UnigrpoError, UsageError
from unigrpo_cli.estimate import batch_of
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
from unigrpo_cli.models.checkpoint import restore_weights
from unigrpo_cli.models.hub import EMBEDDED
from unigrpo_cli.models.unified import UnifiedModel
from unigrpo_cli.plan import Plan, plan_of, refuse_too_large
from unigrpo_cli.rewards.registry import Plugins
from unigrpo_cli.rewards.scoring import RewardSet
from unigrpo_cli.rollout import rollout
from unigrpo_cli.runtime.batches import save_bad_step
from unigrpo_cli.runtime.display import Display
from unigrpo_cli.runtime.run import Run, fresh_directory
from unigrpo_cli.runtime.samples import SHOWN, save_progress, save_samples
from unigrpo_cli.runtime.state import (
    STATE,
    TrainState,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
    restore_state,
    save_state,
)
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
from unigrpo_cli.tuning import make_optimizer, prepare_policy
from unigrpo_cli.watch import Watch


def start(config: Config, plugins: Plugins, display: Display, out: Path | None) -> dict[str, Any]:
    """A new run. Everything that can be refused is refused before its directory is made."""
    return _run(config, plugins, display, None, out)


def go_on(config: Config, plugins: Plugins, display: Display, checkpoint: Path) -> dict[str, Any]:
    """Go on from a checkpoint, in its run's directory."""
    return _run(config, plugins, display, checkpoint, None)


def plan(config: Config, checkpoint: Path | None) -> Plan:
    """What a run would take, by the model's headers: reads no weight, opens no reward, writes nothing."""
    return plan_of(config, *_origin(config, checkpoint, fetch=False), elsewhere=True)


def refuse_another_model(config: Config, began: Config) -> None:
    """A run goes on with the model it began with; another path counts only where that is not there any more.

    Raises:
        UsageError: naming the model.
    """
    gone = began.model != EMBEDDED and Path(began.model).is_absolute() and not Path(began.model).exists()
    same_place = os.path.abspath(config.model) == os.path.abspath(began.model)
    same_files = (config.weights_file, config.adapter) == (began.weights_file, began.adapter)
    if not (same_place or gone) or not same_files:
        raise UsageError(f"--resume goes on with the model it began with, {began.model}; leave out the other")


def checkpoint_to_resume(resume: str, out: Path | None) -> Path:
    """The checkpoint behind `--resume`: a checkpoint, a run, or `auto`.

    Raises:
        UsageError: when there is none.
    """
    if resume != "auto":
        path = Path(resume)
        if (path / STATE).is_file() or path.parent.name == "checkpoints":
            return path
        if not path.is_dir():
            raise UsageError(f"--resume {resume}: no such checkpoint or run")
        return newest_checkpoint(path)
    if out is not None:
        return newest_checkpoint(out)
    runs = sorted(Path("runs").glob("*/checkpoints"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UsageError("--resume auto: no run below ./runs; give --out DIR or --resume PATH")
    return newest_checkpoint(runs[-1].parent)


def _run(
    config: Config, plugins: Plugins, display: Display, checkpoint: Path | None, out: Path | None
) -> dict[str, Any]:
    began = time.perf_counter()
    plugins.call("unigrpo_configure", config=config)
    choices = reward_choices(config)
    suites = SuiteRegistry()
    plugins.call("unigrpo_register_suites", registry=suites)
    prompts = training_prompts(config.prompts)
    suite = limited(suites.prompts(config.eval.suite), config.eval.limit)
    state, base = _prepare(config, checkpoint, display.warn)
    warn_of_unknown_words(state.policy, [*prompts, *suite], display.warn)
    with open_rewards(choices, plugins, config, embedded=is_embedded(state.policy)) as rewards:
        thinks = config.sampling.think
        rewards.check_needs([p.metadata for p in prompts], has_reasoning=thinks, split="train")
        rewards.check_needs([p.metadata for p in suite], has_reasoning=thinks, split="eval")
        run = Run(checkpoint.parent.parent if checkpoint else fresh_directory(out, "train"))
        run.describe(config)
        run.forget_after(state.step)
        try:
            return _Session(config, display, run, state, base, rewards, prompts, suite, began).go()
        except BaseException:  # an interrupt too
            run.remove_if_only_described()
            raise


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
    if content["tune"] != config.train.tune:
        raise UsageError(
            f"{checkpoint} was trained with train.tune={content['tune']}, the configuration says "
            f"{config.train.tune}; resume with the former"
        )
    base = content["base"]
    if Path(base).is_absolute() and not Path(base).exists():  # it was moved: take it where it is now said to be
        base = find_checkpoint(model_of(config, fetch))[0]
    return base, str(checkpoint) if content["tune"] == "lora" else None


def _prepare(config: Config, checkpoint: Path | None, warn: Callable[[str], None]) -> tuple[TrainState, str]:
    """Policy, optimizer and the name of the base, fresh or as a checkpoint left them.

    The reference is always the base: never the weights that a run is resumed from, and with adapters the network
    without them, also when training starts from an adapter.
    """
    base, adapter = _origin(config, checkpoint)
    planned = plan_of(config, base, adapter)
    refuse_too_large(planned)
    if planned.present is not None and planned.available > planned.present:
        warn(f"memory_gb={config.memory_gb:g}, but there are only {planned.present:.1f} GiB")
    if checkpoint is None:
        policy = load_policy(model_of(config), config.adapter, config)
        _warn_of_rank(policy, config, warn)
        policy = prepare_policy(policy, config)
        return TrainState(policy, make_optimizer(policy, config)), base
    policy = prepare_policy(load_policy(base, adapter, config), config)
    if adapter is None:
        restore_weights(policy.network, checkpoint)
    state = TrainState(policy, make_optimizer(policy, config))
    restore_state(state, checkpoint, read_state(checkpoint))
    return state, base


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
        run: Run,
        state: TrainState,
        base: str,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        suite: Sequence[Prompt],
        began: float,
    ):
        self.config, self.display, self.run, self.state, self.base = config, display, run, state, base
        self.rewards, self.prompts, self.suite, self.began = rewards, prompts, suite, began
        self.shown = _a_few_of_each_task(suite, SHOWN)
        asked = rewards.asked("train")
        signs = {r.alias: 1 if getattr(r.reward, "higher_is_better", True) else -1 for r in asked}
        self.watch = Watch(state.facts.setdefault("watch", {}), config, rewards.weights, signs)

    def go(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again. A first interrupt ends it after the step (or evaluation) at hand."""
        config, state, display = self.config, self.state, self.display
        display.say(_headline(config, self.base, self.run.directory, state.step))
        if state.step > config.train.steps:
            display.warn(f"the checkpoint is of step {state.step}, beyond train.steps={config.train.steps}")
        with _interrupts(display) as asked_to_stop:
            if "eval_before" not in state.facts:
                state.facts["eval_before"] = self.evaluate("before").means()
                self.samples()
            trained = time.perf_counter()
            with display.training(config.train.steps, state.step, list(self.rewards.weights)) as view:

                def after_step(step: Step) -> bool:
                    self._remember(step.metrics)
                    for line in self.watch.see(step.metrics, step.skipped):
                        display.warn(f"step {state.step}: {line}")
                    self.run.log({"step": state.step} | step.metrics | self.watch.row(step.skipped))
                    view.update(state.step, step.metrics, self.watch.lasting)
                    self._study(step)
                    last = asked_to_stop() or state.step == config.train.steps
                    if last or self._due(config.train.samples_every):
                        self.samples()
                    if last or self._due(config.train.checkpoint_every):
                        self.checkpoint()
                    return asked_to_stop()

                if not asked_to_stop():
                    self.train(after_step)
            seconds = time.perf_counter() - trained
            if not self.run.checkpoint(state.step).exists():
                self.checkpoint()
            summary = self._summary(seconds, interrupted=asked_to_stop() and state.step < config.train.steps)
            if summary["interrupted"]:
                display.say(
                    f"interrupted after step {state.step}; go on with `unigrpo train --resume {self.run.directory}`"
                )
            else:
                summary |= self._compared(self.evaluate("after"))
                self._report(summary)
        summary["seconds"] = time.perf_counter() - self.began
        self.run.write_json("summary.json", summary)
        return summary

    def train(self, after_step: Callable[[Step], bool]) -> None:
        """Training steps. Whatever stops one before its weights move, a reward say, loses no step before it."""
        try:
            train(self.state, self.prompts, self.rewards, self.config, after_step)
        except (Exception, KeyboardInterrupt):
            if not self.state.between and not self.run.checkpoint(self.state.step).exists():
                self.checkpoint()
            if any(self.run.directory.glob("checkpoints/step_*")):
                self.display.warn(
                    f"stopped after step {self.state.step}; when the cause is mended, go on with "
                    f"`unigrpo train --resume {self.run.directory}`"
                )
            raise

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
        config = self.config
        total = len(self.suite) * config.eval.samples
        with self.display.progress(total, f"evaluating {when} training") as advance:
            result = evaluate(
                self.state.policy,
                self.suite,
                self.rewards,
                eval_sampling(config),
                samples=config.eval.samples,
                seed=config.eval.seed,
                on_rows=advance,
            )
        self.run.write_json(f"eval_{when}.json", result.report(values=True))
        return result

    def samples(self) -> None:
        """The same held-out prompts on the same noise, as pictures."""
        if not self.shown:
            return
        config, step = self.config, self.state.step
        groups = rollout(self.state.policy, self.shown, 1, eval_sampling(config), NO_NOISE, config.eval.seed)
        scored = self.rewards.score(samples_of(groups), step=step, split="eval")
        folder = self.run.directory / "samples"
        save_samples(groups, scored, folder, step)
        save_progress(folder)

    def checkpoint(self) -> None:
        path = self.run.checkpoint(self.state.step)
        save_state(self.state, path, base=self.base, tune=self.config.train.tune)
        prune_checkpoints(self.run.directory, self.config.train.keep_checkpoints)

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
            folder = self.run.directory / "bad_steps"
            found = (step.groups, step.scored, step.advantage_B, step.metrics)
            path = save_bad_step(folder, self.state.step, step.skipped, *found)
            self.watch.stop_if_diverged(self.state.step, step.skipped, str(path))

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


def _headline(config: Config, base: str, directory: Path, step: int) -> str:
    """The batch arithmetic, so that nobody has to guess it."""
    t = config.train
    lines = [
        f"UniGRPO on {base}, {t.tune} tuning of {'both experts' if t.experts == 'both' else t.experts}",
        batch_of(config).lines()[0],
        f"writing {directory}" + (f", going on from step {step}" if step else ""),
    ]
    return "\n".join(lines)


@contextmanager
def _interrupts(display: Display) -> Iterator[Any]:
    """Ctrl-C or SIGTERM asks to stop after the present step; a second one stops at once."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        display.warn("stopping after this step and saving a checkpoint; interrupt again to stop at once")

    old = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
