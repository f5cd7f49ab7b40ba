"""`unigrpo sft`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.cli.train import DryRun, ReportTo, Resume, Steps, finish, opened
from unigrpo_cli.errors import UsageError

if TYPE_CHECKING:
    from unigrpo_cli.config import Config


@one_error_line
def sft(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]...",
            help="Answers: .jsonl files of prompt, reasoning and image, or directories that `rollout` wrote.",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep", help="Episodes of each group of a rollout: best:N, or above:X by the weighted sum of rewards."
        ),
    ] = None,
    reward: common.Reward = None,
    reward_opt: common.RewardOpt = None,
    model: common.Model = None,
    weights_file: common.WeightsFile = None,
    adapter: common.Adapter = None,
    steps: Steps = None,
    out: common.Out = None,
    resume: Resume = None,
    report_to: ReportTo = None,
    seed: common.Seed = None,
    preset: common.Preset = None,
    config: common.ConfigFile = None,
    overrides: common.Set = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    dry_run: DryRun = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Fine-tune a unified model on given answers: a cold start before `unigrpo train`.

    A step takes train.prompts_per_step answers: cross-entropy of the reasoning, flow matching of the image
    (docs/sft.md). Rewards only evaluate. Writes what `unigrpo train` writes, and resumes as it does.
    """
    with opened(context, _with_data) as trainer:
        summary = trainer.run() if trainer is not None else None
    finish(context, summary)


def _with_data(config: Config) -> Config:
    """Settings with absolute paths of the data, so that a run resumes from anywhere."""
    from unigrpo_cli.config import with_values

    if not config.sft.data:
        raise UsageError("sft imitates answers: give .jsonl files, or directories that `unigrpo rollout` wrote")
    return with_values(config, {"sft.data": tuple(os.path.abspath(source) for source in config.sft.data)})
