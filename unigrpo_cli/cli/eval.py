"""`unigrpo eval`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import GateError, UsageError, suggest
from unigrpo_cli.parallel.launch import launched

if TYPE_CHECKING:
    from unigrpo_cli.config import Config
    from unigrpo_cli.episode import Group, Prompt
    from unigrpo_cli.evaluate import Evaluation
    from unigrpo_cli.models.policy import Policy
    from unigrpo_cli.parallel.ranks import Ranks
    from unigrpo_cli.rewards.batch import RewardResult
    from unigrpo_cli.rewards.registry import Plugins
    from unigrpo_cli.rewards.scorer import Scorer
    from unigrpo_cli.rewards.spec import RewardSpec
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.directory import Run


@one_error_line
def evaluate(
    context: typer.Context,
    model: common.Model = None,
    weights_file: common.WeightsFile = None,
    adapter: common.Adapter = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="shapes, geneval, a prompts file (as for train), or KIND:PATH (docs/suites.md).",
        ),
    ] = None,
    reward: common.Reward = None,
    reward_opt: common.RewardOpt = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images per prompt.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="Only the first n prompts of each task.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Model, checkpoint or run to compare with, on the same noise; repeatable."),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", help="NAME=VALUE: exit with 4 if the mean of reward NAME is below VALUE."),
    ] = None,
    out: common.Out = None,
    seed: common.Seed = None,
    preset: common.Preset = None,
    config: common.ConfigFile = None,
    overrides: common.Set = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Score a model on held-out prompts, with 95 % intervals; compare models on the same noise.

    Without --reward it scores with reward.names (default geneval) and, on the shapes suite, eval.rewards. Writes to
    --out: eval.json, images/.
    """
    from unigrpo_cli.parallel.join import join_ranks
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.inputs import with_suite

    rank, _, _ = launched()
    display = Display(json=json, quiet=quiet, rank=rank)
    with join_ranks() as ranks:
        with ranks.together():
            _refuse_repeated(compare or [])
            settings = common.resolve_config(
                context,
                {"suite": "eval.suite", "samples": "eval.samples", "limit": "eval.limit", "seed": "eval.seed"},
            )
            gates = [_gate(text) for text in fail_under or []]
            plugins = common.load_plugins(plugin, plugins_dir, display)
            plugins.call("unigrpo_configure", config=settings)
            settings = with_suite(settings)
            choices = _choices(settings, only_these=bool(reward))
            _refuse_unknown_gates(gates, [choice.alias for choice in choices])
        report = _report(settings, plugins, choices, compare or [], out, display, ranks)
    if rank > 0:
        return
    _table(display, settings, report)
    display.say(f"written to {report['run']}")
    if json:
        common.print_json(report)
    _check_gates(gates, report)


def _refuse_repeated(models: list[str]) -> None:
    for name in models:
        if models.count(name) > 1:
            raise UsageError(f"--compare {name} is given {models.count(name)} times; give each model once")


def _report(
    settings: Config,
    plugins: Plugins,
    choices: list[RewardSpec],
    others: list[str],
    out: Path | None,
    display: Display,
    ranks: Ranks,
) -> dict[str, Any]:
    """The evaluation of a model, and of others with their differences, on all ranks; rank 0 writes it.

    One model is in memory at a time.
    """
    from unigrpo_cli.evaluate import compare, limited
    from unigrpo_cli.run.directory import Run, fresh_directory
    from unigrpo_cli.run.setup import check_prompts, is_embedded, load_policy, model_of, open_rewards
    from unigrpo_cli.suites import SuiteRegistry

    suites = SuiteRegistry()
    with ranks.together():
        plugins.call("unigrpo_register_suites", registry=suites)
        prompts = limited(suites.prompts(settings.eval.suite), settings.eval.limit)
        settings, *rest = _each_model(settings, others, prompts, display)
        policy = load_policy(model_of(settings), settings.adapter, settings, display.warn)
    with open_rewards(choices, plugins, settings, embedded=is_embedded(policy), ranks=ranks) as rewards:
        with ranks.together():
            check_prompts(rewards, prompts, settings.sampling.think, "eval")
            place = fresh_directory(out, "eval") if ranks.first else None
        run = Run(Path(ranks.from_first(str(place))))
        report: dict[str, Any] = {"run": str(run.directory), "model": settings.model, "suite": settings.eval.suite}
        try:
            first = _evaluate(settings, policy, prompts, rewards, display, run, ranks)
        except BaseException:
            if ranks.first:
                run.remove_if_only_described()
            raise
        report |= first.report() | ({"compare": []} if rest else {})
        _write(run, report, ranks)
        for other in rest:
            del policy  # its memory is for the next
            with ranks.together():
                policy = load_policy(other.model, None, other, display.warn)
            result = _evaluate(other, policy, prompts, rewards, display, None, ranks)
            difference = compare(first, result, settings.eval.seed)
            report["compare"].append({"model": other.model} | result.report() | {"difference": difference})
            _write(run, report, ranks)
    return report


