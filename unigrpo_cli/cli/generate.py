"""`unigrpo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unigrpo_cli.config import Config
    from unigrpo_cli.episode import Episode, Group, Prompt
    from unigrpo_cli.models.policy import Policy
    from unigrpo_cli.run.console import Display

MOST_SAMPLES = 10_000
LARGEST_BATCH = 64
"""Images sampled at a time when sampling.batch_size is 0; half as many after an out-of-memory error."""


@one_error_line
def generate(
    context: typer.Context,
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="A .txt file, one prompt per line, or .jsonl, .csv, .tsv, .parquet."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", help="Image to edit, or to ask about with --answer; repeatable, an edit has the last one's size."
        ),
    ] = None,
    answer: Annotated[bool, typer.Option("--answer", help="Answer in words; generate no image.")] = False,
    model: common.Model = None,
    weights_file: common.WeightsFile = None,
    adapter: common.Adapter = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST_SAMPLES, help="Images per prompt.")] = 1,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Reason before painting (sampling.think).")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", min=1, help="Images per sample, each painted after a look at the last (sampling.rounds)."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="Temperature of the reasoning; 0: greedy.")
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
    """Reason about prompts and paint them, edit an image, or answer a question about one.

    Writes to --out: one PNG per image, with the prompt and the reasoning inside and in a .json file next to it, and
    sheet.png; of several rounds the images before the last too; with --answer, answers.json.
    """
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.directory import new_directory
    from unigrpo_cli.run.setup import load_policy, model_of, warn_of_unknown_words

    display = Display(json=json, quiet=quiet)
    common.load_plugins(plugin, plugins_dir, display)
    own = {"think": "sampling.think", "temperature": "eval.temperature", "rounds": "sampling.rounds"}
    settings = common.resolve_config(context, own)
    prompts = _prompts(texts or [], prompts_file, image or [])
    policy = load_policy(model_of(settings), settings.adapter, settings, display.warn)
    if answer and any(prompt.image is not None for prompt in prompts):
        policy.require_vision()
    warn_of_unknown_words(policy, prompts, display.warn)
    with new_directory(out, "generate") as directory:
        if answer:
            answers = _answers(policy, prompts, settings, directory, display)
            if json:
                common.print_json({"run": str(directory), "answers": answers})
            return
        images = _save(_sample(policy, prompts, samples, settings, display), settings, directory, display)
        if json:
            common.print_json({"run": str(directory), "images": images})


def _prompts(texts: list[str], file: Path | None, images: list[Path]) -> list[Prompt]:
    """Typed prompts, then those of the file, each with the images if there are any."""
    from dataclasses import replace

    from unigrpo_cli.errors import UsageError
    from unigrpo_cli.io.limits import refuse_odd_prompt
    from unigrpo_cli.io.pictures import read_picture
    from unigrpo_cli.suites import as_prompts, read_prompts, typed_prompt

    for text in texts:
        try:
            refuse_odd_prompt(text)
        except ValueError as error:
            raise UsageError(f"PROMPT: {error}") from error
    prompts = as_prompts([typed_prompt(text) for text in texts])
    prompts += read_prompts(file) if file is not None else []
    if not prompts:
        raise UsageError('no prompt: give one, e.g. unigrpo generate "a red circle", or --prompts FILE')
    for path in images:
        read_picture(path)
    if images:
        given = str(images[0]) if len(images) == 1 else tuple(map(str, images))
        prompts = [replace(prompt, image=given) for prompt in prompts]
    return prompts


def _sample(policy: Policy, prompts: Sequence[Prompt], samples: int, settings: Config, display: Display) -> list[Group]:
    from dataclasses import replace

    from unigrpo_cli.episode import flatten
    from unigrpo_cli.evaluate import NO_NOISE, eval_sampling, refuse_non_finite
    from unigrpo_cli.parallel.out_of_memory import halve_until_it_fits
    from unigrpo_cli.rollout import rollout

    count = len(prompts) * samples

    def sample(batch_size: int) -> list[Group]:
        sampling = replace(eval_sampling(settings), batch_size=batch_size)
        with display.progress(count, "painting") as advance:
            return rollout(policy, prompts, samples, sampling, NO_NOISE, settings.seed, advance)

    first_size = settings.sampling.batch_size or min(count, LARGEST_BATCH)
    groups = halve_until_it_fits(sample, first_size, display.warn)
    refuse_non_finite(flatten(groups))
    return groups


def _save(groups: Sequence[Group], settings: Config, directory: Path, display: Display) -> list[dict[str, Any]]:
    """Write every image with its record, and the sheet; returns the records."""
    from unigrpo_cli.io.pictures import in_terminal, save_png, sheet
    from unigrpo_cli.run.samples import sheet_rows, tiles_of

    images, tiles = [], []
    for g, group in enumerate(groups):
        for episode in group.episodes:
            path = directory / f"{g:03d}_{episode.member:02d}.png"
            pixels = episode.pixels.numpy()
            record: dict[str, Any] = {
                "prompt": group.prompt.text,
                "source": group.prompt.image,
                "reasoning": episode.reasoning,
                "model": settings.model,
                "adapter": settings.adapter,
                "seed": settings.seed,
                "sample": episode.member,
            }
            if len(episode.rounds) > 1:
                record["rounds"] = _save_rounds(episode, path, record)
            save_png(pixels, path, record)
            images.append({"path": str(path)} | record)
            tiles.append(tiles_of(episode))
            display.say(group.prompt.text, style="bold")
            if episode.reasoning:
                display.say(f"  {episode.reasoning}")
            if display.console.is_terminal and not display.quiet:
                display.console.print(in_terminal(pixels))
            display.say(f"  {path}")
    sheet(sheet_rows(tiles)).save(directory / "sheet.png")
    display.say(f"all images: {directory / 'sheet.png'}")
    return images


def _save_rounds(episode: Episode, last: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the images before the last; each round's text and image."""
    from unigrpo_cli.io.pictures import save_png

    rounds: list[dict[str, Any]] = []
    for k, (text, image) in enumerate(episode.rounds):
        path = last if image is episode.images[-1] else last.with_stem(f"{last.stem}_round_{k + 1}")
        rounds.append({"text": text, "path": str(path) if image is not None else None})
        if image is not None and path != last:
            save_png(image.pixels.numpy(), path, record | {"round": k + 1, "reasoning": text})
    return rounds


def _answers(
    policy: Policy, prompts: Sequence[Prompt], settings: Config, directory: Path, display: Display
) -> list[dict[str, Any]]:
    """Answers in words, printed and written to answers.json."""
    from unigrpo_cli.evaluate import eval_sampling, refuse_non_finite_actions
    from unigrpo_cli.io.json import to_json
    from unigrpo_cli.rollout import answer

    answers = []
    with display.progress(len(prompts), "answering") as advance:
        for prompt in prompts:
            (text,) = answer(policy, [prompt], eval_sampling(settings), settings.seed)
            advance(1)
            refuse_non_finite_actions("logits", text.log_prob, prompt)
            answers.append(
                {
                    "prompt": prompt.text,
                    "source": prompt.image,
                    "answer": text.text,
                    "finished": text.finished,
                }
            )
    for row in answers:
        display.say(row["prompt"], style="bold")
        display.say(f"  {row['answer']}")
    (directory / "answers.json").write_text(to_json(answers, indent=1) + "\n", encoding="utf-8")
    return answers
