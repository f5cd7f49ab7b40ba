"""Sample sheets: the same held-out prompts with the same noise, during a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from unigrpo_cli.episode import PAINTED, Episode, GivenImage, Group
from unigrpo_cli.io.atomic import new_directory, new_file
from unigrpo_cli.io.pictures import Tile, save_png, sheet
from unigrpo_cli.rewards.batch import RewardResult
from unigrpo_cli.training.maps import Maps

SHOWN = 8
MOST_COLUMNS = 8


def tiles_of(episode: Episode, lines: Sequence[str] = ()) -> list[Tile]:
    """What an episode was given and painted, a tile per picture: its text below it, `lines` below the last."""
    sources = [s for s in episode.segments if isinstance(s, GivenImage) and s.role != PAINTED]
    tiles = [Tile(source.pixels.numpy(), "source") for source in sources]
    for k, (text, image) in enumerate(episode.rounds):
        if image is None:
            tiles[-1] = replace(tiles[-1], lines=(*tiles[-1].lines, f"then: {text}"))
        else:
            title = episode.prompt.text if k == 0 else f"round {k + 1}"
            tiles.append(Tile(image.pixels.numpy(), title, (text,) if text else ()))
    tiles[-1] = replace(tiles[-1], lines=(*tiles[-1].lines, *lines))
    return tiles


def sheet_rows(episodes: Sequence[list[Tile]]) -> list[list[Tile]]:
    """Four episodes of one picture in a row, or one of several."""
    if any(len(tiles) > 1 for tiles in episodes):
        return [*episodes]
    single = [tile for tiles in episodes for tile in tiles]
    return [single[k : k + 4] for k in range(0, len(single), 4)]


def save_samples(
    groups: Sequence[Group], scored: dict[str, RewardResult], folder: Path, step: int, maps: Sequence[Maps] = ()
) -> Path:
    """A PNG with its metadata per prompt in `step_NNNNNN/`, and a sheet of them, `step_NNNNNN.png`, returned.

    Args:
        maps: advantage maps of each prompt's images, see `save_maps`; their names begin with the prompt's number.
    """
    tiles = []
    name = f"step_{step:06d}"
    with new_directory(folder / name, sums=False) as pictures:
        for k, group in enumerate(groups):
            episode = group.episodes[0]
            scores = {name: float(s.scores[k]) for name, s in scored.items() if s.valid[k]}
            story = {
                "step": step,
                "prompt": group.prompt.text,
                "reasoning": episode.reasoning,
                "scores": scores,
                "seed": episode.seed,
            }
            pixels = episode.pixels.numpy()
            save_png(pixels, pictures / f"{k}.png", story)
            words = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
            tiles.append(tiles_of(episode, [words] if words else []))
        save_maps(
            [(str(k), group.episodes[0], own) for k, (group, own) in enumerate(zip(groups, maps, strict=False))],
            pictures,
        )
    page = sheet(sheet_rows(tiles), f"step {step}")
    _save_sheet(page, path := folder / f"{name}.png")
    return path


def save_maps(maps: Iterable[tuple[str, Episode, Maps]], folder: Path) -> None:
    """Advantage maps of episodes: grey pictures in `maps/`, white the largest weight, and `maps.safetensors`.

    That has the values [rows, columns] by the episode's name and the number of its image, e.g. `0_1`. Nothing is
    written for episodes that have no map.
    """
    found: dict[str, Tensor] = {}
    for name, episode, own in maps:
        for k, (weights_N, image) in enumerate(zip(own, episode.images, strict=False), start=1):
            (folder / "maps").mkdir(exist_ok=True)
            found[f"{name}_{k}"] = weights = weights_N.view(image.grid)
            height, width = image.pixels.shape[:2]
            grey = Image.fromarray((weights / weights.max() * 255).to(torch.uint8).numpy())
            grey.resize((width, height), Image.Resampling.NEAREST).save(folder / "maps" / f"{name}_{k}.png")
    if found:
        save_file(found, folder / "maps.safetensors")


def save_progress(folder: Path) -> None:
    """`progress.png`: a row per prompt, a column per step, from the pictures on disk."""
    steps = sorted(p for p in folder.glob("step_*") if p.is_dir() and not p.suffix)
    if len(steps) > MOST_COLUMNS:
        steps = [steps[round(k)] for k in np.linspace(0, len(steps) - 1, MOST_COLUMNS)]
    rows: dict[str, list[Tile]] = {}
    for step in steps:
        for path in sorted(step.glob("*.png"), key=lambda p: int(p.stem)):
            try:
                story = json.loads(path.with_suffix(".json").read_text())
                pixels = np.asarray(Image.open(path))
            except (OSError, ValueError):  # cut short by a crash; the checkpoint is what matters
                continue
            rows.setdefault(story["prompt"], []).append(Tile(pixels, _title(story), (story["reasoning"] or "",)))
    if rows:
        page = sheet(list(rows.values()), "the same prompts on the same noise, step by step")
        _save_sheet(page, folder / "progress.png")


def _save_sheet(page: Image.Image, path: Path) -> None:
    with new_file(path) as partial:
        page.save(partial, format="PNG")


def _title(story: dict) -> str:
    return story["prompt"] if story["step"] == 0 else f"step {story['step']}"
