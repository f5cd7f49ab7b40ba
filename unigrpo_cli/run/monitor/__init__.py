"""The monitor: rules over the metrics of a run's steps, each with a warning and a remedy."""

from unigrpo_cli.run.monitor.history import History, reward_hacking, trend
from unigrpo_cli.run.monitor.monitor import Monitor
from unigrpo_cli.run.monitor.rules import RULES, Rule

__all__ = ["RULES", "History", "Monitor", "Rule", "reward_hacking", "trend"]
