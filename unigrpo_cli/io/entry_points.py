"""Installed entry points of a group, ours alone where the environment says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint, EntryPoints

OURS = "unigrpo-cli"
NO_AUTOLOAD = "UNIGRPO_DISABLE_PLUGIN_AUTOLOAD"


def entry_points(group: str) -> EntryPoints:
    """Entry points of a group, of every installed package."""
    return _found(group, tuple((os.path.abspath(path), _changed(path)) for path in sys.path))


def _changed(path: str) -> int:
    """When something was last installed there, in nanoseconds; 0 where nothing is."""
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


@cache
def _found(group: str, state: tuple[tuple[str, int], ...]) -> EntryPoints:
    """Read once for each state of the import path: a file of every installed package."""
    return metadata.entry_points(group=group)


def only_ours() -> bool:
    """Whether other distributions' entry points are left out."""
    return os.environ.get(NO_AUTOLOAD, "") not in ("", "0")


def distribution(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that an entry point comes from."""
    return ("unknown", "-") if point.dist is None else _name_and_version(point.dist)


@cache
def _name_and_version(found: Distribution) -> tuple[str, str]:
    """Read once: each look at a distribution's name or version parses its metadata anew."""
    return found.name, found.version


def installed(group: str) -> Iterator[EntryPoint]:
    """Entry points of a group, not imported yet."""
    for point in entry_points(group=group):
        if not only_ours() or distribution(point)[0] == OURS:
            yield point
