"""The state of a training run in memory. `run/checkpoint.py` writes it to disk.

All randomness of ours comes from keys (seed, step, prompt, member), so weights, optimizer moments and the step
determine the next step. Everything else here is for reports, warnings and comparison.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.io.limits import read_ends
from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.rewards.loaded import RewardIdentity
from unigrpo_cli.training.rng_state import Generators

Job = Literal["eval", "samples"]


@dataclass(frozen=True)
class Reference:
    """The model that a run starts from: its name, and a digest of its weights."""

    base: str
    digest: str


@dataclass(frozen=True)
class PromptList:
    """Number of training prompts, and a sha256 of their content."""

    count: int
    digest: str


@dataclass(frozen=True)
class Origin:
    """What a run's numbers come from besides its weights. Saved with them and compared on resume."""

    config: Config
    reference: Reference
    prompts: PromptList
    rewards: tuple[RewardIdentity, ...]


@dataclass(frozen=True)
class Best:
    """The best held-out evaluation so far, by `eval.best`."""

    reward: str
    value: float
    step: int


@dataclass
class MonitorRecord:
    """What the monitor's rules need from earlier steps.

    Args:
        first, last: metrics of the first and of the last steps that were not skipped.
        sightings: by rule and subject, 1 for each of the last steps in which it was seen, else 0.
        lasting: current warnings, by rule and subject.
        bad_steps: skipped steps in a row.
    """

    first: list[dict[str, float]] = field(default_factory=list)
    last: list[dict[str, float]] = field(default_factory=list)
    sightings: dict[str, list[int]] = field(default_factory=dict)
    lasting: dict[str, str] = field(default_factory=dict)
    bad_steps: int = 0


@dataclass
class RunRecord:
    """What a run remembers of its past; plain numbers and names, written to `state.json` as they are here.

    Args:
        eval_before: mean scores before the first step; None until they are there.
        pending: jobs of the last step that are still to be run, in order.
        abstained: for each reward, on which of its last samples it abstained.
        best: the best evaluation so far.
        ratio_step0_max_abs_log: of the first step, by kind of action.
        rollout_drift_max_abs: the largest of all steps, by kind of action.
        gradient_norms: of the last accepted updates, by expert.
        monitor: see `MonitorRecord`.
    """

    eval_before: dict[str, float] | None = None
    pending: list[Job] = field(default_factory=list)
    abstained: dict[str, list[bool]] = field(default_factory=dict)
    best: Best | None = None
    ratio_step0_max_abs_log: dict[str, float | None] = field(default_factory=dict)
    rollout_drift_max_abs: dict[str, float | None] = field(default_factory=dict)
    gradient_norms: dict[str, list[float]] = field(default_factory=dict)
    monitor: MonitorRecord = field(default_factory=MonitorRecord)

    def add_step(self, metrics: dict[str, float]) -> None:
        """Keep the first step's ratios and the largest drift."""
        for kind in ("text", "image"):
            self.ratio_step0_max_abs_log.setdefault(kind, metrics.get(f"{kind}/first_max_abs_log_ratio"))
            drift = metrics.get(f"{kind}/drift_max")
            known = self.rollout_drift_max_abs.setdefault(kind, drift)
            if drift is not None and known is not None:
                self.rollout_drift_max_abs[kind] = max(drift, known)


@dataclass
class TrainState:
    """What the training loop changes, and a checkpoint holds.

    Args:
        policy: the weights, and the frozen reference if there is one (a checkpoint names its model only).
        optimizer: AdamW over the trainable weights.
        step: training steps done.
        between: the weights have moved since `step`, so a checkpoint now would belong to neither step.
        record: what reports and warnings need of earlier steps.
        generators: global random generators after the last completed work.
        origin: None for a loop that is never saved.
        ranks: the processes that train these weights together; each has an equal state.
    """

    policy: TrainablePolicy
    optimizer: torch.optim.AdamW
    step: int = 0
    between: bool = False
    record: RunRecord = field(default_factory=RunRecord)
    generators: Generators | None = None
    origin: Origin | None = None
    ranks: Ranks = ALONE


def prompt_list(prompts: Sequence[Prompt]) -> PromptList:
    """Count and digest of ids, texts, metadata and pictures; of a picture its size and both ends."""
    digest = hashlib.sha256()
    for prompt in prompts:
        paths = prompt.files
        given = paths[0] if len(paths) == 1 else list(paths)
        metadata = {k: v for k, v in prompt.metadata.items() if k != "image" or v != given}
        row = [prompt.id, prompt.text, metadata]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        for path in paths:
            size = Path(path).stat().st_size
            digest.update(f"{size}\n".encode() + read_ends(Path(path), 0, size))
        if isinstance(prompt.image, np.ndarray):
            digest.update(f"{prompt.image.shape}\n".encode() + prompt.image.tobytes())
    return PromptList(len(prompts), digest.hexdigest())
