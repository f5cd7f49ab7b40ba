"""Files and text from outside, read within limits: how long, how deep, and whether it can be written again.

All raise ValueError or OSError; who calls knows the file's name and the remedy.
"""

from __future__ import annotations

import codecs
import json
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_TEXT = 256 * 2**20
LARGEST_LINE = 2**20
MOST_PIXELS = 64 * 2**20
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
DEEPEST = 100
"""Levels of lists and objects in each other: far beyond any use, and far below where recursion ends."""


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """A text file in UTF-8, with or without a mark in front. Never more than `largest` bytes: a device has no end.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is longer or of another encoding.
    """
    with open_plain(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest:,} bytes, the limit")
    return decoded(content)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and lines of a text file, lines without their ends.

    Only a newline ends one, for JSON strings may hold U+2028.

    Raises:
        OSError, ValueError: as `read_text`; the latter names the line.
    """
    with open_plain(path) as file:
        number = 0
        while line := file.readline(LARGEST_LINE + 1):
            number += 1
            if len(line) > LARGEST_LINE:
                raise LineError(number, f"the line is too long; at most {LARGEST_LINE:,} bytes are taken")
            try:
                yield number, decoded(line, first=number == 1).rstrip("\n")
            except ValueError as error:
                raise LineError(number, str(error)) from error


class LineError(ValueError):
    """What is wrong with a line; `number` counts from 1."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.number = number


def open_plain(path: Path) -> Any:
    """A file opened for bytes. A name that no system takes is an OSError, too."""
    try:
        return path.open("rb")
    except ValueError as error:  # a NUL character
        raise OSError(None, str(error), str(path)) from error


def decoded(content: bytes, first: bool = True) -> str:
    """Bytes as text.

    Raises:
        ValueError: when they are not UTF-8.
    """
    try:
        return content.removeprefix(codecs.BOM_UTF8 if first else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not readable text: byte {error.start} is not UTF-8; save it as UTF-8") from error


def open_image(path: str | Path) -> Image:
    """A picture file, decoded. Only formats that are data: others (PostScript) would start a program.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it cannot be read as one picture of 8 bits a channel, or is too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=PICTURES) as image:
                _refuse_picture(image)
                image.load()
                return image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:  # an OSError itself
        raise ValueError(f"it is none of {', '.join(PICTURES)}, or damaged") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than {MOST_PIXELS:,} pixels; make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError) as error:
        if isinstance(error, RefusedPictureError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{reason}; give a {', '.join(PICTURES[:3])} file that is whole") from error


class RefusedPictureError(ValueError):
    """A picture that is whole and of no use here."""


def _refuse_picture(image: Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise RefusedPictureError(
            f"{image.width} x {image.height} are more than {MOST_PIXELS:,} pixels, the limit; make it smaller"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise RefusedPictureError(f"its colours are {image.mode}, not 8 bits a channel; save it with 8 bits")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's, whose second picture is a preview
        raise RefusedPictureError(f"it holds {frames} pictures; give a file with one")


def parse_json(text: str) -> Any:
    """JSON as the standard has it: no NaN, and no deeper than anybody writes by hand.

    Raises:
        ValueError: saying what is wrong.
    """
    try:
        found = json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError(f"nested too deep, more than {DEEPEST} levels") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    refuse_depth(found)
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; write null, or a number")


def refuse_depth(value: Any) -> None:
    """Raise ValueError when lists and tables lie in each other more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST):
        inside = [v for v in level if isinstance(v, list | dict)]
        if not inside:
            return
        level = [w for v in inside for w in (v.values() if isinstance(v, dict) else v)]
    raise ValueError(f"nested too deep, more than {DEEPEST} levels")


def refuse_odd_text(value: Any) -> None:
    """Raise ValueError when a text, anywhere in lists and tables, could not be written to a file again."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("it holds a NUL character; take it out")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("it holds half a surrogate pair, which is no text in UTF-8; take it out") from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            refuse_odd_text(key)
            refuse_odd_text(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_odd_text(inner)
