"""The family of mixtures of transformers in BAGEL's layout. Imports no torch until a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_cli.models.base_options import BaseOptions
from unigrpo_cli.models.family import Audit
from unigrpo_cli.models.mot.audit import audit
from unigrpo_cli.models.mot.bagel import HUB_FILES, read_release, reject, tokenizer_problems
from unigrpo_cli.models.mot.config import BAGEL_AUTOENCODER, BAGEL_NETWORK, AutoencoderConfig, MoTConfig

if TYPE_CHECKING:
    import torch

    from unigrpo_cli.models.mot.policy import MoTPolicy

USUAL_SIDE = 1024
"""Pixels of an image's sides in the paper; a smaller model paints the largest that it can."""


@dataclass(frozen=True)
class MoTSizes:
    network: MoTConfig
    autoencoder: AutoencoderConfig | None


class MoTFamily:
    """BAGEL, models trained from it, and the embedded model."""

    name = "mot"
    hub_files = HUB_FILES
    Options = BaseOptions

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
        options: BaseOptions | None = None,
    ) -> MoTPolicy:
        from unigrpo_cli.models.mot.checkpoint import load_model

        kind = (options or BaseOptions()).quantize
        policy = load_model(
            directory, weights_file, device=device, dtype=dtype, vae_tile_rows=vae_tile_rows, quantize=kind
        )
        policy.network.requires_grad_(False)
        return policy

    def audit(self, directory: Path, weights_file: str | None) -> Audit:
        release = read_release(directory, weights_file)
        release = replace(release, problems=(*release.problems, *tokenizer_problems(release)))
        return audit(release, MoTSizes(release.config, release.autoencoder))

    def digest(self, directory: Path, weights_file: str | None) -> str:
        return read_release(directory, weights_file).digest()

    def sizes(self, directory: Path, weights_file: str | None, options: BaseOptions | None = None) -> MoTSizes:
        release = read_release(directory, weights_file).refuse_problems()
        return MoTSizes(release.config, release.autoencoder)

    def published(self, model: str) -> MoTSizes | None:
        """BAGEL's own sizes for a hub id that names it: models trained from it have the same."""
        return MoTSizes(BAGEL_NETWORK, BAGEL_AUTOENCODER) if "bagel" in model.lower() else None

    def defaults(self, sizes: MoTSizes | None) -> dict[str, Any]:
        sizes = sizes or MoTSizes(BAGEL_NETWORK, BAGEL_AUTOENCODER)
        if sizes.autoencoder is None:
            return {}
        side = min(sizes.network.largest_side, USUAL_SIDE)
        return {"preset": "paper", "dtype": "bfloat16", "sampling": {"height": side, "width": side}}
