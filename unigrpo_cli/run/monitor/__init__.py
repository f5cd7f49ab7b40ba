"""What is looked at while a run trains: standing metrics, updates that must not be made, rules that warn."""

from unigrpo_cli.run.monitor.history import Course, parting, trend
from unigrpo_cli.run.monitor.live import Watch
from unigrpo_cli.run.monitor.rules import RULES, Rule
from unigrpo_cli.training.metrics import drift, rollout_metrics

__all__ = ["RULES", "Course", "Rule", "Watch", "drift", "parting", "rollout_metrics", "trend"]
