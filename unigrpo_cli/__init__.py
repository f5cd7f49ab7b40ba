"""UniGRPO: reinforcement learning of reasoning and painting in one unified model.

These names are for plugin authors; nothing here imports torch.
"""

from unigrpo_cli.programs import Program, Rows
from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardOutput, Sample
from unigrpo_cli.rewards.function import Options, reward
from unigrpo_cli.rewards.hooks import hookimpl

__version__ = "0.1.0"

__all__ = [
    "Options",
    "Program",
    "RewardBatch",
    "RewardContext",
    "RewardOutput",
    "Rows",
    "Sample",
    "hookimpl",
    "reward",
]
