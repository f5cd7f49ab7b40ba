"""Applies the rules to each finished step, warns once per occurrence, and stops a diverged run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unigrpo_cli.config import Config
from unigrpo_cli.errors import DivergedError, quoted
from unigrpo_cli.run.monitor.history import FIRST, LAST, History
from unigrpo_cli.run.monitor.rules import RULES
from unigrpo_cli.training.state import MonitorRecord

QUIET = 5  # steps without an observation after which a warning ends and may be printed again


class Monitor:
    """Checks each finished step. Its memory is in `record`, so a resumed run gives the same warnings."""

    def __init__(
        self,
        record: MonitorRecord,
        config: Config,
        weights: Mapping[str, float],
        signs: Mapping[str, int],
        ratio_limits: Mapping[str, float],
    ):
        """
        Args:
            record: changed in place and saved with checkpoints.
            config, weights, signs, ratio_limits: see `History`.
        """
        self.record, self.config = record, config
        self.weights, self.signs, self.ratio_limits = weights, signs, ratio_limits

    def check(self, metrics: dict[str, float], skipped: str | None) -> list[str]:
        """Check a finished step and return its new warnings, one line each.

        A skipped step is not part of the history: nothing was learned from its batch.
        """
        if skipped is not None:
            self.record.bad_steps += 1
            return [f"this step was skipped: {skipped}"]
        self.record.bad_steps = 0
        row = {k: float(v) for k, v in metrics.items() if _rules_read(k) and math.isfinite(v)}
        if len(self.record.first) < FIRST:
            self.record.first.append(row)
        self.record.last = [*self.record.last, row][-LAST:]
        history = History(self.record.first, self.record.last, self.config, self.weights, self.signs, self.ratio_limits)
        return self._new_warnings(history)

    def _new_warnings(self, history: History) -> list[str]:
        warnings = []
        sightings, lasting = self.record.sightings, self.record.lasting
        checked = set()
        for rule in RULES:
            for subject in rule.subjects(history):
                key = f"{rule.name} {subject}".strip()
                checked.add(key)
                seen = rule.check(history, subject)
                needed, window = rule.persistence
                marks = [*sightings.get(key, []), int(seen is not None)][-max(QUIET, window) :]
                sightings[key] = marks
                if not any(marks):
                    sightings.pop(key)
                    lasting.pop(key, None)
                elif seen and (key in lasting or sum(marks[-window:]) >= needed):
                    if key not in lasting:
                        warnings.append(f"{seen}: {rule.cause}; {rule.remedy.replace('NAME', subject)}")
                    lasting[key] = seen
        for gone in {*sightings, *lasting} - checked:  # a reward that a resumed run no longer has
            sightings.pop(gone, None)
            lasting.pop(gone, None)
        return warnings

    @property
    def lasting(self) -> dict[str, str]:
        """Current warnings: rule and subject, and the latest observation."""
        return self.record.lasting

    def row(self, skipped: str | None) -> dict[str, Any]:
        """The step's entries in metrics.jsonl that are not numbers."""
        return {"warnings": list(self.lasting)} | ({} if skipped is None else {"skipped": skipped})

    def stop_if_diverged(self, step: int, skipped: str, where: str) -> None:
        """Stop a run after too many skipped steps in a row. The count starts at zero when the run is resumed.

        Args:
            step: the last skipped step.
            skipped: why it was skipped.
            where: the directory of its batch.
        """
        count = self.record.bad_steps
        if count < self.config.monitor.bad_steps:
            return
        self.record.bad_steps = 0
        raise DivergedError(
            f"{count} steps in a row were skipped, the last because of {skipped}. Inspect its batch with "
            f"`unigrpo rollout --from {quoted(where)}`, then resume from a checkpoint before step "
            f"{step - count + 1} with lower train.lr_text and train.lr_image"
        )


def _rules_read(key: str) -> bool:
    """Whether a rule may read this metric. Single denoising steps and reward components would only fill checkpoints."""
    return "/step_" not in key and (key.count("/") < 2 or key.endswith(("/abstained", "/spread")))
