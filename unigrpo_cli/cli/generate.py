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
    from unigrpo_cli.episode import Group, Prompt
    from unigrpo_cli.models.policy import Policy
    from unigrpo_cli.run.console import Display


@one_error_line
def generate(
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to paint.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A .txt file (a prompt a line) or a .jsonl file.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="A picture to start from: an edit, or what is asked about.")
    ] = None,
    answer: Annotated[bool, typer.Option("--answer", help="Answer in words; paint nothing.")] = False,
    model: common.Model = None,
    weights_file: common.WeightsFile = None,
    adapter: common.Adapter = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Images per prompt.")] = 1,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Reason before painting (sampling.think).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="Of the reasoning; 0 is greedy.")
    ] = None,
    out: common.Out = None,
    seed: common.Seed = None,
    preset: common.Preset = None,
    config: common.ConfigFile = None,
    overrides: common.Set = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Reason about prompts and paint them, edit a picture, or answer about one.

    Writes --out: one PNG per image (prompt and reasoning inside) with a .json file beside it, and sheet.png; with
    --answer answers.json.
    """
    from dataclasses import replace

    from unigrpo_cli.errors import UsageError
    from unigrpo_cli.evaluate import NO_NOISE, eval_sampling
    from unigrpo_cli.io.limits import refuse_odd_text
    from unigrpo_cli.models.mot.resize import read_picture
    from unigrpo_cli.rollout import rollout
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.directory import new_directory
    from unigrpo_cli.run.memory.plan import with_rows
    from unigrpo_cli.run.setup import load_policy, model_of, warn_of_unknown_words
    from unigrpo_cli.suites import as_prompts, read_prompts, typed_prompt

    display = Display(json=json, quiet=quiet)
    settings = common.resolve_config(
        preset=preset,
        config=config,
        overrides=overrides,
        named={
            "model": model,
            "weights_file": weights_file,
            "adapter": adapter,
            "sampling.think": think,
            "eval.temperature": temperature,
            "seed": seed,
        },
    )
    if any(not text.strip() for text in texts or []):
        raise UsageError("an empty prompt says nothing; write what to paint")
    try:
        refuse_odd_text(texts or [])
    except ValueError as error:
        raise UsageError(f"PROMPT: {error}") from error
    wanted = as_prompts([typed_prompt(text) for text in texts or []])
    wanted += read_prompts(prompts) if prompts is not None else []
    if not wanted:
        raise UsageError('say what to paint: unigrpo generate "a red circle", or --prompts FILE')
    if image is not None:
        read_picture(image)
        wanted = [replace(prompt, image=str(image)) for prompt in wanted]
    if not answer:
        settings = with_rows(settings, wanted, samples, display.say)
    policy = load_policy(model_of(settings), settings.adapter, settings)
    if any(prompt.image for prompt in wanted):
        policy.require_vision()
    warn_of_unknown_words(policy, wanted, display.warn)
    with new_directory(out, "generate") as directory:
        if answer:
            answers = _answer(policy, wanted, settings, directory, display)
            if json:
                common.print_json({"run": str(directory), "answers": answers})
            return
        with display.progress(len(wanted) * samples, "painting") as advance:
            groups = rollout(policy, wanted, samples, eval_sampling(settings), NO_NOISE, settings.seed, advance)
        images = _record(groups, settings, directory, display)
        if json:
            common.print_json({"run": str(directory), "images": images})


def _record(groups: Sequence[Group], settings: Config, directory: Path, display: Display) -> list[dict[str, Any]]:
    """Write every picture with its story, and the sheet; gives the stories."""
    from unigrpo_cli.io.pictures import Tile, in_terminal, save_png, sheet

    images, tiles = [], []
    for g, group in enumerate(groups):
        for episode in group.episodes:
            path = directory / f"{g:03d}_{episode.member:02d}.png"
            pixels = episode.pixels.numpy()
            story: dict[str, Any] = {
                "prompt": group.prompt.text,
                "source": group.prompt.image,
                "reasoning": episode.reasoning,
                "model": settings.model,
                "adapter": settings.adapter,
                "seed": settings.seed,
                "sample": episode.member,
            }
            save_png(pixels, path, story)
            images.append({"path": str(path)} | story)
            lines = (episode.reasoning,) if episode.reasoning else ()
            tiles.append(Tile(pixels, group.prompt.text, lines))
            display.say(group.prompt.text, style="bold")
            if episode.reasoning:
                display.say(f"  {episode.reasoning}")
            if display.console.is_terminal and not display.quiet:
                display.console.print(in_terminal(pixels))
            display.say(f"  {path}")
    sheet([tiles[k : k + 4] for k in range(0, len(tiles), 4)]).save(directory / "sheet.png")
    return images


def _answer(
    policy: Policy, prompts: Sequence[Prompt], settings: Config, directory: Path, display: Display
) -> list[dict[str, Any]]:
    """Answers in words, to the screen and to answers.json."""
    from unigrpo_cli.evaluate import eval_sampling
    from unigrpo_cli.io.json import to_json
    from unigrpo_cli.rollout import answer

    answers = []
    with display.progress(len(prompts), "answering") as advance:
        for prompt in prompts:
            (text,) = answer(policy, [prompt], eval_sampling(settings), settings.seed)
            advance(1)
            answers.append(
                {"prompt": prompt.text, "source": prompt.image, "answer": text.text, "finished": text.finished}
            )
    for row in answers:
        display.say(row["prompt"], style="bold")
        display.say(f"  {row['answer']}")
    (directory / "answers.json").write_text(to_json(answers, indent=1) + "\n")
    return answers
