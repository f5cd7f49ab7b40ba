"""What a run is made of and how it goes to disk: one list, `TrainState`, and data-only files.

All randomness of ours comes from keys (seed, step, prompt, member). Weights, optimizer moments and the step are
enough for it; the rest says what they belong to, and where strangers' generators stood.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unigrpo_cli.config import Config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.io.atomic import SUMS, new_directory, on_disk
from unigrpo_cli.models.mot.bagel import ENDS, read_ends
from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.models.sharding import own_part, whole
from unigrpo_cli.parallel.ranks import ALONE, Ranks
from unigrpo_cli.rewards.loaded import RewardIdentity
from unigrpo_cli.training.rng_state import Generators

FORMAT = 2
STATE, MOMENTS, GENERATORS = "state.json", "optimizer.safetensors", "generators.safetensors"
KINDS = {"step": int, "base": str, "finetune": str, "facts": dict, "trained": list, "files": dict, "config": dict}
KINDS |= {"reference": str, "prompts": dict, "rewards": list, "generators": dict}


@dataclass(frozen=True)
class Reference:
    """The model that a run began with: its name, and a digest of its weights (`release.weights_digest`)."""

    base: str
    digest: str


@dataclass(frozen=True)
class PromptList:
    """How many prompts there are to train on, and the sha256 of all that they hold."""

    count: int
    digest: str

    def cursor(self, config: Config, step: int) -> dict[str, int]:
        """Where a step begins: passes over the list that are done, and prompts of the present one."""
        epoch, position = divmod(step * config.train.prompts_per_step, self.count)
        return {"epoch": epoch, "position": position}


@dataclass(frozen=True)
class Origin:
    """What a run's numbers come from besides its weights; kept with them, and compared when a run goes on."""

    config: Config
    reference: Reference
    prompts: PromptList
    rewards: tuple[RewardIdentity, ...]


@dataclass
class TrainState:
    """Held by the training loop, saved as a whole.

    Args:
        policy: the weights, and the reference if it is a frozen copy (saved by name of its model, not again).
        optimizer: AdamW over the trainable weights.
        step: training steps done.
        between: the weights have moved on from `step`; a checkpoint now would be of neither step.
        ranks: the processes that train these weights together; each holds a state of its own, equal to the others'.
        facts: small JSON values that reports and warnings need (evaluation before training, first ratios, the best
            evaluation so far, what is owed of this step); saved and restored whole.
        generators: global generators as they were when the last thing was done that counts.
        origin: None for a loop that is never saved.
    """

    policy: TrainablePolicy
    optimizer: torch.optim.AdamW
    step: int = 0
    between: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    generators: Generators | None = None
    origin: Origin | None = None
    ranks: Ranks = ALONE


def prompt_list(prompts: Sequence[Prompt]) -> PromptList:
    """Count and digest of ids, texts, metadata and pictures, a picture being its size and its ends."""
    digest = hashlib.sha256()
    for prompt in prompts:
        metadata = {k: v for k, v in prompt.metadata.items() if k != "image" or v != prompt.image}
        row = [prompt.id, prompt.text, metadata]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        if prompt.image is not None:
            size = Path(prompt.image).stat().st_size
            digest.update(f"{size}\n".encode() + read_ends(Path(prompt.image), 0, size, ENDS))
    return PromptList(len(prompts), digest.hexdigest())


def _named_parameters(state: TrainState) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in state.policy.named_parameters() if p.requires_grad]


def save_state(state: TrainState, directory: Path) -> None:
    """Write a checkpoint: model directory or adapter, optimizer, generators, `state.json`, and sums over all.

    It is what one process writes: all ranks gather what is sharded, and the first writes it. The others are left
    with an empty directory of that name.

    Raises:
        DiskError: when the disk does not take it; what was written of it is gone then.
        WeightsError: when the files that its model came with are not there any more.
    """
    gathered = gather_state(state)
    with state.ranks.together():
        if state.ranks.first:
            _write_state(gathered, directory)
        else:
            directory.mkdir(parents=True, exist_ok=True)


def gather_state(state: TrainState) -> TrainState:
    """A state with whole weights and moments, on the first rank; of one that is not sharded, itself."""
    policy = state.policy.gathered_on_host(keep=state.ranks.first)
    if policy is state.policy:
        return state
    own = dict(policy.named_parameters())
    optimizer = torch.optim.AdamW([p for p in own.values() if p.requires_grad])
    for name, parameter in _named_parameters(state):
        moments = {k: whole(v).cpu() for k, v in state.optimizer.state.get(parameter, {}).items()}
        if moments and state.ranks.first:
            optimizer.state[own[name]] = moments
    return replace(state, policy=policy, optimizer=optimizer)


