"""A run's text for UNIPO (github.com/poloclub/unipo), a viewer of policy optimisation: header, metrics, tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.atomic import new_file
from unigrpo_cli.io.json import to_json
from unigrpo_cli.report.runs import ReportRun, read_curves
from unigrpo_cli.report.steps import total
from unigrpo_cli.report.traced import load_step, traced_steps
from unigrpo_cli.run.trace_types import EpisodeTrace, GroupTrace, StepTrace, TextTrace

ALGORITHM = "grpo"
"""UNIPO's name for the text half: one advantage for each answer, a clipped ratio for each token."""
METRICS = {
    "text/entropy": "entropy",
    "text/approx_kl": "kl",
    "text/clip_fraction": "clip_fraction",
    "text/grad_norm": "grad_norm",
    "text/length": "response_length",
    "advantage/std": "advantage_std",
    "loss": "total_loss",
}
"""Our metrics and the names that UNIPO knows; all others keep ours."""
SECTIONS = ("train.", "objective.", "advantage.", "sampling.")


@dataclass(frozen=True)
class UnipoExport:
    """The file, and the steps that it lacks: a reward abstained for all of their episodes."""

    path: Path
    left_out: int


def export_run(run: ReportRun, directory: Path) -> UnipoExport:
    """Write `RUN.jsonl` into a directory: the header, then a line per step, with tokens where the step was traced.

    UNIPO requires a reward of each step and answer, so those whose reward abstained are left out.
    """
    traced = traced_steps(run)
    if not traced or not run.curves.steps:
        raise UsageError(f"{run.directory} has no traces of training: train with train.trace_every above 0")
    weights = load_step(run, traced[0]).reward_weights
    rows = _trained(run)
    steps = {step: metrics for step, row in rows.items() if (metrics := _metrics(row, weights)) is not None}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{run.directory.resolve().name}.jsonl"
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for line in _lines(run, steps, set(traced)):
            file.write(to_json(line) + "\n")
    return UnipoExport(path, len(rows) - len(steps))


def _trained(run: ReportRun) -> dict[int, dict[str, float]]:
    curves = read_curves(run.directory / "metrics.jsonl", most_points=sys.maxsize)
    named = (curves.values or {}).items()
    rows = {s: {name: v for name, own in named if (v := own[k]) is not None} for k, s in enumerate(curves.steps)}
    return {step: row for step, row in rows.items() if "text/loss" in row}


def _lines(run: ReportRun, steps: Mapping[int, dict[str, float]], traced: set[int]) -> Iterator[dict[str, Any]]:
    settings = run.settings
    names = settings.get("reward.names", [])
    yield {
        "type": "header",
        "algorithm": ALGORITHM,
        "task": "reasoning before an image",
        "dataset": str(settings.get("prompts", "")),
        "reward_strategy": " + ".join(map(str, names)) if isinstance(names, list) else str(names),
        "totalSteps": len(steps),
        "model_name": settings.get("model", ""),
        "reference_model_name": settings.get("model", ""),
        "hparams": {key: value for key, value in settings.items() if key.startswith(SECTIONS)},
    }
    for step, metrics in steps.items():
        prompts = {}
        if step in traced:
            trace = load_step(run, step)
            found = [_prompt(trace, g, group) for g, group in enumerate(trace.groups)]
            prompts = {"prompts": [prompt for prompt in found if prompt["responses"]]}
        first = {"type": "step", "step": step, "is_first_step_after_rollout_phase": True}
        yield first | {"metrics": metrics} | prompts


def _metrics(row: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float] | None:
    """A step's metrics with the two that UNIPO requires; None when a reward abstained."""
    reward = total({name.removeprefix("reward/"): v for name, v in row.items() if name.startswith("reward/")}, weights)
    if reward is None:
        return None
    required = {"policy_objective": -row["text/loss"], "reward": reward}
    return required | {METRICS.get(name, name): value for name, value in row.items()}


def _prompt(trace: StepTrace, g: int, group: GroupTrace) -> dict[str, Any]:
    rewards = [(e, total(e.rewards, trace.reward_weights)) for e in group.episodes]
    name = f"step{trace.step}_p{g}_sample"
    responses = [_response(f"{name}{e.member}", e, reward, trace) for e, reward in rewards if reward is not None]
    return {"prompt": group.prompt, "responses": responses}


def _response(name: str, episode: EpisodeTrace, reward: float, trace: StepTrace) -> dict[str, Any]:
    texts = [segment for segment in episode.segments if isinstance(segment, TextTrace)]
    strings = [s for text in texts for s in text.tokens or tuple(f"[{number}]" for number in text.ids_L)]
    columns = {
        "log_probs": [text.log_prob_new_L for text in texts],
        "old_log_probs": [text.log_prob_old_L for text in texts],
        "ref_log_probs": [text.log_prob_reference_L for text in texts],
        "advantages": [text.advantage_L for text in texts],
        "entropy": [text.entropy_L for text in texts],
    }
    measured = {key: _joined(parts) for key, parts in columns.items() if parts and all(p is not None for p in parts)}
    losses = [text.loss_L for text in texts]
    if trace.denominator and texts and all(loss is not None for loss in losses):
        measured["token_objective"] = [-share * trace.denominator for share in _joined(losses)]
    return {
        "id": name,
        "reward": reward,
        "advantage": episode.advantage,
        "response_text": "\n\n".join(text.text for text in texts),
        "response_length": len(strings),
        "tokens": {"ids": _joined([text.ids_L for text in texts]), "strings": strings} | measured,
    }


def _joined(parts: Sequence[NDArray | None]) -> list[Any]:
    return [value for part in parts if part is not None for value in part.tolist()]
