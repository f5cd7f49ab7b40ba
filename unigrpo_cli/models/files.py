"""Files of a model directory, read without its weights. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError, safe_open

from unigrpo_cli.errors import WeightsError
from unigrpo_cli.io.limits import parse_json, read_ends, read_text
from unigrpo_cli.models.hub import first_line

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".json", ".txt", ".safetensors", ".bin", ".model")
POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024
KINDS = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"))


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes `begin` to `end` of a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Described:
    """What a model directory holds, by its configurations and headers; `problems` are one line each."""

    directory: Path
    problems: tuple[str, ...]

    @property
    def parts(self) -> dict[str, dict[str, Stored]]:
        """The tensors of each network, by its name."""
        raise NotImplementedError

    def refuse_problems(self) -> Self:
        """Itself, when nothing is wrong.

        Raises:
            WeightsError: naming the first problem and how many there are.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more: unigrpo inspect)" if len(self.problems) > 1 else ""
            raise WeightsError(f"{self.directory}: {self.problems[0]}{more}")
        return self

    def digest(self) -> str:
        """sha256 over name, dtype, shape and both ends of every tensor: identifies weights without reading them."""
        digest = hashlib.sha256()
        for part, tensors in self.parts.items():
            for name, t in sorted(tensors.items()):
                digest.update(f"{part} {name} {t.dtype} {list(t.shape)}\n".encode())
                try:
                    digest.update(read_ends(t.path, t.begin, t.end))
                except OSError as error:
                    raise WeightsError(f"{t.path} cannot be read ({error.strerror or error})") from error
        return digest.hexdigest()


def read_header(path: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file, from its header alone, which safetensors finds whole."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        return {
            name: Stored(path, entry["dtype"], tuple(entry["shape"]), *(start + x for x in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error})") from error
    except (SafetensorError, ValueError, TypeError, KeyError, struct.error) as error:
        raise WeightsError(f"{path}: damaged or truncated; fetch or save it again ({what(error)})") from error


def read_object(path: Path, repaired: Callable[[str], str] = str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        WeightsError: when it is missing or damaged.
    """
    try:
        found = parse_json(repaired(read_text(path)))
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object is needed, it holds a {type(found).__name__}")
        return found
    except FileNotFoundError as error:
        raise WeightsError(f"{path.parent} is not a complete model: {path.name} is missing; fetch it again") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({first_line(error)}); fetch or save it again") from error


def what(error: Exception) -> str:
    """A failure in one line."""
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())


def refuse_odd_files(directory: Path) -> None:
    """Refuse a directory with git-lfs pointers in place of files, or with files that have no end."""
    try:
        entries = [path for pattern in ("*", "*/*") for path in directory.glob(pattern)]
    except OSError as error:
        raise WeightsError(f"{directory} cannot be read ({error.strerror or error})") from error
    for path in sorted(path for path in entries if path.suffix in SUFFIXES):
        try:
            found = path.stat()
        except OSError:
            continue  # a broken link: reading it says so
        kind = next((name for is_kind, name in KINDS if is_kind(found.st_mode)), None)
        if kind is not None:
            raise WeightsError(f"{path} is {kind}, not a file; put the model's own file there")
        if stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST_POINTER and _is_pointer(path):
            raise WeightsError(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in that repository, or fetch "
                "the model with `hf download ORG/NAME`"
            )


def refuse_non_finite(tensor: Tensor, name: str, directory: Path) -> None:
    """Refuse weights with NaN or infinity: they would give scores without an error."""
    if not tensor.isfinite().all():
        raise WeightsError(f"{directory}: {name} holds NaN or infinity; fetch or save the model again")


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False
