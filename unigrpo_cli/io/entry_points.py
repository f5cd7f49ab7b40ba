"""Installed entry points of a group, ours alone where the environment says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

OURS = "unigrpo-cli"
NO_AUTOLOAD = "UNIGRPO_DISABLE_PLUGIN_AUTOLOAD"


def only_ours() -> bool:
    """Whether other distributions' entry points are left out."""
    return os.environ.get(NO_AUTOLOAD, "") not in ("", "0")


def distribution(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that an entry point comes from."""
    return (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "-")


def installed(group: str) -> Iterator[EntryPoint]:
    """Entry points of a group, not imported yet."""
    for point in entry_points(group=group):
        if not only_ours() or distribution(point)[0] == OURS:
            yield point
