"""`unigrpo inspect`."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import WeightsError

if TYPE_CHECKING:
    from unigrpo_cli.models.mot.bagel import Release

PARTS = (
    ("text expert", ("language_model.",)),
    ("image expert", ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")),
    ("vision tower", ("vit_model.", "connector.", "vit_pos_embed.")),
)


@one_error_line
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="`embedded`, a model directory or a hub id.")],
    weights_file: common.WeightsFile = None,
    json: common.Json = False,
) -> None:
    """Audit a model by its headers: what it is, what is missing, what it takes to use it. Reads no weights.

    (A hub id that is not in the cache yet is fetched first.)

    Exit 5 when it cannot be loaded, with every reason.
    """
    from dataclasses import replace

    from unigrpo_cli.models.hub import locate
    from unigrpo_cli.models.mot.bagel import read_release, tokenizer_problems
    from unigrpo_cli.run.console import Display

    directory, own_file = locate(model)
    release = read_release(directory, weights_file or own_file)
    release = replace(release, problems=(*release.problems, *tokenizer_problems(release)))
    facts = _facts(release)
    if json:
        common.print_json(facts)
    else:
        _show(Display(), facts)
    if release.problems:
        raise WeightsError(f"{directory} cannot be loaded: {'; '.join(release.problems)}")


def _facts(release: Release) -> dict[str, Any]:
    """What there is to say of a model, as JSON."""
    from dataclasses import asdict

    from unigrpo_cli.run.memory import needs

    stored = list(release.tensors.values())
    parts = {
        name: sum(prod(t.shape) for key, t in release.tensors.items() if part_of(key) == name) for name, _ in PARTS
    }
    parts["autoencoder"] = sum(prod(t.shape) for t in release.autoencoder_tensors.values())
    files = sorted({t.path for t in [*stored, *release.autoencoder_tensors.values()]})
    return {
        "directory": str(release.directory),
        "kind": release.kind,
        "loadable": not release.problems,
        "problems": list(release.problems),
        "notes": list(release.notes),
        "sizes": asdict(release.config),
        "autoencoder": None if release.autoencoder is None else asdict(release.autoencoder),
        "tensors": len(stored) + len(release.autoencoder_tensors),
        "parameters": {name: count for name, count in parts.items() if count},
        "dtypes": dict(Counter(t.dtype for t in [*stored, *release.autoencoder_tensors.values()])),
        "files": {path.name: path.stat().st_size for path in files},
        "memory_gib": needs(release.config, release.autoencoder),
    }


def part_of(name: str) -> str:
    """Which part of the model a tensor of the network belongs to."""
    if "_moe_gen" in name:
        return "image expert"
    return next((part for part, prefixes in PARTS if name.startswith(prefixes)), "unknown")


def _show(display: Any, facts: dict[str, Any]) -> None:
    sizes = facts["sizes"]
    largest = sizes["max_latent_size"] * sizes["latent_patch_size"] * sizes["pixels_per_latent"]
    kind = {
        "BAGEL": "BAGEL's layout: paints in the latents of an autoencoder",
        "pixels": "BAGEL's layout without an autoencoder: paints pixels",
    }[facts["kind"]]
    display.say(f"{facts['directory']}\n{kind}", style="bold")
    display.say(
        f"{sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}, {sizes['num_attention_heads']} "
        f"heads ({sizes['num_key_value_heads']} for keys and values), vocabulary {sizes['vocab_size']}, "
        f"images up to {largest} px" + ("" if sizes["vision"] is None else ", can be shown pictures")
    )
    for name, count in facts["parameters"].items():
        display.say(f"  {name:14} {count / 1e6:10,.1f} M parameters")
    for name, size in facts["files"].items():
        display.say(f"  {name:24} {size / 2**30:8.2f} GiB")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    display.say(f"{facts['tensors']} tensors: {dtypes}")
    for note in facts["notes"]:
        display.say(f"note: {note}")
    for problem in facts["problems"]:
        display.say(f"problem: {problem}")
    needed = ", ".join(f"{name} {size:.1f}" for name, size in facts["memory_gib"].items())
    display.say(f"memory in GiB, about: {needed}")
