"""`unigrpo rollout`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.parallel.launch import launched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unigrpo_cli.config import Config
    from unigrpo_cli.episode import Group, Prompt
    from unigrpo_cli.models.policy import Policy
    from unigrpo_cli.parallel.ranks import Ranks
    from unigrpo_cli.rewards.batch import RewardResult
    from unigrpo_cli.rewards.registry import Plugins
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.directory import Run
    from unigrpo_cli.training.maps import Maps

DEFAULT_LIMIT = 8


@one_error_line
def rollout(
    context: typer.Context,
    reward: common.Reward = None,
    reward_opt: common.RewardOpt = None,
    model: common.Model = None,
    weights_file: common.WeightsFile = None,
    adapter: common.Adapter = None,
    prompts: common.Prompts = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help=f"Number of prompts, from the first (default {DEFAULT_LIMIT}).")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", min=2, help="Episodes per prompt (train.group_size).")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Score the episodes saved in this directory instead of sampling."),
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
    """Sample groups of episodes as training does, or score saved ones with other rewards.

    Writes to --out: episodes.json and episodes.safetensors (all actions), rewards.json, images/; with advantage.map
    also maps/ and maps.safetensors.
    """
    from unigrpo_cli.errors import UsageError
    from unigrpo_cli.parallel.join import join_ranks
    from unigrpo_cli.run.console import Display

    rank, _, _ = launched()
    display = Display(json=json, quiet=quiet, rank=rank)
    with join_ranks() as ranks:
        with ranks.together():
            plugins = common.load_plugins(plugin, plugins_dir, display)
            settings = common.resolve_config(context, {"group_size": "train.group_size"})
            plugins.call("unigrpo_configure", config=settings)
            if not settings.reward.names:
                raise UsageError("no reward is chosen: give --reward, e.g. --reward clip,geneval")
            for_sampling = {"--limit": limit, "--group-size": group_size, "--prompts": prompts, "--adapter": adapter}
            for_sampling["--weights-file"] = weights_file
            given = [name for name, value in for_sampling.items() if value is not None]
            if source is not None and given:
                raise UsageError(f"--from scores saved episodes and samples nothing: leave out {', '.join(given)}")
        summary = _sample_and_score(settings, plugins, source, limit or DEFAULT_LIMIT, out, display, ranks)
    if rank > 0:
        return
    means = ", ".join(f"{name} {'-' if mean is None else f'{mean:.3f}'}" for name, mean in summary["rewards"].items())
    counts = f"{summary['episodes']} episodes in {summary['groups']} groups"
    display.say(f"{counts}: {means}\nwritten to {summary['run']}")
    if json:
        common.print_json(summary)


def _sample_and_score(
    settings: Config,
    plugins: Plugins,
    source: Path | None,
    limit: int,
    out: Path | None,
    display: Display,
    ranks: Ranks,
) -> dict[str, Any]:
    """Score whole groups, sampled or saved, split over the ranks; rank 0 writes them and returns the summary."""
    from unigrpo_cli.episode import flatten
    from unigrpo_cli.errors import RewardError, quoted
    from unigrpo_cli.evaluate import samples_of
    from unigrpo_cli.rewards.spec import parse_rewards
    from unigrpo_cli.run.directory import Run, new_directory
    from unigrpo_cli.run.episode_files import load_episodes, save_episodes
    from unigrpo_cli.run.inputs import with_suite
    from unigrpo_cli.run.memory.plan import with_batch_size
    from unigrpo_cli.run.records import groups_of_all
    from unigrpo_cli.run.setup import check_prompts, is_embedded, load_policy, model_of, open_rewards
    from unigrpo_cli.suites import training_prompts
    from unigrpo_cli.training.maps import advantage_maps, check_map

    with ranks.together():
        check_map(settings, plugins)
        choices = parse_rewards(settings.reward.names, settings.reward.options)
        if source is not None:
            saved = load_episodes(source)
            chosen = [group.prompt for group in saved]
            embedded, thinks = settings.model == "embedded", _all_think(saved)
        else:
            chosen = training_prompts(settings.prompts, with_suite(settings).eval.suite)[:limit]
            settings = with_batch_size(settings, chosen, settings.train.group_size, display.say)
            policy = load_policy(model_of(settings), settings.adapter, settings, display.warn)
            embedded, thinks = is_embedded(policy), settings.sampling.think
    with open_rewards(choices, plugins, settings, embedded=embedded, ranks=ranks) as rewards, ExitStack() as held:
        with ranks.together():
            check_prompts(rewards, chosen, thinks, "train")
            run = Run(held.enter_context(new_directory(out, "rollout"))) if ranks.first else None
        if source is not None:
            groups, own = saved, ranks.stretch(saved)
        else:
            own = _sampled(policy, chosen, settings, display, ranks)
            groups = groups_of_all(own, ranks)
        with ranks.together():
            if run is not None:
                run.describe(settings)
                save_episodes(groups, run.directory)
        try:
            scored = rewards.score(samples_of(own), split="train", ranks=ranks, every_picture=True)
        except RewardError:
            if run is not None:
                display.warn(
                    f"the episodes are saved; score them with `unigrpo rollout --from {quoted(run.directory)}`"
                )
            raise
        with ranks.together():
            if run is None:
                return {}
            maps = advantage_maps(flatten(groups), samples_of(groups), rewards, settings, step=0, split="train")
            return _record(run, groups, scored, rewards.weights, maps)


def _sampled(
    policy: Policy, prompts: Sequence[Prompt], settings: Config, display: Display, ranks: Ranks
) -> list[Group]:
    """This rank's groups, as the first training step would sample them."""
    from unigrpo_cli.episode import flatten
    from unigrpo_cli.evaluate import refuse_non_finite, train_sampling
    from unigrpo_cli.rollout import rollout as sample
    from unigrpo_cli.training.schedule import later_windows, window_of

    members = settings.train.group_size
    with display.progress(len(prompts) * members, "sampling") as advance, ranks.together():
        window = window_of(settings, 0)
        groups = sample(
            policy,
            ranks.stretch(prompts),
            members,
            train_sampling(settings),
            window,
            settings.seed,
            lambda rows: advance(rows * ranks.world),
            later_windows=later_windows(settings, 0),
        )
        refuse_non_finite(flatten(groups))
    return groups


