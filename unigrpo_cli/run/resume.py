"""Where a run goes on: which run is meant, which of its checkpoints is whole, and what has changed since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.errors import UsageError, WeightsError
from unigrpo_cli.io.atomic import damage, quarantine
from unigrpo_cli.rewards.loaded import RewardIdentity
from unigrpo_cli.run.config_diff import Change, Effect, changes, flat
from unigrpo_cli.run.directory import is_begun, nothing_in
from unigrpo_cli.run.memory import left_open
from unigrpo_cli.training.state import (
    FORMAT,
    STATE,
    Origin,
    checkpoints,
    incomplete,
    newest_checkpoint,
    read_header,
    step_of,
)

Say = Callable[[str], None]


def run_to_resume(resume: str, out: Path | None) -> tuple[Path, Path | None]:
    """The run behind `--resume`, and the checkpoint of it that is asked for; None takes the newest whole one.

    The run may be still to be begun: with `auto`, when `--out` is missing or empty.

    Raises:
        UsageError: when there is no such thing, or `--out` is another run.
    """
    if resume == "auto":
        return (_newest_run() if out is None else _run_or_place_for_one(out)), None
    path = Path(resume)
    if (path / STATE).is_file() or path.parent.name == "checkpoints":
        path = path.resolve()
        run, checkpoint = path.parent.parent, path
        if not path.is_dir():
            raise UsageError(f"--resume {resume}: no such checkpoint; give the run, {run}, for its newest")
    else:
        run, checkpoint = path, None
        if not run.is_dir():
            raise UsageError(f"--resume {resume}: no such checkpoint or run")
        if not is_begun(run) and not checkpoints(run):
            raise UsageError(
                f"--resume {resume}: {run} holds no checkpoint and no config.toml of a run; give a directory that "
                "`unigrpo train` wrote"
            )
    if not (run / "config.toml").is_file():
        raise UsageError(
            f"--resume {resume}: no configuration file {run / 'config.toml'}; put it back (its settings stand in "
            f"{STATE} of a checkpoint)"
        )
    if out is not None and out.resolve() != run.resolve():
        raise UsageError(f"--resume goes on in {run}; leave out --out {out}")
    return run, checkpoint


def _newest_run() -> Path:
    """The run that was begun or gone on with last, be it killed before its first checkpoint."""
    runs = [path for path in Path("runs").glob("*") if path.is_dir() and is_begun(path)]
    if not runs:
        raise UsageError("--resume auto: no run below ./runs; give --out DIR or --resume PATH")
    return max(runs, key=lambda run: max(p.stat().st_mtime for p in (run / "config.toml", *run.glob("checkpoints"))))


def _run_or_place_for_one(out: Path) -> Path:
    if out.is_dir() and not nothing_in(out) and not is_begun(out):
        raise UsageError(f"--resume auto: {out} holds other things than a run; choose another --out")
    return out


def choose_checkpoint(run: Path, wanted: Path | None, warn: Say) -> Path | None:
    """The checkpoint to go on from, every byte of it checked; None for a run that was cut short before its first.

    Raises:
        WeightsError: when the wanted one is damaged, all are, or it is of another format.
    """
    if wanted is not None:
        wrong = _wrong(wanted)
        if wrong is not None:
            earlier = [p for p in checkpoints(run) if p != wanted and step_of(p) < _step_or_none(wanted)]
            good = next((p for p in reversed(earlier) if _wrong(p) is None), None)
            remedy = f"go on from {good}" if good else "no earlier one is whole: begin again with another --out"
            raise WeightsError(f"{wanted} is damaged: {wrong}; {remedy}")
        return wanted
    every = checkpoints(run)
    for path in reversed(every):
        wrong = _wrong(path)
        if wrong is None:
            return path
        warn(f"{path} is damaged: {wrong}; looking for the one before it")
    if every:
        raise WeightsError(
            f"{run} has no checkpoint that is whole ({len(every)} damaged); begin again with another --out"
        )
    return None


def _step_or_none(path: Path) -> int:
    return step_of(path) if path.name[5:].isdigit() else 0


def _wrong(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; nothing with one of another format, which has an error of its own."""
    found = incomplete(checkpoint)
    if found is not None:
        return found
    return damage(checkpoint) if read_header(checkpoint)["format"] == FORMAT else None


