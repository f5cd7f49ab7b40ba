"""`unigrpo inspect`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import WeightsError


@one_error_line
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="`embedded`, a model directory, a run or a hub id.")],
    weights_file: common.WeightsFile = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
) -> None:
    """Audit a model: what it is, what is missing, how much memory it needs. Loads no weights.

    Reads headers, and whole files only to verify the checksums of a run's checkpoint. A hub id that is not in the
    cache is fetched first. Exit 5 when the model cannot be loaded, with every reason.
    """
    from unigrpo_cli.models.family import MODELS
    from unigrpo_cli.run.console import Display
    from unigrpo_cli.run.memory import needs

    display = Display(json=json)
    common.load_plugins(plugin, plugins_dir, display)
    base, adapter = _base_and_adapter(model)
    if adapter is not None:
        display.say(f"{adapter} is an adapter of {base}, which is audited here")
    found = MODELS.find(base)
    audit = found.family.audit(found.directory, weights_file or found.weights_file)
    sizes = audit.sizes
    memory = {} if sizes is None else needs(sizes)
    if json:
        common.print_json(audit.facts | {"family": found.family.name, "memory_gib": memory})
    else:
        display.say(f"{found.directory}", style="bold")
        for line in audit.lines:
            display.say(line)
        if memory:
            display.say("memory in GiB, about: " + ", ".join(f"{name} {size:.1f}" for name, size in memory.items()))
    if audit.problems:
        raise WeightsError(f"{found.directory} cannot be loaded: {'; '.join(audit.problems)}")


def _base_and_adapter(model: str) -> tuple[str, str | None]:
    """A run's or a checkpoint's model and adapter, verified. A model directory needs no torch, which loads slowly."""
    directory = Path(model)
    if not (os.path.isdir(directory / "checkpoints") or os.path.isfile(directory / "state.json")):
        return model, None
    from unigrpo_cli.run.setup import find_checkpoint, refuse_changed

    base, adapter = find_checkpoint(model)
    for place in filter(None, (base, adapter)):
        refuse_changed(Path(place))
    return base, adapter
