"""UniGRPO: reinforcement learning of reasoning and painting in one unified model.

These names are for plugin authors and for readers of runs; nothing here imports torch before it is used.
"""

from typing import TYPE_CHECKING, Any

from unigrpo_cli.programs import Program, Rows
from unigrpo_cli.rewards.batch import RewardBatch, RewardContext, RewardOutput, Sample
from unigrpo_cli.rewards.function import Options, reward
from unigrpo_cli.rewards.hooks import hookimpl

if TYPE_CHECKING:
    from unigrpo_cli.run.episode_files import load_episodes
    from unigrpo_cli.run.trace_files import load_traces

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
    "load_episodes",
    "load_traces",
    "reward",
]


def __getattr__(name: str) -> Any:
    """Functions that need numpy or torch, imported when they are first asked for."""
    if name == "load_episodes":
        from unigrpo_cli.run.episode_files import load_episodes

        return load_episodes
    if name == "load_traces":
        from unigrpo_cli.run.trace_files import load_traces

        return load_traces
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
