"""Shell completion of rewards, settings and presets. Nothing here may print or fail."""

from __future__ import annotations

from unigrpo_cli.io.entry_points import entry_points


def rewards(incomplete: str) -> list[str]:
    """Names of installed rewards for the last part of a comma-separated list."""
    before, comma, last = incomplete.rpartition(",")
    names = sorted({entry.name for entry in entry_points(group="unigrpo.rewards")})
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]


def settings(incomplete: str) -> list[str]:
    """Keys for `--set`, with the equals sign."""
    from unigrpo_cli.config import config_keys

    return [f"{key}=" for key in config_keys() if key.startswith(incomplete)]


def presets(incomplete: str) -> list[str]:
    from unigrpo_cli.config import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]
