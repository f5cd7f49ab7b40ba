"""What a run is made of and how it goes to disk: one list, `TrainState`, and data-only files.

All randomness comes from keys (seed, step, prompt, member), so there is no generator state to keep: weights,
optimizer moments and the step are everything.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.models.checkpoint import save_model
from unigrpo_cli.models.unified import UnifiedModel
from unigrpo_cli.ranks import ALONE, Ranks

FORMAT = 1
STATE, MOMENTS = "state.json", "optimizer.safetensors"
KINDS = {"step": int, "base": str, "tune": str, "facts": dict, "trained": list}


@dataclass
class TrainState:
    """Held by the training loop, saved as a whole.

    Args:
        policy: the weights, and the reference if it is a frozen copy (saved by name of its model, not again).
        optimizer: AdamW over the trainable weights.
        step: training steps done.
        between: the weights have moved on from `step`; a checkpoint now would be of neither step.
        ranks: the processes that train these weights together; each holds a state of its own, equal to the others'.
        facts: small JSON values that the final report needs (evaluation before training, first ratios).
    """

    policy: UnifiedModel
    optimizer: torch.optim.AdamW
    step: int = 0
    between: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    ranks: Ranks = ALONE


def _named_parameters(state: TrainState) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in state.policy.network.named_parameters() if p.requires_grad]


def save_state(state: TrainState, directory: Path, *, base: str, tune: str) -> None:
    """Write a checkpoint: model directory or adapter, `optimizer.safetensors`, `state.json`.

    Written under a temporary name and renamed, so that a directory with the final name is complete.
    """
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    if tune == "lora":
        from unigrpo_cli.models.lora import save_adapters

        save_adapters(state.policy.network, partial, base)
    else:
        save_model(state.policy, partial)
    moments = {}
    for name, parameter in _named_parameters(state):
        for key, value in state.optimizer.state.get(parameter, {}).items():
            moments[f"{name}|{key}"] = value.detach().cpu().contiguous()
    save_file(moments, partial / MOMENTS)
    content = {"format": FORMAT, "step": state.step, "base": base, "tune": tune, "facts": state.facts}
    content["trained"] = [name for name, _ in _named_parameters(state)]
    (partial / STATE).write_text(json.dumps(content, indent=1) + "\n")
    if directory.exists():  # moved aside first: at no moment is there neither the old nor the new one
        aside = directory.with_name("replaced_" + directory.name)
        directory.rename(aside)
        partial.rename(directory)
        shutil.rmtree(aside)
    else:
        partial.rename(directory)


def read_state(directory: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        WeightsError: when it is missing, damaged or of another format.
    """
    try:
        content = json.loads((directory / STATE).read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"{directory} is no training checkpoint: {STATE} is missing") from error
    except (ValueError, OSError) as error:
        raise WeightsError(f"{directory}/{STATE} is damaged ({error}); resume from another checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise WeightsError(f"{directory} has another checkpoint format; this version reads format {FORMAT}")
    for name, kind in KINDS.items():
        if type(content.get(name)) is not kind:
            raise WeightsError(
                f"{directory}/{STATE} is damaged ({name} = {content.get(name)!r}); resume from another checkpoint"
            )
    return content


def restore_state(state: TrainState, directory: Path, content: dict[str, Any]) -> None:
    """Put optimizer moments, step and facts of a checkpoint into a state whose weights are already its own.

    Raises:
        WeightsError: when the moments are damaged or of other weights.
    """
    try:
        moments = load_file(directory / MOMENTS)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{directory}/{MOMENTS} is damaged or missing ({error})") from error
    # A weight that never got a gradient has no moments, so the names are kept on their own.
    odd = min({name for name, _ in _named_parameters(state)} ^ set(content["trained"]), default=None)
    if odd is not None:
        raise WeightsError(
            f"{directory}: its optimizer belongs to other weights (e.g. {odd}); resume with the same "
            "train.tune, train.experts and train.also"
        )
    for name, parameter in _named_parameters(state):
        own = {k.rsplit("|", 1)[1]: v for k, v in moments.items() if k.rsplit("|", 1)[0] == name}
        if own:
            state.optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in own.items()
            }
    state.step = content["step"]
    state.facts = content["facts"]


def _complete(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; what a crash left half written has another name."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(p for p in found if not p.suffix and (p / STATE).is_file())


def newest_checkpoint(run: Path) -> Path:
    """The last complete checkpoint of a run.

    Raises:
        UsageError: when there is none.
    """
    found = _complete(run)
    if not found:
        raise UsageError(f"{run} holds no checkpoint; give a directory that `unigrpo train` saved one in")
    return found[-1]


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    found = _complete(run)
    for path in found[:-keep]:
        shutil.rmtree(path)
