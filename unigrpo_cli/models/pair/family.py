"""The family of pairs: a diffusers pipeline whose text encoder is a causal LM. Imports no torch until one is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_cli.models.family import Audit
from unigrpo_cli.models.pair.facts import INDEX
from unigrpo_cli.models.pair.options import PairOptions
from unigrpo_cli.models.pair.pipeline import Pipeline, read_pipeline, reject
from unigrpo_cli.models.pair.sizes import PUBLISHED, PairSizes, sizes_of

if TYPE_CHECKING:
    import torch

    from unigrpo_cli.models.pair.policy import PairPolicy

SIDE = 1024
"""Pixels of an image's sides, as the pipelines have them by default."""


class PairFamily:
    """A causal LM and a painter of diffusers: Z-Image, FLUX.2-klein."""

    name = "pair"
    hub_files = (INDEX, "*/*.json", "*/*.safetensors", "*/merges.txt")
    Options = PairOptions

    def reject(self, directory: Path) -> str | None:
        return reject(directory)

    def load(
        self,
        directory: Path,
        weights_file: str | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vae_tile_rows: int,
        options: PairOptions | None = None,
    ) -> PairPolicy:
        from unigrpo_cli.models.pair.checkpoint import load_pair

        return load_pair(directory, options or PairOptions(), device, dtype, vae_tile_rows)

    def audit(self, directory: Path, weights_file: str | None) -> Audit:
        pipeline = read_pipeline(directory)
        return Audit(
            _facts(pipeline), _lines(pipeline), pipeline.problems, None if pipeline.problems else sizes_of(pipeline)
        )

    def digest(self, directory: Path, weights_file: str | None) -> str:
        return read_pipeline(directory).digest()

    def sizes(self, directory: Path, weights_file: str | None, options: PairOptions | None = None) -> PairSizes:
        return sizes_of(read_pipeline(directory, options.reasoner if options else "").refuse_problems())

    def published(self, model: str) -> PairSizes | None:
        return next((sizes for name, sizes in PUBLISHED.items() if name in model.lower()), None)

    def defaults(self, sizes: Any) -> dict[str, Any]:
        sampling = {"height": SIDE, "width": SIDE, "shift": 0.0}
        return {"preset": "paper", "dtype": "bfloat16", "sampling": sampling}


def _facts(pipeline: Pipeline) -> dict[str, Any]:
    lm = pipeline.reasoner.config
    return {
        "kind": pipeline.facts.name,
        "reasoner": lm.get("model_type"),
        "distilled": pipeline.distilled,
        "parameters": {part: network.parameters for part, network in pipeline.networks.items()},
        "problems": list(pipeline.problems),
    }


def _lines(pipeline: Pipeline) -> list[str]:
    lm = pipeline.reasoner.config
    return [
        f"a pair: {lm.get('model_type')} with {lm.get('num_hidden_layers')} layers of width {lm.get('hidden_size')} "
        f"writes, {pipeline.facts.painter} paints",
        *(f"  {part:14} {n.parameters / 1e6:10,.1f} M parameters" for part, n in pipeline.networks.items()),
        *(f"problem: {problem}" for problem in pipeline.problems),
    ]
