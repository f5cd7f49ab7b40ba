"""Configuration: schema, loading, presets."""

from unigrpo_cli.config.loading import config_keys, load_config, to_toml, with_values
from unigrpo_cli.config.schema import PRESETS, Advantage, Config, Objective, Sampling, Section, Train

__all__ = [
    "PRESETS",
    "Advantage",
    "Config",
    "Objective",
    "Sampling",
    "Section",
    "Train",
    "config_keys",
    "load_config",
    "to_toml",
    "with_values",
]
