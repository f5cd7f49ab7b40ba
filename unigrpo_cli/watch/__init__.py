"""What is looked at while a run trains: standing metrics, updates that must not be made, rules that warn."""

from unigrpo_cli.watch.course import Course, parting, trend
from unigrpo_cli.watch.live import Watch
from unigrpo_cli.watch.metrics import drift, rollout_metrics
from unigrpo_cli.watch.rules import RULES, Rule

__all__ = ["RULES", "Course", "Rule", "Watch", "drift", "parting", "rollout_metrics", "trend"]
