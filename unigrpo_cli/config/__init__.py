"""Configuration: schema, loading, presets."""

from unigrpo_cli.config.loading import config_keys, load_config, to_toml, with_values
from unigrpo_cli.config.schema import (
    PRESETS,
    AdvantageConfig,
    Config,
    ObjectiveConfig,
    SamplingConfig,
    Section,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "AdvantageConfig",
    "Config",
    "ObjectiveConfig",
    "SamplingConfig",
    "Section",
    "TrainConfig",
    "config_keys",
    "load_config",
    "to_toml",
    "with_values",
]
