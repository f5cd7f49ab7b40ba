"""Files that are whole or not there, whatever moment a process, a machine or a disk chooses to stop at.

A file is written under a temporary name in the same directory, forced to the disk and renamed; a directory
likewise, with a list of sums over its files as its last one. Everything temporary ends in `.partial`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from unigrpo_cli.errors import DiskError, UsageError, WeightsError

PARTIAL = ".partial"
REPLACED = "replaced_"
SUMS = "SHA256SUMS"
LOCK = ".lock"
_CHUNK = 2**22


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Around whatever writes `path`.

    Raises:
        DiskError: naming it and what the system says, e.g. that no space is left.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiskError(f"{path} cannot be written ({reason}); free space or mend that") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; on leaving it becomes `path`, on an exception it goes.

    Raises:
        DiskError: when the disk does not take it; what was there before is still there then.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with on_disk(path):
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Put a text in the place of a file, or leave the file as it was.

    Raises:
        DiskError: when the disk does not take it.
    """
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_directory(path: Path, *, sums: bool) -> Iterator[Path]:
    """A temporary directory to write to; on leaving it becomes `path`, on an exception it goes.

    A directory that has the name already is moved aside first: at no moment is there neither of the two.

    Args:
        sums: write `SHA256SUMS` over its files as the last of them.

    Raises:
        DiskError: when the disk does not take it.
    """
    partial = path.with_name(path.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    try:
        with on_disk(path):
            partial.mkdir(parents=True)
            yield partial
            for file in sorted(partial.iterdir()):
                sync(file)
            if sums:
                write_text(partial / SUMS, _sums_of(partial))
            sync(partial)
            aside = path.with_name(REPLACED + path.name)
            if path.exists():
                path.rename(aside)
            partial.rename(path)
            sync(path.parent)
            if aside.exists():
                shutil.rmtree(aside)
    except WeightsError:  # tells what in it is worth keeping
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half of it helps nobody, and its space may
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, by one write: all of it or nothing.

    Raises:
        DiskError: when the disk does not take it; the file is as it was then.
    """
    data = (line + "\n").encode()
    with on_disk(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(file).st_size
            try:
                done = os.write(file, data)
                if done < len(data):  # a full disk takes what it can; the rest of it says why
                    os.write(file, data[done:])
            except OSError:
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def point(link: Path, name: str) -> None:
    """Make `link` a relative symlink to `name` beside it, in one move.

    Raises:
        DiskError: when the file system takes no links.
    """
    if link.is_symlink() and os.readlink(link) == name:
        return
    partial = link.with_name(link.name + PARTIAL)
    with on_disk(link):
        partial.unlink(missing_ok=True)
        partial.symlink_to(name)
        partial.replace(link)
        sync(link.parent)


def sweep(directory: Path) -> list[Path]:
    """Remove what killed writes left directly in a directory; says what it was.

    A directory that was moved aside for a new one that never came gets its name back.
    """
    found = []
    for path in sorted(directory.glob(REPLACED + "*")):
        own = path.with_name(path.name.removeprefix(REPLACED))
        if own.exists():
            shutil.rmtree(path)
            found.append(path)
        else:
            path.rename(own)
    for path in sorted(directory.glob("*" + PARTIAL)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        found.append(path)
    return found


def quarantine(path: Path, why: str) -> Path:
    """Rename a directory to `<why>_<name>`, numbered where there is one; gives the new path."""
    aside, k = path.with_name(f"{why}_{path.name}"), 2
    while aside.exists():
        aside, k = path.with_name(f"{why}_{path.name}.{k}"), k + 1
    path.rename(aside)
    return aside


def damage(directory: Path) -> str | None:
    """What is wrong with a directory by its sums: the file and how, or None. Reads every byte of it."""
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return f"{SUMS} is missing or unreadable: it was not written to the end"
    if not lines:
        return f"{SUMS} is empty"
    for line in lines:
        digest, found, name = line.partition("  ")
        if not found or Path(name).name != name:
            return f"{SUMS} has a line that is no sum"
        try:
            own = digest_of(directory / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if own != digest:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sums_of(directory: Path) -> str:
    """As `sha256sum -c` reads it."""
    return "".join(f"{digest_of(path)}  {path.name}\n" for path in sorted(directory.iterdir()))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run's directory for this process. The lock ends with the process, however that ends.

    Raises:
        UsageError: when another process holds it.
    """
    with on_disk(directory / LOCK):
        file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{directory} is being written by another process; wait for it or stop it, or give another --out"
            ) from None
        except OSError as error:
            raise DiskError(
                f"{directory / LOCK} cannot be locked ({error.strerror or error}); write to a file system that has "
                "locks"
            ) from error
        yield
    finally:
        os.close(file)
