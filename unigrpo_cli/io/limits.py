"""Files and text from outside, read within limits: size, nesting, and text that can be written again.

Functions raise ValueError or OSError, and the caller adds the file's name and the remedy.
"""

from __future__ import annotations

import codecs
import json
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from unigrpo_cli.errors import UsageError

LARGEST_TEXT = 256 * 2**20
LARGEST_LINE = 2**20
LONGEST_PROMPT = 20_000
DEEPEST = 100
"""Levels of nested lists and objects: far beyond any use, far below Python's recursion limit."""
ENDS = 4096
"""Bytes at each end of a file or tensor that a quick digest covers."""
BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Characters that Unicode counts as letters or symbols and that show nothing."""


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """A UTF-8 text file, with or without a byte-order mark.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is larger than `largest` bytes or not UTF-8.
    """
    with open_plain(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest:,} bytes, the limit")
    return decoded(content)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of a file's lines that are not blank, without byte-order marks and invisible characters around.

    Only a newline (or CR and newline) ends a line: JSON strings may hold U+2028. Files that were concatenated have a
    byte-order mark in the middle.

    Raises:
        OSError: when the file cannot be read.
        UsageError: naming the line, when it is not text or too long.
    """
    with open_plain(path) as file:
        number = 0
        while line := file.readline(LARGEST_LINE + 1):
            number += 1
            if len(line) > LARGEST_LINE:
                raise UsageError(f"{path}:{number}: the line is too long; at most {LARGEST_LINE:,} bytes are read")
            try:
                text = trimmed(decoded(line))
            except ValueError as error:
                raise UsageError(f"{path}:{number}: {error}") from error
            if "\r" in text:
                raise UsageError(
                    f"{path}:{number}: it holds a carriage return that ends no line; save the file with newlines (LF)"
                )
            if text:
                yield number, text


def open_plain(path: Path) -> Any:
    """A regular file opened for bytes.

    Raises:
        OSError: also for a pipe or a device, which may never end, and for a name that the system does not take.
    """
    refuse_special(path)
    return path.open("rb")


def refuse_special(path: str | Path) -> None:
    """Raise OSError for a pipe, socket or device, before it is opened: opening a pipe may wait for ever."""
    try:
        mode = Path(path).stat().st_mode
    except ValueError as error:  # a NUL character
        raise OSError(None, str(error), str(path)) from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(None, "it is not a regular file but a pipe or device; save the content to a file", str(path))


def read_ends(path: Path, begin: int, end: int) -> bytes:
    """The first and the last ENDS bytes of a stretch of a file; all of one shorter than both.

    Raises:
        OSError: when the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(begin)
        if end - begin <= 2 * ENDS:
            return file.read(end - begin)
        first = file.read(ENDS)
        file.seek(end - ENDS)
        return first + file.read(ENDS)


def decoded(content: bytes) -> str:
    """Bytes as text, without a byte-order mark in front.

    Raises:
        ValueError: when they are not UTF-8.
    """
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not readable text: byte {error.start} is not UTF-8; save it as UTF-8") from error


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, in one line; of a schema's findings the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_input=False)[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def trimmed(text: str) -> str:
    """A text without white space and invisible characters at both ends."""
    start, end = 0, len(text)
    while start < end and is_invisible(text[start]):
        start += 1
    while end > start and is_invisible(text[end - 1]):
        end -= 1
    return text[start:end]


def is_invisible(character: str) -> bool:
    """Whether a character shows nothing: white space, format characters, and letters that are blank. Not NUL."""
    if character.isspace() or character in BLANK_LETTERS:
        return True
    return unicodedata.category(character) == "Cf"


def refuse_odd_prompt(text: str) -> None:
    """Raise ValueError for a prompt that is empty, too long, or cannot be written to a file again."""
    if not trimmed(text):
        raise ValueError("an empty prompt; write what to paint")
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"a prompt of {len(text):,} characters; at most {LONGEST_PROMPT:,} are accepted")
    refuse_odd_text(text)


def parse_json(text: str) -> Any:
    """Standard JSON: no NaN, and at most DEEPEST levels.

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
    raise ValueError(f"{name} is not JSON; write null or a number")


def refuse_depth(value: Any) -> None:
    """Raise ValueError when lists and tables are nested more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST):
        inside = [v for v in level if isinstance(v, list | dict)]
        if not inside:
            return
        level = [w for v in inside for w in (v.values() if isinstance(v, dict) else v)]
    raise ValueError(f"nested too deep, more than {DEEPEST} levels")


def refuse_odd_text(value: Any) -> None:
    """Raise ValueError when a text, anywhere in lists and tables, cannot be written to a file again."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("it holds a NUL character; remove it")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("it holds an unpaired surrogate, which UTF-8 cannot encode; remove it") from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            refuse_odd_text(key)
            refuse_odd_text(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_odd_text(inner)
