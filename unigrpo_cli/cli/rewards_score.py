"""`unigrpo rewards score` and `calibrate`: rewards on pictures that are files."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import UsageError

if TYPE_CHECKING:
    from unigrpo_cli.rewards.batch import RewardResult, Sample
    from unigrpo_cli.rewards.spec import RewardSpec

PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="A .jsonl file of rows with `prompt` and `image`, relative to this file."),
]
Split = Annotated[
    str, typer.Option("--split", help="Score as in `eval` or as in `train`, for rewards that differ there.")
]


@one_error_line
def score(
    name: Annotated[str, typer.Argument(help="Rewards as in --reward, options included.")],
    image: Annotated[list[Path] | None, typer.Option("--image", help="A picture; repeatable.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="The prompt: one for all pictures, or one for each."),
    ] = None,
    prompts: PromptsFile = None,
    reasoning: Annotated[
        str | None, typer.Option("--reasoning", help="What the policy wrote, for rewards that read it.")
    ] = None,
    split: Split = "eval",
    reward_opt: common.RewardOpt = None,
    device: common.Device = "auto",
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
) -> None:
    """Score image files. Images from unigrpo carry their prompt and reasoning."""
    from unigrpo_cli.rewards.spec import parse_rewards
    from unigrpo_cli.run.console import Display

    Display(json=json)  # whose warnings are one line
    choices = parse_rewards([name], common.reward_options(reward_opt))
    samples = _given(image, prompt, prompts, reasoning)
    scored = _scored(choices, samples, split, plugin, plugins_dir, device, json)
    rows = [_row(k, sample, scored) for k, sample in enumerate(samples)]
    if json:
        common.print_json({"reward": name, "split": split, "images": rows})
        return
    for row in rows:
        values = ", ".join(f"{n} {_shown(value)}" for n, value in row["scores"].items())
        typer.echo(f"{row['image']}: {values}")


@one_error_line
def calibrate(
    first: Annotated[str, typer.Argument(help="A reward as in --reward.")],
    second: Annotated[str, typer.Argument(help="The reward to compare it with.")],
    images: Annotated[Path | None, typer.Option("--images", help="Folder of pictures, subfolders included.")] = None,
    prompts: PromptsFile = None,
    threshold: Annotated[float, typer.Option("--threshold", help="Scores from this value on count as yes.")] = 0.5,
    split: Split = "eval",
    device: common.Device = "auto",
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
) -> None:
    """Compare two rewards on the same pictures, over all and per task.

    Reports Spearman's correlation, the share of equal verdicts, Cohen's kappa of the verdicts, and the mean of A - B.
    """
    from dataclasses import replace

    from unigrpo_cli.rewards.agreement import agreement
    from unigrpo_cli.rewards.spec import parse_rewards
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.suites import NO_TASK

    Display(json=json)  # whose warnings are one line
    if not math.isfinite(threshold):
        raise UsageError(f"--threshold {threshold}: a finite number is needed, e.g. 0.5")
    samples = _of_folder(images, prompts)
    choices = []
    for alias, text in (("A", first), ("B", second)):
        (choice, *more) = parse_rewards([text])
        if more:
            raise UsageError(f"{text!r} names several rewards; calibrate compares one with one")
        choices.append(replace(choice, alias=alias))
    scored = _scored(choices, samples, split, plugin, plugins_dir, device, json)
    tags = [str(sample.metadata.get("tag", NO_TASK)) for sample in samples]
    report = {"a": first, "b": second, "split": split}
    report |= agreement(scored["A"].scores, scored["B"].scores, tags, threshold)
    if json:
        common.print_json(report)
    else:
        _show_agreement(report)


def _show_agreement(report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from unigrpo_cli.run.console import Display

    display = Display()
    table = Table(box=None, header_style="dim")
    columns = ("spearman", "agreement", "kappa", "mean_difference")
    for column in ("", "n", "Spearman", f"agree at {report['threshold']:g}", "kappa", "mean A - B"):
        table.add_column(column, justify="left" if not column else "right")
    for tag, row in [*report["per_tag"].items(), ("all", report)]:
        table.add_row(Text(tag), str(row["n"]), *(_shown(row[key]) for key in columns))
    a, b = report["abstained"]
    display.say(f"A {report['a']}, B {report['b']}; without opinion: A {a}, B {b}")
    display.say(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _row(k: int, sample: Sample, scored: dict[str, RewardResult]) -> dict[str, Any]:
    from unigrpo_cli.rewards.batch import segments_row

    return {
        "image": sample.id,
        "prompt": sample.prompt,
        "scores": {n: float(s.scores[k]) if s.valid[k] else None for n, s in scored.items()},
        "components": {n: {part: float(v[k]) for part, v in s.components.items()} for n, s in scored.items()},
        "info": {n: s.info[k] for n, s in scored.items() if s.info[k]},
    } | segments_row(k, scored)


def _scored(
    choices: list[RewardSpec],
    samples: list[Sample],
    split: str,
    plugin: list[str] | None,
    plugins_dir: Path | None,
    device: str,
    json: bool,
) -> dict[str, RewardResult]:
    """Scores of the samples; a reward may abstain on all of them."""
    from unigrpo_cli.run.console import Display

    if split not in ("train", "eval"):
        raise UsageError(f"--split {split}: accepted: eval, train")
    plugins = common.load_plugins(plugin, plugins_dir, Display(json=json))
    with common.rewards_alone(choices, plugins, device) as rewards:
        thinks = all(sample.reasoning is not None for sample in samples)
        given = all(sample.source is not None for sample in samples)
        rewards.check_needs([s.metadata for s in samples], has_reasoning=thinks, has_source=given, split=split)
        return rewards.score(samples, split=split)


def _given(
    images: list[Path] | None, prompt: list[str] | None, file: Path | None, reasoning: str | None
) -> list[Sample]:
    """The samples that --image and --prompt, or --prompts, name."""
    if file is not None:
        if images or prompt or reasoning:
            raise UsageError("--prompts has pictures and prompts in it: leave out --image, --prompt and --reasoning")
        return _of_file(file)
    if not images:
        raise UsageError("say what to score: --image x.png --prompt TEXT, or --prompts file.jsonl")
    asked = prompt or []
    if len(asked) not in (0, 1, len(images)):
        raise UsageError(f"{len(asked)} prompts for {len(images)} pictures; give one for all, or one for each")
    texts: list[str | None] = [*asked] * len(images) if len(asked) == 1 else [*asked] or [None] * len(images)
    return [_sample(path, text, reasoning) for path, text in zip(images, texts, strict=True)]


def _of_file(path: Path) -> list[Sample]:
    """The samples of a .jsonl file; their ids are the paths of their pictures."""
    from unigrpo_cli.suites import read_prompts

    samples = []
    for prompt in read_prompts(path):
        if not isinstance(prompt.image, str):
            raise UsageError(f"{path}: the row of prompt {prompt.text!r} needs one `image`, relative to {path.name}")
        reasoning = prompt.metadata.get("reasoning")
        samples.append(_sample(Path(prompt.image), prompt.text, reasoning, prompt.metadata))
    return samples


def _of_folder(folder: Path | None, file: Path | None) -> list[Sample]:
    """The pictures of a folder, with the prompts of a file where it has them; without a folder, the file's."""
    rows = _of_file(file) if file is not None else []
    if folder is None:
        if not rows:
            raise UsageError("say what to score: --images DIR, or --prompts file.jsonl")
        return rows
    if not folder.is_dir():
        raise UsageError(f"--images {folder} is no folder; give one with pictures")
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    if not paths:
        raise UsageError(f"--images {folder} holds no picture ({', '.join(kinds)})")
    found: list[Sample] = []
    for path in paths:
        found += [row for row in rows if Path(row.id) == path.resolve()] or [_sample(path, None, None)]
    return found


def _sample(path: Path, prompt: str | None, reasoning: str | None, metadata: dict[str, Any] | None = None) -> Sample:
    """A picture with what was asked; what is not said comes from the record inside a picture of ours."""
    from unigrpo_cli.io.pictures import read_picture_and_record
    from unigrpo_cli.rewards.batch import Sample
    from unigrpo_cli.suites import typed_prompt

    pixels, record = read_picture_and_record(path)
    text = prompt if prompt is not None else record.get("prompt")
    if not isinstance(text, str):  # rewards of the picture alone do not mind
        text = ""
        warnings.warn(f"{path} has no prompt inside; give --prompt, or its row in --prompts", stacklevel=2)
    own = record.get("reasoning") if prompt is None or prompt == record.get("prompt") else None
    thought = reasoning if reasoning is not None else own
    return Sample(text, pixels, thought, typed_prompt(text) if metadata is None else metadata, str(path), str(path))
