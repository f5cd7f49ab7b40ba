"""The real stdout, kept for results while plugins and libraries print to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

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
            stream = os.fdopen(kept, "w", encoding=stream.encoding, errors=stream.errors, closefd=False)
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