def _each_model(settings: Config, others: list[str], prompts: list[Prompt], display: Display) -> list[Config]:
    """The settings for each model, with batch sizes. All headers are read before anything is sampled."""
    from unigrpo_cli.config import with_values
    from unigrpo_cli.models.family import MODELS
    from unigrpo_cli.run.memory.plan import with_batch_size
    from unigrpo_cli.run.setup import find_checkpoint

    every = [settings]
    for name in others:
        MODELS.sizes(find_checkpoint(name)[0])
        every.append(with_values(settings, {"model": name, "weights_file": None, "adapter": None}))
    return [with_batch_size(each, prompts, each.eval.samples, display.say) for each in every]


def _write(run: Run, report: dict[str, Any], ranks: Ranks) -> None:
    with ranks.together():
        if ranks.first:
            run.write_json("eval.json", report)


def _choices(config: Config, only_these: bool) -> list[RewardSpec]:
    from unigrpo_cli.rewards.spec import parse_rewards
    from unigrpo_cli.run.setup import watched_choices
    from unigrpo_cli.suites import SHAPES

    choices = parse_rewards(config.reward.names or ("geneval",), config.reward.options)
    if not only_these and config.eval.suite == SHAPES:
        choices += watched_choices(config, {choice.alias for choice in choices})
    return choices


def _refuse_unknown_gates(gates: list[tuple[str, float]], names: list[str]) -> None:
    for name, _ in gates:
        if name not in names:
            raise UsageError(f"--fail-under {name}: {suggest(name, names)}")


def _evaluate(
    config: Config,
    policy: Policy,
    prompts: list[Prompt],
    rewards: Scorer,
    display: Display,
    run: Run | None,
    ranks: Ranks,
) -> Evaluation:
    """Evaluate one model. With `run`, each rank saves the images that it painted."""
    from unigrpo_cli.episode import flatten
    from unigrpo_cli.evaluate import eval_sampling, evaluate
    from unigrpo_cli.io.pictures import save_png
    from unigrpo_cli.run.setup import warn_of_unknown_words

    warn_of_unknown_words(policy, prompts, display.warn)
    samples = config.eval.samples
    own = ranks.stretch(range(len(prompts)))
    numbers = iter([prompt * samples + k for prompt in own for k in range(samples)])

    def save(groups: list[Group], scored: dict[str, RewardResult]) -> None:
        assert run is not None
        for k, (episode, number) in enumerate(zip(flatten(groups), numbers, strict=False)):
            record = {
                "prompt": episode.prompt.text,
                "reasoning": episode.reasoning,
                "scores": {n: float(s.scores[k]) for n, s in scored.items() if s.valid[k]},
                "info": {n: s.info[k] for n, s in scored.items() if s.info[k]},
            }
            save_png(episode.pixels.numpy(), run.directory / "images" / f"{number:05d}.png", record)

    with display.progress(len(prompts) * samples, f"evaluating {config.model}") as advance:
        return evaluate(
            policy,
            prompts,
            rewards,
            eval_sampling(config),
            samples=samples,
            seed=config.eval.seed,
            ranks=ranks,
            strict=True,
            on_rows=lambda rows: advance(rows * ranks.world),
            on_groups=save if run is not None else lambda groups, scored: None,
        )


def _table(display: Display, config: Config, report: dict[str, Any]) -> None:
    """A column per reward: its mean, the interval, the mean of each task, and of each other model the difference."""
    scores = report["scores"]
    rows = _interval_rows("mean", scores, "{:.3f}", list(scores))
    for task, means in report["per_task"].items():
        rows.append([task, *("-" if means.get(name) is None else f"{means[name]:.2f}" for name in scores)])
    for other in report.get("compare", []):
        rows += _interval_rows(other["model"], other["scores"], "{:.3f}", list(scores))
        rows += _interval_rows("difference, paired", other["difference"], "{:+.3f}", list(scores))
    title = f"{report['model']} on {config.eval.suite}, {report['n']} images"
    display.table(title, ["", *scores], rows, set(range(1, len(scores) + 1)))


def _interval_rows(title: str, found: dict[str, dict[str, Any]], form: str, names: list[str]) -> list[list[str]]:
    """Means and the ends of their intervals, a row each; "-" where a reward abstained on all."""
    ends = [(title, lambda x: x["mean"]), ("95 % from", lambda x: x["ci95"][0]), ("95 % to", lambda x: x["ci95"][1])]
    return [[label, *(form.format(pick(found[n])) if n in found else "-" for n in names)] for label, pick in ends]


def _gate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if not math.isfinite(least):
        raise UsageError(f"--fail-under {text}: write it as NAME=VALUE, e.g. geneval=0.6")
    return name, least


def _check_gates(gates: list[tuple[str, float]], report: dict[str, Any]) -> None:
    for name, least in gates:
        mean = report["scores"][name]["mean"]
        if mean < least:
            raise GateError(f"{name} {mean:.3f} is under --fail-under {name}={least:g}")
