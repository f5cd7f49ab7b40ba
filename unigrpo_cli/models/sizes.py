"""Sizes of a mixture-of-transformers, and the two JSON files of BAGEL's layout that hold them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PREDICTIONS = ("velocity", "clean")


@dataclass(frozen=True)
class MoTConfig:
    """Sizes and the few facts in which models of this form differ.

    Args:
        prediction: what the image head gives: "velocity" (BAGEL) or "clean", the data x_0, from which
            v = (x_t - x_0) / t. The second learns far faster at small sizes (docs/log.md).
        latent_patch_size, latent_channels: a token is a patch x patch square of latent pixels.
        pixels_per_latent: image pixels per latent pixel along a side (8 with an autoencoder, 1 without).
        max_latent_size: side of the table of latent positions, in tokens.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    latent_patch_size: int
    latent_channels: int
    pixels_per_latent: int
    max_latent_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    prediction: str = "velocity"

    def __post_init__(self) -> None:
        for name, kind in type(self).__annotations__.items():
            value = getattr(self, name)
            if kind == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"{name} = {value!r}: a whole number above 0 is needed")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {self.prediction!r}: accepted are {', '.join(PREDICTIONS)}")
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads) or heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, {heads} heads and {self.num_key_value_heads} key-value heads "
                "do not go into each other"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def token_dim(self) -> int:
        return self.latent_patch_size**2 * self.latent_channels

    @property
    def pixels_per_token(self) -> int:
        return self.latent_patch_size * self.pixels_per_latent


def read_config(directory: Path) -> MoTConfig:
    """Sizes of a model in BAGEL's layout: `llm_config.json` for the network, `config.json` for the image side.

    `config.json` may carry two fields of ours, `prediction` and `vae_config.z_channels`; BAGEL's has neither
    the first nor needs it.
    """
    llm = json.loads((directory / "llm_config.json").read_text())
    image = json.loads((directory / "config.json").read_text())
    return MoTConfig(
        **{
            key: llm[key]
            for key in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "vocab_size",
                "rms_norm_eps",
                "rope_theta",
            )
        },
        latent_patch_size=image["latent_patch_size"],
        latent_channels=image["vae_config"]["z_channels"],
        pixels_per_latent=image["vae_config"]["downsample"],
        max_latent_size=image["max_latent_size"],
        prediction=image.get("prediction", "velocity"),
    )


def config_files(config: MoTConfig) -> dict[str, dict]:
    """The inverse of `read_config`: contents of `llm_config.json` and `config.json`."""
    sizes = asdict(config)
    image = {
        "latent_patch_size": sizes.pop("latent_patch_size"),
        "max_latent_size": sizes.pop("max_latent_size"),
        "prediction": sizes.pop("prediction"),
        "vae_config": {
            "z_channels": sizes.pop("latent_channels"),
            "downsample": sizes.pop("pixels_per_latent"),
        },
    }
    return {
        "llm_config.json": {"model_type": "qwen2"} | sizes,
        "config.json": {"model_type": "bagel"} | image,
    }
