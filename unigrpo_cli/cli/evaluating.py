"""`unigrpo eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line

if TYPE_CHECKING:
    from unigrpo_cli.config import Config
    from unigrpo_cli.evaluate import Evaluation
    from unigrpo_cli.runtime.display import Display


@one_error_line
def evaluate(
    model: common.Model = None,
    adapter: common.Adapter = None,
    suite: Annotated[str | None, typer.Option("--suite", help="shapes, geneval, or a .txt or .jsonl file.")] = None,
    reward: common.Reward = None,
    reward_opt: common.RewardOpt = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images per prompt.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, help="Only the first n prompts of each task.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--compare", help="Another model, checkpoint or run, on the same noise.")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", help="NAME=VALUE: exit with 4 when that mean is lower."),
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
    """Score a model on held-out prompts, with 95 % intervals; compare two on the same noise.

    Rewards: --reward, or else geneval and, on the shapes suite, plan, fidelity and clean. Writes --out:
    eval.json, images/.
    """
    from unigrpo_cli.errors import UsageError
    from unigrpo_cli.evaluate import compare
    from unigrpo_cli.runtime.display import Display
    from unigrpo_cli.runtime.run import Run, fresh_directory

    display = Display(json=json, quiet=quiet)
    settings = common.resolve_config(
        preset=preset,
        config=config,
        overrides=overrides,
        named={
            "model": model,
            "adapter": adapter,
            "eval.suite": suite,
            "eval.samples": samples,
            "eval.limit": limit,
            "eval.seed": seed,
        },
        reward=reward,
        reward_opt=reward_opt,
    )
    gates = [_gate(text) for text in fail_under or []]
    plugins = common.load_plugins(plugin, plugins_dir, display)
    plugins.manager.hook.unigrpo_configure(config=settings)
    run = Run(fresh_directory(out, "eval"))
    with _RemovedIfEmpty(run):
        first = _evaluate(settings, settings.model, settings.adapter, plugins, display, run, bool(reward))
        report: dict[str, Any] = {"model": settings.model, "suite": settings.eval.suite} | first.report()
        if against is not None:
            second = _evaluate(settings, against, None, plugins, display, None, bool(reward))
            report |= {
                "compare": {"model": against} | second.report(),
                "difference": compare(first, second, settings.eval.seed),
            }
    for name, _ in gates:
        if name not in first.scores:
            raise UsageError(f"--fail-under {name}: not among the scores {', '.join(first.scores)}")
    run.write_json("eval.json", report | {"run": str(run.directory)})
    _table(display, settings, report)
    display.say(f"written to {run.directory}")
    if json:
        common.print_json(report | {"run": str(run.directory)})
    _check_gates(gates, report)


def _evaluate(
    config: Config,
    model: str,
    adapter: str | None,
    plugins: Any,
    display: Display,
    run: Any,
    chosen: bool,
) -> Evaluation:
    """One model on the configured suite, its pictures saved when `run` is given."""
    from unigrpo_cli.evaluate import eval_sampling, evaluate, limited
    from unigrpo_cli.rewards.grammar import parse_rewards
    from unigrpo_cli.runtime.pictures import save_png
    from unigrpo_cli.session import is_embedded, load_policy, open_rewards, watched_choices
    from unigrpo_cli.suites import SuiteRegistry

    suites = SuiteRegistry()
    plugins.manager.hook.unigrpo_register_suites.call_historic(kwargs={"registry": suites})
    prompts = limited(suites.prompts(config.eval.suite), config.eval.limit)
    if chosen:
        choices = parse_rewards(config.reward.use, config.reward.options)
    else:
        choices = parse_rewards(["geneval"])
        if config.eval.suite == "shapes":
            choices += watched_choices(config, {"geneval"})
    policy = load_policy(model, adapter, config)
    done = 0
    with open_rewards(choices, plugins, config, embedded=is_embedded(policy)) as rewards:
        rewards.check_needs([p.metadata for p in prompts], has_reasoning=config.sampling.think, split="eval")
        unknown = sorted({w for p in prompts for w in policy.unknown_words(p.text)})
        if unknown:
            display.warn(f"{model} has no word for {', '.join(unknown[:5])} ...; it reads <unk> there")

        def save(groups: Any, scored: Any) -> None:
            nonlocal done
            episodes = [e for g in groups for e in g.episodes]
            for k, episode in enumerate(episodes):
                story = {
                    "prompt": episode.prompt.text,
                    "reasoning": episode.reasoning,
                    "scores": {n: float(s.scores[k]) for n, s in scored.items() if s.valid[k]},
                    "info": {n: s.info[k] for n, s in scored.items() if s.info[k]},
                }
                save_png(episode.pixels.numpy(), run.directory / "images" / f"{done + k:05d}.png", story)
            done += len(episodes)

        with display.progress(len(prompts) * config.eval.samples, f"evaluating {model}") as advance:
            return evaluate(
                policy,
                prompts,
                rewards,
                eval_sampling(config),
                samples=config.eval.samples,
                seed=config.eval.seed,
                on_rows=advance,
                on_groups=save if run is not None else lambda groups, scored: None,
            )


def _table(display: Display, config: Config, report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{report['model']} on {config.eval.suite}, {report['n']} images", title_style="bold")
    table.add_column("reward")
    for column in ("mean", "95 %", *report["per_task"]):
        table.add_column(column, justify="right")
    for name, score in report["scores"].items():
        low, high = score["ci95"]
        tasks = [report["per_task"][task].get(name) for task in report["per_task"]]
        cells = ["-" if value is None else f"{value:.2f}" for value in tasks]
        table.add_row(name, f"{score['mean']:.3f}", f"[{low:.3f}, {high:.3f}]".replace("[", "\\["), *cells)
    display.say(table)
    for name, difference in report.get("difference", {}).items():
        low, high = difference["ci95"]
        display.say(
            f"{name}: {report['compare']['model']} minus {report['model']} = "
            f"{difference['mean']:+.3f} (95 % {low:+.3f} to {high:+.3f})"
        )


def _gate(text: str) -> tuple[str, float]:
    from unigrpo_cli.errors import UsageError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UsageError(f"--fail-under {text}: write it as NAME=VALUE, e.g. geneval=0.6") from None


def _check_gates(gates: list[tuple[str, float]], report: dict[str, Any]) -> None:
    from unigrpo_cli.errors import GateError

    for name, least in gates:
        mean = report["scores"][name]["mean"]
        if mean < least:
            raise GateError(f"{name} {mean:.3f} is under --fail-under {name}={least:g}")


class _RemovedIfEmpty:
    """Leave no empty directory behind when an evaluation is refused."""

    def __init__(self, run: Any):
        self.directory = run.directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and not any(self.directory.iterdir()):
            self.directory.rmdir()