def _write_state(state: TrainState, directory: Path) -> None:
    origin, generators = state.origin, state.generators
    assert origin is not None and generators is not None
    with new_directory(directory, sums=True) as partial, _full_disks_by_name(directory):
        state.policy.save(partial, origin.reference.base)
        moments = {}
        for name, parameter in _named_parameters(state):
            for key, value in state.optimizer.state.get(parameter, {}).items():
                moments[f"{name}|{key}"] = value.detach().cpu().contiguous()
        save_file(moments, partial / MOMENTS)
        save_file(generators.words, partial / GENERATORS)
        content = {
            "format": FORMAT,
            "step": state.step,
            "base": origin.reference.base,
            "finetune": origin.config.train.finetune,
            "reference": origin.reference.digest,
            "prompts": asdict(origin.prompts) | origin.prompts.cursor(origin.config, state.step),
            "rewards": [asdict(identity) for identity in origin.rewards],
            "config": origin.config.model_dump(mode="json"),
            "generators": generators.rest,
            "facts": state.facts,
            "trained": [name for name, _ in _named_parameters(state)],
            "files": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
        }
        (partial / STATE).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


@contextmanager
def _full_disks_by_name(directory: Path) -> Iterator[None]:
    """Whoever copies a model's files has an error of its own, which on a full disk is that of the disk."""
    try:
        yield
    except WeightsError as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in full:
            with on_disk(directory):
                raise error.__cause__ from error
        raise


def read_state(directory: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint to go on from.

    Raises:
        WeightsError: when it is missing, damaged or of another format.
    """
    content = read_header(directory)
    if content["format"] != FORMAT:
        raise WeightsError(f"{directory} {_of_another_format(directory, content)}")
    for name, kind in KINDS.items():
        if type(content.get(name)) is not kind:
            raise WeightsError(
                f"{directory}/{STATE} is damaged ({name} = {content.get(name)!r}); resume from another checkpoint"
            )
    return content


def read_header(directory: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint whose weights are to be used: format, step, base, tune; any format has them.

    Raises:
        WeightsError: when it is missing, damaged, or of a format that is still to come.
    """
    try:
        content = json.loads((directory / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{directory} is no training checkpoint: {STATE} is missing") from error
    except (ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"{directory}/{STATE} is damaged ({error}); resume from another checkpoint") from error
    if not isinstance(content, dict) or content.get("format") not in range(1, FORMAT + 1):
        raise WeightsError(f"{directory} has another checkpoint format; this version reads format {FORMAT}")
    for name in ("step", "base", "finetune"):
        if type(content.get(name)) is not KINDS[name]:
            raise WeightsError(
                f"{directory}/{STATE} is damaged ({name} = {content.get(name)!r}); resume from another checkpoint"
            )
    return content


def _of_another_format(directory: Path, content: dict[str, Any]) -> str:
    weights = f"--model {directory}"
    if content["finetune"] == "lora":
        weights = f"--model {content['base']} --adapter {directory} --set train.finetune=lora"
    return (
        f"has checkpoint format {content['format']}, written by an earlier version; this one goes on from format "
        f"{FORMAT}: go on with that version, or begin a new run from its weights, `unigrpo train {weights}`"
    )


def incomplete(directory: Path) -> str | None:
    """What a checkpoint lacks by names and sizes: the file and how, or None. Reads no weight."""
    try:
        content = read_header(directory)
    except WeightsError as error:
        return str(error).removeprefix(str(directory)).lstrip("/ ")
    if content["format"] < FORMAT:  # had neither sums nor sizes
        return None
    files = content.get("files")
    if not (directory / SUMS).is_file() or not isinstance(files, dict):
        return f"{SUMS} is missing: it was not written to the end"
    for name, size in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
    return None


def restore_state(state: TrainState, directory: Path, content: dict[str, Any]) -> None:
    """Put moments, step, facts and generators of a checkpoint into a state whose weights are already its own.

    Raises:
        WeightsError: when they are damaged or of other weights.
    """
    try:
        moments = load_file(directory / MOMENTS)
        words = load_file(directory / GENERATORS)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{directory}: {MOMENTS} or {GENERATORS} is damaged or missing ({error})") from error
    # A weight that never got a gradient has no moments, so the names are kept on their own.
    odd = min({name for name, _ in _named_parameters(state)} ^ set(content["trained"]), default=None)
    if odd is not None:
        raise WeightsError(
            f"{directory}: its optimizer belongs to other weights (e.g. {odd}); resume with the same "
            "train.finetune, train.experts and train.extra_modules"
        )
    for name, parameter in _named_parameters(state):
        own = {k.rsplit("|", 1)[1]: v for k, v in moments.items() if k.rsplit("|", 1)[0] == name}
        if own:
            state.optimizer.state[parameter] = {k: v if k == "step" else own_part(v, parameter) for k, v in own.items()}
    state.step = content["step"]
    state.facts = content["facts"]
    state.generators = Generators(words, content["generators"])


def checkpoints(run: Path) -> list[Path]:
    """What has the name of a checkpoint in a run, oldest first; links, and what a crash left, have others."""
    found = (run / "checkpoints").glob("step_*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run that is complete by names and sizes.

    Raises:
        UsageError: when there is none.
    """
    for path in reversed(checkpoints(run)):
        if incomplete(path) is None:
            return path
    raise UsageError(f"{run} holds no checkpoint; give a directory that `unigrpo train` saved one in")


def prune_checkpoints(run: Path, keep: int, every: int, best: int | None) -> None:
    """Remove all checkpoints but the newest `keep`, those of every `every`-th step (0: none), and the best."""
    for path in checkpoints(run)[:-keep]:
        step = step_of(path)
        if step != best and not (every and step % every == 0):
            shutil.rmtree(path)
