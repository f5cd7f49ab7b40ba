"""A run's text for UNIPO (github.com/poloclub/unipo), a viewer of policy optimisation: header, metrics, tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from unigrpo_cli.errors import UsageError
from unigrpo_cli.io.atomic import new_file
from unigrpo_cli.io.json import to_json
from unigrpo_cli.report.runs import ReportRun
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


def export_run(run: ReportRun, directory: Path) -> Path:
    """Write `RUN.jsonl` into a directory: the header, then a line per step, with tokens where the step was traced.

    Raises:
        UsageError: when the run has no traced text.
    """
    steps = traced_steps(run)
    if not steps or not run.curves.steps:
        raise UsageError(f"{run.directory} has no traces of training: train with train.trace_every above 0")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{run.directory.resolve().name}.jsonl"
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for line in _lines(run, set(steps)):
            file.write(to_json(line) + "\n")
    return path


def _lines(run: ReportRun, traced: set[int]) -> Iterator[dict[str, Any]]:
    settings = run.settings
    names = settings.get("reward.names", [])
    yield {
        "type": "header",
        "algorithm": ALGORITHM,
        "task": "reasoning before an image",
        "dataset": str(settings.get("prompts", "")),
        "reward_strategy": " + ".join(map(str, names)) if isinstance(names, list) else str(names),
        "totalSteps": len(run.curves.steps),
        "model_name": settings.get("model", ""),
        "reference_model_name": settings.get("model", ""),
        "hparams": {key: value for key, value in settings.items() if key.startswith(SECTIONS)},
    }
    weights = load_step(run, min(traced)).reward_weights
    for k, step in enumerate(run.curves.steps):
        row = {name: v for name, values in (run.curves.values or {}).items() if (v := values[k]) is not None}
        if "text/loss" not in row:  # a line of an evaluation alone, or a step that made no update
            continue
        prompts = {}
        if step in traced:
            trace = load_step(run, step)
            prompts = {"prompts": [_prompt(trace, g, group) for g, group in enumerate(trace.groups)]}
        first = {"type": "step", "step": step, "is_first_step_after_rollout_phase": True}
        yield first | {"metrics": _metrics(row, weights)} | prompts


def _metrics(row: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics; `policy_objective` and `reward` are those that UNIPO requires."""
    rewards = {name.removeprefix("reward/"): value for name, value in row.items() if name.startswith("reward/")}
    required = {"policy_objective": -row["text/loss"], "reward": total(rewards, weights) or 0.0}
    return required | {METRICS.get(name, name): value for name, value in row.items()}


def _prompt(trace: StepTrace, g: int, group: GroupTrace) -> dict[str, Any]:
    responses = [_response(f"step{trace.step}_p{g}_sample{e.member}", e, trace) for e in group.episodes]
    return {"prompt": group.prompt, "responses": responses}


def _response(name: str, episode: EpisodeTrace, trace: StepTrace) -> dict[str, Any]:
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
        "reward": total(episode.rewards, trace.reward_weights),
        "advantage": episode.advantage,
        "response_text": "\n\n".join(text.text for text in texts),
        "response_length": len(strings),
        "tokens": {"ids": _joined([text.ids_L for text in texts]), "strings": strings} | measured,
    }


def _joined(parts: Sequence[NDArray | None]) -> list[Any]:
    return [value for part in parts if part is not None for value in part.tolist()]
