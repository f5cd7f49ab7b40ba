"""The live watch: rules over the course of a run, each said once until it recovers; the end of a diverged run."""

from __future__ import annotations

import math
from typing import Any

from unigrpo_cli.config import Config
from unigrpo_cli.errors import DivergedError
from unigrpo_cli.run.monitor.history import FIRST, LAST, Course
from unigrpo_cli.run.monitor.rules import RULES

QUIET = 5  # steps without a sighting, after which a rule has recovered and may be said again


class Watch:
    """Sees each finished step. All it remembers is in `facts`, so a resumed run warns as an uninterrupted one."""

    def __init__(self, facts: dict[str, Any], config: Config, weights: dict[str, float], signs: dict[str, int]):
        """
        Args:
            facts: `state.facts["watch"]`: JSON values, changed in place and saved with checkpoints.
            weights, signs: see `Course`.
        """
        self.facts, self.config, self.weights, self.signs = facts, config, weights, signs
        for name, empty in (("first", []), ("last", []), ("sightings", {}), ("lasting", {}), ("bad_steps", 0)):
            facts.setdefault(name, empty)

    def see(self, metrics: dict[str, float], skipped: str | None) -> list[str]:
        """Look at a finished step. Returns what is to be said of it, a line each.

        A skipped step is no part of the course: its numbers are of a batch that nothing was learnt from.
        """
        if skipped is not None:
            self.facts["bad_steps"] += 1
            return [f"this step was skipped: {skipped}"]
        self.facts["bad_steps"] = 0
        row = {k: v for k, v in metrics.items() if _is_of_the_course(k) and math.isfinite(v)}
        if len(self.facts["first"]) < FIRST:
            self.facts["first"].append(row)
        self.facts["last"] = [*self.facts["last"], row][-LAST:]
        return self._news(Course(self.facts["first"], self.facts["last"], self.config, self.weights, self.signs))

    def _news(self, course: Course) -> list[str]:
        news = []
        sightings, lasting = self.facts["sightings"], self.facts["lasting"]
        asked = set()
        for rule in RULES:
            for subject in rule.subjects(course):
                key = f"{rule.name} {subject}".strip()
                asked.add(key)
                seen = rule.look(course, subject)
                marks = [*sightings.get(key, []), int(seen is not None)][-max(QUIET, rule.lasting[1]) :]
                sightings[key] = marks
                if not any(marks):
                    sightings.pop(key)
                    lasting.pop(key, None)
                elif seen and (key in lasting or sum(marks[-rule.lasting[1] :]) >= rule.lasting[0]):
                    if key not in lasting:
                        remedy = rule.remedy.replace("NAME", subject)
                        news.append(f"{seen}: {rule.means}; {remedy}")
                    lasting[key] = seen
        for gone in {*sightings, *lasting} - asked:  # of a reward that a resumed run does without
            sightings.pop(gone, None)
            lasting.pop(gone, None)
        return news

    @property
    def lasting(self) -> dict[str, str]:
        """What has been said and has not recovered: rule and subject, and what was seen of it last."""
        return self.facts["lasting"]

    def row(self, skipped: str | None) -> dict[str, Any]:
        """What the step's line in metrics.jsonl says beside its numbers."""
        return {"warnings": list(self.lasting)} | ({} if skipped is None else {"skipped": skipped})

    def stop_if_diverged(self, step: int, skipped: str, where: str) -> None:
        """End a run of which nothing but bad steps is to be expected. The count begins anew where it goes on.

        Args:
            step, skipped: the step that was skipped last, and why.
            where: its batch.

        Raises:
            DivergedError: after `monitor.bad_steps` skipped steps in a row.
        """
        count = self.facts["bad_steps"]
        if count < self.config.monitor.bad_steps:
            return
        self.facts["bad_steps"] = 0
        raise DivergedError(
            f"{count} steps in a row were skipped, the last one in {skipped}; study its batch with "
            f"`unigrpo rollout --from {where}`, then go on from a checkpoint before step {step - count + 1} with "
            "lower train.lr_text and train.lr_image"
        )


def _is_of_the_course(key: str) -> bool:
    """Whether a rule may ask for it. Single denoising steps and parts of rewards would only fill checkpoints."""
    return "/step_" not in key and (key.count("/") < 2 or key.endswith(("/abstained", "/spread")))
