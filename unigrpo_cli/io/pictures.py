"""Images: one reader for files from outside, PNG files with their record, captioned sheets, terminal previews."""

from __future__ import annotations

import struct
import textwrap
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from rich.text import Text

from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.json import to_json
from unigrpo_cli.io.limits import parse_json, refuse_special

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MOST_PIXELS = 64 * 2**20
RECORD = "unigrpo"
"""The text chunk of a PNG that holds the record of how it was made."""

TILE = 192  # pixels per side of a picture on a sheet
MARGIN, LINE, FONT = 10, 15, 12
PAPER, INK, SOFT = (252, 252, 250), (30, 30, 34), (110, 110, 118)

Array = NDArray[np.uint8]


def read_picture(path: str | Path) -> Array:
    """An image file as RGB [H, W, 3], the same for every command: rotated as EXIF says, transparency on white."""
    return read_picture_and_record(path)[0]


def read_picture_and_record(path: str | Path) -> tuple[Array, dict[str, Any]]:
    """As `read_picture`, with the record that `save_png` left in the file, or {}."""
    try:
        image = _open(path)
        text = str(getattr(image, "text", {}).get(RECORD, "{}"))
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UsageError(f"no picture {path}: give a file") from error
    except ValueError as error:
        raise UsageError(f"{path} is not readable as a picture: {error}") from error
    try:
        record = parse_json(text)
    except ValueError:
        record = {}
    return pixels, record if isinstance(record, dict) else {}


def refuse_odd_picture(path: str | Path) -> None:
    """Refuse by its header what `read_picture` would refuse; its pixels are not read."""
    try:
        _open(path, pixels=False)
    except ValueError as error:
        raise UsageError(f"{path} is not readable as a picture: {error}") from error


class _RefusedError(ValueError):
    """A complete image that is not accepted."""


def _open(path: str | Path, pixels: bool = True) -> Image.Image:
    """A decoded image file; without `pixels` its header.

    Only formats that are data: others (PostScript) would start a program.
    """
    try:
        refuse_special(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(path, formats=FORMATS) as image:
                _refuse(image)
                if pixels:
                    image.load()
                return image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:  # an OSError itself
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or damaged") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than {MOST_PIXELS:,} pixels; make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError) as error:
        if isinstance(error, _RefusedError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{reason}; give a complete {', '.join(FORMATS[:3])} file") from error


def _refuse(image: Image.Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise _RefusedError(
            f"{image.width} x {image.height} are more than {MOST_PIXELS:,} pixels, the limit; make it smaller"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise _RefusedError(f"its mode is {image.mode}, not 8 bits per channel; save it with 8 bits")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's, whose second picture is a preview
        raise _RefusedError(f"it holds {frames} pictures; give a file with one")


@dataclass(frozen=True)
class Tile:
    """One image of a sheet with its caption: a title, then smaller lines."""

    pixels: Array
    title: str
    lines: tuple[str, ...] = ()


def enlarge(pixels: Array, side: int) -> Image.Image:
    """Scale an image so that its longer side is about `side`: repeat whole pixels if small, resample if large."""
    image = Image.fromarray(np.asarray(pixels))
    longest = max(image.size)
    if longest * 2 <= side:
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def shrunk(pixels: Array, side: int) -> Array:
    """Pixels whose longer side is at most `side`, by averages over areas; a smaller image as it is."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def cropped(pixels: Array, height: int, width: int) -> Array:
    """The middle of an image at that size, bicubic, its shape kept; an image of that size as it is."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.array(ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.BICUBIC))


def sheet(rows: Sequence[Sequence[Tile]], heading: str = "") -> Image.Image:
    """A page of captioned images."""
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


def save_png(pixels: Array, path: Path, record: dict[str, Any]) -> None:
    """Write an image at its own size, its record in the PNG's text and in a .json file of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = to_json(record, indent=1)
    info = PngInfo()
    info.add_itxt(RECORD, text)
    Image.fromarray(np.asarray(pixels)).save(path, pnginfo=info)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def in_terminal(pixels: Array, columns: int = 48) -> Text:
    """An image in half blocks, two pixels per character."""
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
