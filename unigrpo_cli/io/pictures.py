"""Pictures for people: sheets with captions, PNG files with their story, and a terminal's worth of pixels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from rich.text import Text

from unigrpo_cli.io.json import to_json

TILE = 192  # pixels per side of a picture on a sheet
MARGIN, LINE, FONT = 10, 15, 12
PAPER, INK, SOFT = (252, 252, 250), (30, 30, 34), (110, 110, 118)

Array = NDArray[np.uint8]


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet with what is written under it: a title, then smaller lines."""

    pixels: Array
    title: str
    lines: tuple[str, ...] = ()


def enlarge(pixels: Array, side: int) -> Image.Image:
    """A picture whose longer side is about `side`: whole pixels repeated when small, resampled when large."""
    image = Image.fromarray(np.asarray(pixels))
    longest = max(image.size)
    if longest * 2 <= side:
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def sheet(rows: Sequence[Sequence[Tile]], heading: str = "") -> Image.Image:
    """A page of captioned pictures."""
    font, small = ImageFont.load_default(FONT), ImageFont.load_default(FONT - 1)
    wrapped = [[_wrap(tile) for tile in row] for row in rows]
    tall = [max(len(title) + len(lines) for title, lines in row) * LINE + 4 for row in wrapped]
    columns = max(len(row) for row in rows)
    top = MARGIN + (2 * LINE if heading else 0)
    width = columns * (TILE + MARGIN) + MARGIN
    height = top + sum(TILE + text + MARGIN for text in tall)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    if heading:
        draw.text((MARGIN, MARGIN), heading, INK, ImageFont.load_default(FONT + 3))
    y = top
    for row, captions, text in zip(rows, wrapped, tall, strict=True):
        for column, (tile, (title, lines)) in enumerate(zip(row, captions, strict=True)):
            x = MARGIN + column * (TILE + MARGIN)
            picture = enlarge(tile.pixels, TILE)
            page.paste(picture, (x + (TILE - picture.width) // 2, y + (TILE - picture.height) // 2))
            for k, line in enumerate([*title, *lines]):
                draw.text(
                    (x, y + TILE + 3 + k * LINE),
                    line,
                    INK if k < len(title) else SOFT,
                    font if k < len(title) else small,
                )
        y += TILE + text + MARGIN
    return page


def _wrap(tile: Tile) -> tuple[list[str], list[str]]:
    wide = TILE // 6
    title = textwrap.wrap(tile.title, wide)[:3]
    return title, [part for line in tile.lines for part in textwrap.wrap(line, wide + 2)[:4]]


def save_png(pixels: Array, path: Path, story: dict[str, Any]) -> None:
    """A picture at its own size, its story in the PNG's text (`unigrpo`) and in a .json file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = to_json(story, indent=1)
    info = PngInfo()
    info.add_itxt("unigrpo", text)
    Image.fromarray(np.asarray(pixels)).save(path, pnginfo=info)
    path.with_suffix(".json").write_text(text + "\n")


def in_terminal(pixels: Array, columns: int = 48) -> Text:
    """A picture in half blocks, two pixels a character."""
    image = Image.fromarray(np.asarray(pixels))
    if image.width != columns:
        rows = max(2, round(image.height * columns / image.width))
        image = image.resize((columns, rows), Image.Resampling.LANCZOS)
    grid = np.asarray(image)
    grid = grid[: len(grid) // 2 * 2]
    text = Text()
    for upper, lower in zip(grid[::2], grid[1::2], strict=True):
        for a, b in zip(upper, lower, strict=True):
            above, below = (f"rgb({p[0]},{p[1]},{p[2]})" for p in (a, b))
            text.append("▀", style=f"{above} on {below}")
        text.append("\n")
    return text
