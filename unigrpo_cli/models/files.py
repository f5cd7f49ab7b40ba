"""Files of a model directory that cannot be what their names say."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from unigrpo_cli.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".json", ".txt", ".safetensors", ".bin", ".model")
POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024
KINDS = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"))


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
