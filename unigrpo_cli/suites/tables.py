"""Tables of prompts: comma- or tab-separated files, Parquet files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unigrpo_cli.errors import UsageError, suggest
from unigrpo_cli.io.limits import parse_json, read_text

Row = dict[str, Any]
HUB = "hf:"
PROMPT_COLUMNS = ("prompt", "text", "caption")
MOST_ROWS = 1_000_000
_ADDRESS = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<split>[^:\[]+(?:\[[^\]]*\])?))?(?::(?P<column>.+))?")


def read_text_table(path: Path, separator: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a table, by the names in its first line.

    A comma-separated table has quoting, also over lines; a tab-separated one has none.
    """
    try:
        text = read_text(path)
        lines = _tab_separated(text) if separator == "\t" else _comma_separated(text)
        _, header = next(lines, (1, []))
        for number, cells in lines:
            if len(cells) > len(header):
                raise ValueError(f"line {number} has {len(cells)} cells for {len(header)} columns")
            yield number, dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))
    except OSError as error:
        raise UsageError(f"{path} is not readable text ({error.strerror}); give a table") from error
    except (csv.Error, ValueError) as error:
        raise UsageError(f"{path} is not a table ({error}); correct it or give another file") from error


def _tab_separated(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r").split("\t")


def _comma_separated(text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 1
    for cells in reader:
        if cells:
            yield number, cells
        number = reader.line_num + 1


def read_prompt_table(source: str) -> list[tuple[str, Row]]:
    """Places and rows of a .csv, .tsv or .parquet file or of `hf:ORG/NAME[:split[:column]]`, with a `prompt` each.

    The other columns stay as metadata; those that are not plain data (images) are dropped.
    """
    if source.startswith(HUB):
        match = _ADDRESS.fullmatch(source)
        if match is None:
            raise UsageError(f"prompts {source}: write it as hf:ORG/NAME[:split[:column]]")
        rows = _load_dataset(source, match["name"], split=match["split"] or "train")
        return _with_prompts(source, enumerate(rows, 1), match["column"])
    path = Path(source)
    if path.suffix == ".parquet":
        rows = _load_dataset(source, "parquet", data_files=str(path), split="train")
        return _with_prompts(source, enumerate(rows, 1))
    return _with_prompts(source, read_text_table(path, "\t" if path.suffix == ".tsv" else ","))


def _load_dataset(source: str, name: str, **arguments: Any) -> Iterable[Row]:
    """Rows of a data set, without the columns that would be decoded as images or sound."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f'prompts {source} need the package datasets: pip install "unigrpo-cli[datasets]"') from error
    try:
        loaded = datasets.load_dataset(name, **arguments)
    except Exception as error:  # of many libraries: names, networks, formats
        raise UsageError(f"prompts {source} cannot be loaded ({type(error).__name__}: {error})") from error
    if len(loaded) > MOST_ROWS:
        raise UsageError(f"prompts {source} has {len(loaded):,} rows; take a part, e.g. hf:ORG/NAME:train[:10000]")
    media = [key for key, kind in loaded.features.items() if type(kind).__name__ in ("Image", "Audio", "Video")]
    return loaded.remove_columns(media)


def _with_prompts(source: str, rows: Iterable[tuple[int, Row]], column: str | None = None) -> list[tuple[str, Row]]:
    found = []
    for number, row in rows:
        key = _prompt_column(source, row, column)
        metadata = {name: value for name, value in row.items() if name != key and _is_plain(value)}
        for name in {"include", "exclude"} & metadata.keys():
            if isinstance(metadata[name], str):  # GenEval's clauses, in a table that holds text only
                try:
                    metadata[name] = parse_json(metadata[name])
                except ValueError as error:
                    raise UsageError(f"{source}:{number}: {name}: {error}") from error
        if not metadata.get("image", True):
            del metadata["image"]
        found.append((f"{source}:{number}", {"prompt": row[key]} | metadata))
    return found


def _prompt_column(source: str, row: Row, column: str | None) -> str:
    if column is not None and column in row:
        return column
    if column is not None:
        raise UsageError(f"prompts {source}: no column {column!r}; {suggest(column, row)}")
    for wanted in PROMPT_COLUMNS:
        for name in row:
            if name.strip().lower() == wanted:
                return name
    raise UsageError(
        f"prompts {source}: no column {', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]}; it has {', '.join(row)}"
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
