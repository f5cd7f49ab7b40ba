"""What the headers of a model directory say, for `unigrpo inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from math import prod
from typing import Any

from unigrpo_cli.models.family import Audit
from unigrpo_cli.models.mot.bagel import Release

PARTS = (
    ("text expert", ("language_model.",)),
    ("image expert", ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")),
    ("vision tower", ("vit_model.", "connector.", "vit_pos_embed.")),
)
KINDS = {
    "BAGEL": "BAGEL's layout: paints in the latents of an autoencoder",
    "pixels": "BAGEL's layout without an autoencoder: paints pixels",
}


def audit(release: Release, sizes: Any) -> Audit:
    config = release.config
    stored = [*release.tensors.values(), *release.autoencoder_tensors.values()]
    parts = {
        name: sum(prod(t.shape) for key, t in release.tensors.items() if part_of(key) == name) for name, _ in PARTS
    }
    parts["autoencoder"] = sum(prod(t.shape) for t in release.autoencoder_tensors.values())
    facts: dict[str, Any] = {
        "directory": str(release.directory),
        "kind": release.kind,
        "loadable": not release.problems,
        "problems": list(release.problems),
        "notes": list(release.notes),
        "sizes": asdict(config),
        "autoencoder": None if release.autoencoder is None else asdict(release.autoencoder),
        "tensors": len(stored),
        "parameters": {name: count for name, count in parts.items() if count},
        "dtypes": dict(Counter(t.dtype for t in stored)),
        "files": {path.name: path.stat().st_size for path in sorted({t.path for t in stored})},
    }
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    lines = [
        KINDS[release.kind],
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads "
        f"({config.num_key_value_heads} for keys and values), vocabulary {config.vocab_size}, images up to "
        f"{config.largest_side} px" + ("" if config.vision is None else ", can be shown pictures"),
        *(f"  {name:14} {count / 1e6:10,.1f} M parameters" for name, count in facts["parameters"].items()),
        *(f"  {name:24} {size / 2**30:8.2f} GiB" for name, size in facts["files"].items()),
        f"{facts['tensors']} tensors: {dtypes}",
        *(f"note: {note}" for note in release.notes),
        *(f"problem: {problem}" for problem in release.problems),
    ]
    return Audit(facts, lines, release.problems, sizes)


def part_of(name: str) -> str:
    if "_moe_gen" in name:
        return "image expert"
    return next((part for part, prefixes in PARTS if name.startswith(prefixes)), "unknown")
