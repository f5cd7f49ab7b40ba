"""Files that are complete or absent, whenever a process, a machine or a disk stops.

A file is written under a temporary name in the same directory, synced and renamed; a directory likewise, with a list
of checksums as its last file. Every temporary name ends in `.partial`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from unigrpo_cli.errors import DiskError, UsageError, WeightsError

PARTIAL = ".partial"
REPLACED = "replaced_"
SUMS = "SHA256SUMS"
LOCK = ".lock"
WINDOWS = os.name == "nt"
_CHUNK = 2**22
_held_locks: set[int] = set()


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn system errors while writing `path` into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiskError(f"{path} cannot be written ({reason}); free disk space or fix permissions") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to. On success it becomes `path`; on an exception it is removed."""
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
    """Replace the content of a file, or leave it unchanged."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def new_directory(path: Path, *, sums: bool, unsummed: Collection[str] = ()) -> Iterator[Path]:
    """A temporary directory to write to. On success it becomes `path`; on an exception it is removed.

    An existing directory of that name is renamed first, so at every moment one of the two is there.

    Args:
        sums: write `SHA256SUMS` of its files as the last one.
        unsummed: files that it leaves out, because they may be edited.
    """
    partial = path.with_name(path.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    try:
        with on_disk(path):
            partial.mkdir(parents=True)
            yield partial
            for folder in sorted(path for path in partial.rglob("*") if path.is_dir()):
                sync(folder)
            for name in files_in(partial):
                sync(partial / name)
            if sums:
                write_text(partial / SUMS, _sums_of(partial, unsummed))
            sync(partial)
            aside = path.with_name(REPLACED + path.name)
            if path.exists():
                path.rename(aside)
            partial.rename(path)
            sync(path.parent)
            if aside.exists():
                shutil.rmtree(aside)
    except WeightsError:  # says what in it is worth keeping
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a file in one write: all of it or nothing."""
    data = (line + "\n").encode()
    with on_disk(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            before = os.fstat(file).st_size
            try:
                done = os.write(file, data)
                if done < len(data):  # a full disk takes what fits; the second write raises the reason
                    os.write(file, data[done:])
            except OSError:
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk. Windows syncs no directories."""
    if WINDOWS and path.is_dir():
        return
    file = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def update_symlink(link: Path, name: str) -> None:
    """Make `link` a relative symlink to `name` beside it, atomically. Windows without the right to make links: none."""
    if link.is_symlink() and os.readlink(link) == name:
        return
    partial = link.with_name(link.name + PARTIAL)
    with on_disk(link):
        partial.unlink(missing_ok=True)
        try:
            partial.symlink_to(name, target_is_directory=True)
        except OSError:
            if WINDOWS:  # links are a convenience: nothing of ours reads them
                return
            raise
        partial.replace(link)
        sync(link.parent)


def remove_partial(directory: Path) -> list[Path]:
    """Remove what killed processes left directly in a directory, and return it.

    A directory that was renamed for a new one that never came gets its name back.
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
    """Rename a directory to `<why>_<name>`, with a number when that exists, and return the new path."""
    aside, k = path.with_name(f"{why}_{path.name}"), 2
    while aside.exists():
        aside, k = path.with_name(f"{why}_{path.name}.{k}"), k + 1
    path.rename(aside)
    return aside


def verify_checksums(directory: Path, skip: Collection[str] = ()) -> str | None:
    """The first file but those of `skip` that differs from `SHA256SUMS`, and how; None when all match."""
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return f"{SUMS} is missing or unreadable: the directory was not completed"
    if not lines:
        return f"{SUMS} is empty"
    for line in lines:
        digest, found, name = line.partition("  ")
        if not found or not is_inside(name):
            return f"{SUMS} has a line that is no checksum"
        if name in skip:
            continue
        try:
            own = digest_of(directory / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if own != digest:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def files_in(directory: Path) -> list[str]:
    """Files of a directory and its folders, by their relative names with `/`."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def is_inside(name: str) -> bool:
    """Whether a relative name, as `files_in` gives it, leads nowhere else."""
    path = PurePosixPath(name)
    return (
        "\0" not in name
        and "\\" not in name
        and path.as_posix() == name
        and ":" not in path.parts[0]
        and not (path.is_absolute() or ".." in path.parts)
    )


def _sums_of(directory: Path, unsummed: Collection[str]) -> str:
    """In the format of `sha256sum -c`."""
    names = [name for name in files_in(directory) if name not in unsummed]
    return "".join(f"{digest_of(directory / name)}  {name}\n" for name in names)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run's directory for this process. The lock ends with the process, however that ends."""
    with on_disk(directory / LOCK):
        file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):  # of fcntl, and of msvcrt
            raise UsageError(
                f"{directory} is being written by another process; wait for it or stop it, or give another --out"
            ) from None
        except OSError as error:
            raise DiskError(
                f"{directory / LOCK} cannot be locked ({error.strerror or error}); use a file system that has locks"
            ) from error
        _held_locks.add(file)
        yield
    finally:
        _held_locks.discard(file)
        os.close(file)


def _close_locks() -> None:
    for file in _held_locks:
        os.close(file)
    _held_locks.clear()


if hasattr(os, "register_at_fork"):  # a child that a reward leaves running must not hold the run's lock
    os.register_at_fork(after_in_child=_close_locks)


def _lock(file: int) -> None:
    """Lock an open file or raise at once."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
