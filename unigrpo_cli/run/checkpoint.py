"""Checkpoints: write, read, verify, list and prune. Their files are data only (docs/files.md)."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.io.atomic import SUMS, files_in, is_inside, new_directory, on_disk
from unigrpo_cli.io.limits import reason_of
from unigrpo_cli.models.sharding import own_part, whole
from unigrpo_cli.rewards.loaded import RewardIdentity
from unigrpo_cli.training.rng_state import Generators, GeneratorsRest
from unigrpo_cli.training.state import RunRecord, TrainState

FORMAT = 3
STATE, MOMENTS, GENERATORS = "state.json", "optimizer.safetensors", "generators.safetensors"
CARD = "README.md"


@dataclass(frozen=True)
class PromptCursor:
    """The training prompts, and the position in them of the next step."""

    count: int
    digest: str
    epoch: int
    position: int


@dataclass(frozen=True)
class StateFile:
    """`state.json` of a checkpoint.

    Args:
        base: the model that the run started from; `reference` is the digest of its weights.
        trained: names of the weights that are trained; one that never had a gradient has no moments.
        files: sizes of the other files.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    step: int
    base: str
    finetune: Literal["full", "lora"]
    reference: str
    prompts: PromptCursor
    rewards: list[RewardIdentity]
    config: dict[str, Any]
    generators: GeneratorsRest
    record: RunRecord
    trained: list[str]
    files: dict[str, int]


@cache
def _schema() -> TypeAdapter[StateFile]:
    return TypeAdapter(StateFile)


# ----- write


def save_checkpoint(state: TrainState, directory: Path, card: str | None = None) -> None:
    """Write a checkpoint: model directory or adapter, optimizer, generators, `state.json`, and checksums of all.

    `card` is the text of its README.md, which has no checksum: people may edit it.

    With several ranks all gather sharded weights and the first writes; the others make an empty directory. The files
    are the same for any number of ranks.
    """
    gathered = _gather(state)
    with state.ranks.together():
        if state.ranks.first:
            _write(gathered, directory, card)
        else:
            directory.mkdir(parents=True, exist_ok=True)


def _gather(state: TrainState) -> TrainState:
    """The state with whole weights and moments on the first rank; the state itself when it is not sharded."""
    policy = state.policy.gathered_on_host(keep=state.ranks.first)
    if policy is state.policy:
        return state
    own = dict(policy.named_parameters())
    optimizer = torch.optim.AdamW([p for p in own.values() if p.requires_grad])
    for name, parameter in _trained(state):
        moments = {k: whole(v).cpu() for k, v in state.optimizer.state.get(parameter, {}).items()}
        if moments and state.ranks.first:
            optimizer.state[own[name]] = moments
    return replace(state, policy=policy, optimizer=optimizer)


def _write(state: TrainState, directory: Path, card: str | None) -> None:
    origin, generators = state.origin, state.generators
    assert origin is not None and generators is not None
    config = origin.config
    with new_directory(directory, sums=True, unsummed=(CARD,)) as partial, _full_disk_is_a_disk_error(directory):
        state.policy.save(partial, origin.reference.base)
        moments = {
            f"{name}|{key}": value.detach().cpu().contiguous()
            for name, parameter in _trained(state)
            for key, value in state.optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, partial / MOMENTS)
        save_file(generators.words, partial / GENERATORS)
        epoch, position = divmod(state.step * config.train.prompts_per_step, origin.prompts.count)
        content = StateFile(
            format=FORMAT,
            step=state.step,
            base=origin.reference.base,
            finetune=config.train.finetune,
            reference=origin.reference.digest,
            prompts=PromptCursor(origin.prompts.count, origin.prompts.digest, epoch, position),
            rewards=list(origin.rewards),
            config=config.model_dump(mode="json"),
            generators=generators.rest,
            record=state.record,
            trained=[name for name, _ in _trained(state)],
            files={name: (partial / name).stat().st_size for name in files_in(partial)},
        )
        (partial / STATE).write_text(json.dumps(asdict(content), indent=1) + "\n", encoding="utf-8", newline="\n")
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8", newline="\n")