def _record(
    run: Run,
    groups: Sequence[Group],
    scored: dict[str, RewardResult],
    weights: dict[str, float],
    maps: Sequence[Maps],
) -> dict[str, Any]:
    """Write rewards.json, images/ and the maps that there are; returns the summary."""
    from unigrpo_cli.episode import flatten
    from unigrpo_cli.io.pictures import save_png
    from unigrpo_cli.run.records import reward_rows
    from unigrpo_cli.run.samples import save_maps

    rows = reward_rows(groups, scored, weights)
    run.write_json("rewards.json", rows)
    for row, episode in zip(rows, flatten(groups), strict=True):
        path = run.directory / "images" / row["image"]
        save_png(episode.pixels.numpy(), path, row)
        for k, image in enumerate(episode.images[:-1]):
            save_png(image.pixels.numpy(), path.with_stem(f"{path.stem}_round_{k + 1}"), row | {"round": k + 1})
    names = [Path(row["image"]).stem for row in rows]
    save_maps(zip(names, flatten(groups), maps, strict=True), run.directory)
    return {
        "run": str(run.directory),
        "episodes": len(rows),
        "groups": len(groups),
        "rewards": {name: own.mean for name, own in scored.items()},
        "abstained": {name: int((~own.valid).sum()) for name, own in scored.items()},
    }


def _all_think(groups: Sequence[Group]) -> bool:
    return all(e.reasoning is not None for g in groups for e in g.episodes)
