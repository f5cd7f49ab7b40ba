"""The working directory while plugin code runs.

A process has one working directory. Paths that a user typed are relative to the one at start, so a plugin that changes
it keeps its own for its later calls, and everybody else keeps theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class WorkingDirectory:
    """The working directory of one plugin."""

    def __init__(self) -> None:
        self._own: str | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run plugin code in its directory, and return to the directory of the process."""
        before = _current()
        if self._own is not None:
            with suppress(OSError):
                os.chdir(self._own)
        try:
            yield
        finally:
            after = _current()
            if before is not None and after != before:
                self._own = after
                os.chdir(before)


def _current() -> str | None:
    """None when the directory was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None
