"""The real stdout, kept for results while plugins and libraries print to stderr."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from errno import EPIPE
from typing import Any, TextIO

_kept: set[int] = set()
"""Copies of the real stdout that no child process may hold: its reader waits until the last copy is closed."""


@contextmanager
def stdout_to_stderr() -> Iterator[TextIO]:
    """Point descriptor 1 at stderr, for Python, C code and child processes; yields the real stdout."""
    stream = sys.stdout
    stream.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # started without stdout or stderr
        with redirect_stdout(sys.stderr):
            yield stream
        return
    _kept.add(kept)
    try:
        if _descriptor(stream) == 1:
            stream = forgiving(os.fdopen(kept, "w", encoding=stream.encoding, errors=stream.errors, closefd=False))
        with redirect_stdout(sys.stderr):
            yield stream
    finally:
        try:
            stream.flush()
        finally:
            os.dup2(kept, 1)
            _kept.discard(kept)
            os.close(kept)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _close_kept() -> None:
    for kept in _kept:
        os.close(kept)
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_kept)


class _Forgiving(io.FileIO):
    """A file descriptor that is replaced by the null device on its first write error."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if error.errno != EPIPE and self.fileno() == 1:  # a closed pipe is how `| head` ends
                print(f"warning: standard output: {error.strerror}; the command continues without it", file=sys.stderr)
            return len(data)


def keep_running_without_output() -> None:
    """A closed pipe (`| head`), a hung-up terminal or a full disk under a log no longer raises an error."""
    sys.stdout, sys.stderr = forgiving(sys.stdout), forgiving(sys.stderr)


def forgiving(stream: TextIO) -> TextIO:
    """The same stream, without errors when nothing can be written to it any more."""
    if not isinstance(stream, io.TextIOWrapper) or (os.name == "nt" and stream.isatty()):  # its console is no file
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.isatty(),
        write_through=stream.write_through,
    )
