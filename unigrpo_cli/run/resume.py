"""Resuming: which run, which of its checkpoints, and what has changed since it was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unigrpo_cli.config import Config, with_values
from unigrpo_cli.errors import UsageError, WeightsError, quoted
from unigrpo_cli.io.atomic import quarantine, verify_checksums
from unigrpo_cli.rewards.loaded import RewardIdentity
from unigrpo_cli.run.checkpoint import (
    STATE,
    StateFile,
    checkpoints,
    missing_part,
    newest_checkpoint,
    read_state,
    step_of,
)
from unigrpo_cli.run.config_diff import Change, Effect, changes, flat
from unigrpo_cli.run.directory import is_begun, nothing_in
from unigrpo_cli.run.memory import left_open
from unigrpo_cli.training.state import Origin

Say = Callable[[str], None]


def run_to_resume(resume: str, out: Path | None) -> tuple[Path, Path | None]:
    """The run that `--resume` names, and the checkpoint it names; None for the newest complete one.

    With `auto` the run may still have to be started, when `--out` is missing or empty.
    """
    if resume == "auto":
        return (_newest_run() if out is None else _run_or_empty(out)), None
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
            f"--resume {resume}: {run / 'config.toml'} is missing; restore it (its settings are in {STATE} of a "
            "checkpoint)"
        )
    if out is not None and out.resolve() != run.resolve():
        raise UsageError(f"--resume continues in {run}; leave out --out {out}")
    return run, checkpoint


def _newest_run() -> Path:
    """The run that was started or resumed last, even if it was killed before its first checkpoint."""
    runs = [path for path in Path("runs").glob("*") if path.is_dir() and is_begun(path)]
    if not runs:
        raise UsageError("--resume auto: no run below ./runs; give --out DIR or --resume PATH")
    return max(runs, key=lambda run: max(p.stat().st_mtime for p in (run / "config.toml", *run.glob("checkpoints"))))


def _run_or_empty(out: Path) -> Path:
    if out.is_dir() and not nothing_in(out) and not is_begun(out):
        raise UsageError(f"--resume auto: {out} holds files that are not a run's; choose another --out")
    return out


def choose_checkpoint(run: Path, wanted: Path | None, warn: Say) -> Path | None:
    """The checkpoint to resume from, with every byte verified; None for a run killed before its first."""
    if wanted is not None:
        wrong = _damage(wanted)
        if wrong is not None:
            earlier = [p for p in checkpoints(run) if p != wanted and step_of(p) < step_of(wanted)]
            good = next((p for p in reversed(earlier) if _damage(p) is None), None)
            remedy = f"resume from {good}" if good else "no earlier one is intact: start again with another --out"
            raise WeightsError(f"{wanted} is damaged: {wrong}; {remedy}")
        return wanted
    every = checkpoints(run)
    for path in reversed(every):
        wrong = _damage(path)
        if wrong is None:
            return path
        warn(f"{path} is damaged: {wrong}; trying the one before it")
    if every:
        raise WeightsError(f"{run} has no intact checkpoint ({len(every)} damaged); start again with another --out")
    return None


def _damage(checkpoint: Path) -> str | None:
    wrong = missing_part(checkpoint)
    if wrong is not None and "checkpoint format" in wrong:
        read_state(checkpoint)
    return wrong or verify_checksums(checkpoint)


def checkpoint_to_plan(run: Path, wanted: Path | None) -> Path | None:
    """The checkpoint that a run would resume from, by names and sizes; None for one that would start."""
    return wanted or (newest_checkpoint(run) if checkpoints(run) else None)


def quarantine_later(run: Path, checkpoint: Path | None, why: str, warn: Say) -> None:
    """Rename checkpoints of later steps, so that no later resume takes them.

    Args:
        why: "later" for steps that will be repeated, "damaged" for checkpoints that were skipped.
    """
    step = 0 if checkpoint is None else step_of(checkpoint)
    for path in checkpoints(run):
        if step_of(path) > step:
            warn(f"{path} is renamed to {quarantine(path, why).name}: the run resumes from step {step}")


def with_kept_sizes(content: StateFile | None, config: Config) -> Config:
    """The configuration with a checkpoint's batch sizes where it leaves them open: they are chosen once per run."""
    if content is None:
        return config
    before = flat(content.config)
    return with_values(config, {key: before[key] for key in left_open(config) if before.get(key)})


def refuse_changes(content: StateFile, checkpoint: Path, config: Config) -> list[Change]:
    """What has changed since a checkpoint was written, where the run can continue with it.

    A model may have another path when the old one is gone; its weights are compared later.
    """
    found = changes(content.config, config)
    for change in [c for c in found if c.effect is Effect.REFUSED]:
        if change.key == "model":
            if _is_moved(str(change.old), str(change.new)):
                found.remove(change)
                continue
            raise UsageError(f"--resume continues with the model the run started from, {change.old}; leave out --model")
        remedy = "leave it out" if change.old is None else f"leave it out, or give {change.key}={_typed(change.old)}"
        raise UsageError(
            f"{change}: {remedy}; or start a new run from the weights, `unigrpo train --model {quoted(checkpoint)}`"
        )
    return found


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_moved(old: str, new: str) -> bool:
    same = Path(old).absolute() == Path(new).absolute()
    return same or (Path(old).is_absolute() and not Path(old).exists())


def not_comparable(content: StateFile, origin: Origin) -> list[str]:
    """What differs from when the checkpoint was written, besides the configuration: one line each."""
    lines = []
    if content.prompts.digest != origin.prompts.digest:
        lines.append(
            f"the training prompts have changed ({content.prompts.count} before, {origin.prompts.count} now): their "
            "order changes from here on"
        )
    return lines + _changed_rewards(content.rewards, origin.rewards)


def _changed_rewards(before: Sequence[RewardIdentity], now: Sequence[RewardIdentity]) -> list[str]:
    old = {identity.alias: identity for identity in before}
    lines = []
    for identity in now:
        if identity.alias not in old:
            lines.append(f"reward {identity.alias!r} is new: earlier steps have no score by it")
            continue
        kept = asdict(old[identity.alias])
        changed = [f"{name} {kept[name]} -> {value}" for name, value in asdict(identity).items() if kept[name] != value]
        if changed:
            lines.append(
                f"reward {identity.alias!r} has changed ({', '.join(changed)}): scores before and after are not "
                "comparable"
            )
    gone = old.keys() - {identity.alias for identity in now}
    return [*lines, *(f"reward {alias!r} is no longer used" for alias in sorted(gone))]