@contextmanager
def _full_disk_is_a_disk_error(directory: Path) -> Iterator[None]:
    """Copying a model's files raises a `WeightsError`; when the disk is full that is an error of the disk."""
    try:
        yield
    except WeightsError as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in full:
            with on_disk(directory):
                raise error.__cause__ from error
        raise


def _trained(state: TrainState) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in state.policy.named_parameters() if p.requires_grad]


# ----- read


def read_state(directory: Path) -> StateFile:
    """`state.json` of a checkpoint, every field of the right type."""
    path = directory / STATE
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(f"{directory} is not a training checkpoint: {STATE} is missing") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error})") from error
    _refuse_other_format(directory, text)
    try:
        content = _schema().validate_json(text, strict=True)
        _check_ranges(content)
    except ValueError as error:
        raise WeightsError(f"{path} is damaged ({reason_of(error)}); resume from another checkpoint") from error
    return content


def _check_ranges(content: StateFile) -> None:
    """What the types do not say.

    Raises:
        ValueError: naming the field.
    """
    if not 0 <= content.step < 2**53 or content.prompts.count < 1:
        raise ValueError(f"step = {content.step}, prompts.count = {content.prompts.count}")
    if "\0" in content.base:
        raise ValueError(f"base = {content.base!r}")
    odd = next((name for name in content.files if not is_inside(name)), None)
    if odd is not None:
        raise ValueError(f"files: {odd!r} is not a file name")


def _refuse_other_format(directory: Path, text: bytes) -> None:
    try:
        found = json.loads(text)["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # damaged: the schema says where
    if found != FORMAT and type(found) is int:
        raise WeightsError(
            f"{directory} has checkpoint format {found}; this version reads format {FORMAT}. Resume it with the "
            f"version that wrote it; to use its weights, copy the directory without {STATE} and give the copy as "
            "--model or --adapter"
        )


def restore_checkpoint(state: TrainState, directory: Path, content: StateFile) -> None:
    """Put moments, step, record and generators of a checkpoint into a state that has its weights already."""
    try:
        moments = load_file(directory / MOMENTS)
        words = load_file(directory / GENERATORS)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{directory}: {MOMENTS} or {GENERATORS} is damaged or missing ({error})") from error
    odd = min({name for name, _ in _trained(state)} ^ set(content.trained), default=None)
    if odd is not None:
        raise WeightsError(
            f"{directory}: its optimizer belongs to other weights (e.g. {odd}); resume with the same "
            "train.finetune, train.experts and train.extra_modules"
        )
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, kind = key.rpartition("|")
        by_name.setdefault(name, {})[kind] = value
    for name, parameter in _trained(state):
        own = by_name.get(name)
        if own:
            state.optimizer.state[parameter] = {k: v if k == "step" else own_part(v, parameter) for k, v in own.items()}
    state.step, state.record = content.step, content.record
    state.generators = Generators(words, content.generators)


# ----- verify, list, prune


def missing_part(directory: Path) -> str | None:
    """What a checkpoint lacks by names and sizes, or None. Reads no weights."""
    try:
        content = read_state(directory)
    except WeightsError as error:
        return str(error).removeprefix(str(directory)).lstrip("/ ")
    if not (directory / SUMS).is_file():
        return f"{SUMS} is missing: the checkpoint was not completed"
    for name, size in content.files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Directories of a run that are named as checkpoints, oldest first. Links and leftovers have other names."""
    found = (run / "checkpoints").glob("step_*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; 0 for a directory that was renamed."""
    return int(checkpoint.name[5:]) if checkpoint.name[5:].isdigit() else 0


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run that is complete by names and sizes."""
    for path in reversed(checkpoints(run)):
        if missing_part(path) is None:
            return path
    raise UsageError(f"{run} has no complete checkpoint; give a run that has saved one")


def prune_checkpoints(run: Path, keep: int, every: int, best: int | None) -> None:
    """Remove all checkpoints but the newest `keep`, those of every `every`-th step (0: none), and the best."""
    for path in checkpoints(run)[:-keep]:
        step = step_of(path)
        if step != best and not (every and step % every == 0):
            shutil.rmtree(path)