def checkpoint_to_plan(run: Path, wanted: Path | None) -> Path | None:
    """The checkpoint that a run would go on from, by names and sizes; None for one that would begin."""
    return wanted or (newest_checkpoint(run) if checkpoints(run) else None)


def quarantine_later(run: Path, checkpoint: Path | None, why: str, warn: Say) -> None:
    """Checkpoints of later steps get names that are no checkpoint's, so that no later resume takes them.

    Args:
        why: "later" for those of another future, "damaged" for those that were passed over.
    """
    step = 0 if checkpoint is None else _step_or_none(checkpoint)
    for path in checkpoints(run):
        if step_of(path) > step:
            warn(f"{path} is set aside as {quarantine(path, why).name}: the run goes on from step {step}")


def with_kept_sizes(content: dict[str, Any] | None, config: Config) -> Config:
    """The configuration with a checkpoint's sizes of batches where it leaves them open: they are found once a run.

    Args:
        content: of the checkpoint; None for a run that begins.
    """
    if content is None:
        return config
    before = flat(content["config"])
    return with_values(config, {key: before[key] for key in left_open(config) if before.get(key)})


def refuse_changes(content: dict[str, Any], checkpoint: Path, config: Config) -> list[Change]:
    """What has changed since a checkpoint was written, where the run can go on with that.

    A model may have another path when it is not at the old one any more; its weights are compared later.

    Raises:
        UsageError: naming a key that cannot change, and what to do.
    """
    found = changes(content["config"], config)
    for change in [c for c in found if c.effect is Effect.REFUSED]:
        if change.key == "model":
            if _is_moved(str(change.old), str(change.new)):
                found.remove(change)
                continue
            raise UsageError(f"--resume goes on with the model it began with, {change.old}; leave out the other")
        remedy = "leave it out" if change.old is None else f"leave it out, or give {change.key}={_typed(change.old)}"
        raise UsageError(
            f"{change}: {remedy}; or begin a new run from the weights, `unigrpo train --model {checkpoint}`"
        )
    return found


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_moved(old: str, new: str) -> bool:
    same = Path(old).absolute() == Path(new).absolute()
    return same or (Path(old).is_absolute() and not Path(old).exists())


def not_comparable(content: dict[str, Any], origin: Origin) -> list[str]:
    """What is not what it was when a checkpoint was written, besides the configuration: a line each."""
    lines = []
    before = content["prompts"]
    if before.get("digest") != origin.prompts.digest:
        lines.append(
            f"the prompts to train on are not what they were ({before.get('count')} then, {origin.prompts.count} "
            "now): their order from here on is another"
        )
    return lines + _other_rewards(content["rewards"], origin.rewards)


def _other_rewards(before: Sequence[dict[str, Any]], now: Sequence[RewardIdentity]) -> list[str]:
    old = {row["alias"]: row for row in before}
    lines = []
    for identity in now:
        row = old.get(identity.alias)
        if row is None:
            lines.append(f"reward {identity.alias!r} is new: earlier steps have no score by it")
            continue
        changed = [
            f"{name} {row.get(name)} -> {value}" for name, value in vars(identity).items() if row.get(name) != value
        ]
        if changed:
            lines.append(
                f"reward {identity.alias!r} is not what it was ({', '.join(changed)}): scores before and after "
                "are not comparable"
            )
    gone = old.keys() - {identity.alias for identity in now}
    return [*lines, *(f"reward {alias!r} is not asked any more" for alias in sorted(gone))]
