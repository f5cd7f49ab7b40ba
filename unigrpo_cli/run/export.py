"""A trained model for others: an adapter or whole weights with a model card, without what only resuming needs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from unigrpo_cli.config import Config
from unigrpo_cli.errors import UnigrpoError, UsageError
from unigrpo_cli.io.atomic import SUMS, files_in, new_directory, write_text
from unigrpo_cli.models.hub import first_line
from unigrpo_cli.run.card import CURVES, PICTURES, Trained, card_of, evaluation_of, metrics_until
from unigrpo_cli.run.checkpoint import (
    CARD,
    GENERATORS,
    MOMENTS,
    STATE,
    StateFile,
    missing_part,
    newest_checkpoint,
    read_state,
)
from unigrpo_cli.run.directory import Run
from unigrpo_cli.run.setup import load_policy, refuse_changed

EXPORTED = (
    *(CARD, CURVES, PICTURES, "*.safetensors", "*.safetensors.index.json", "*config.json", "model_index.json"),
    *("unigrpo.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
"""Names of the files that an export has, at its top and in the folders of its networks."""
FOR_RESUMING = {STATE, MOMENTS, GENERATORS, SUMS, CARD}


@dataclass(frozen=True)
class Exported:
    """What an export holds; `kind` as in `card.Trained`."""

    directory: str
    kind: str
    base: str
    step: int
    files: list[str]


def is_run(directory: Path) -> bool:
    return os.path.isdir(directory / "checkpoints") or os.path.isfile(directory / STATE)


def export(
    source: Path,
    out: Path,
    merge: bool,
    base: str | None,
    draw: Callable[[Path, Path, int], object],
    warn: Callable[[str], None],
) -> Exported:
    """Write the model of a run's newest checkpoint, or of a checkpoint, to a new directory.

    Args:
        merge: add an adapter to its base; the changed weights are in fp32, as bf16 would round small updates away.
        base: hub id of the base, where the run started from a copy of it.
        draw: draws the curves of a run to a file, up to a step.
    """
    if not is_run(source):
        raise UsageError(f"{source} is no run and no checkpoint: give a directory that `unigrpo train` wrote")
    checkpoint = newest_checkpoint(source) if os.path.isdir(source / "checkpoints") else source
    content = read_state(checkpoint)
    if (lacking := missing_part(checkpoint)) is not None:
        raise UsageError(f"{checkpoint} is not complete: {lacking}; give another checkpoint of that run")
    refuse_changed(checkpoint)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: choose another --out")
    is_adapter = content.finetune == "lora"
    base = base or content.base
    if is_adapter and not merge and os.path.isabs(base):
        warn(f"the adapter names its base as {base}, which others do not have; give its hub id with --base")
    kind = "adapter" if is_adapter and not merge else "merged" if is_adapter else "weights"
    with new_directory(out, sums=False) as partial:
        if kind == "merged":
            config = Config.model_validate(content.config).model_copy(update={"device": "cpu"})
            load_policy(str(checkpoint), None, config).merged().save(partial, content.base)
        else:
            for name in files_in(checkpoint):
                if name not in FOR_RESUMING:
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(checkpoint / name, partial / name)
        if kind == "adapter":
            for path in partial.rglob("adapter_config.json"):
                _name_base(path, base)
        run = checkpoint.resolve().parent.parent
        if (run / "samples" / "progress.png").is_file() and _newest_samples(run) <= content.step:
            shutil.copyfile(run / "samples" / "progress.png", partial / PICTURES)
        if Run(run).metrics.is_file():
            draw(run, partial / CURVES, content.step)
        write_text(partial / CARD, card_of(_described(content, run, kind, base), partial))
    return Exported(str(out), kind, base, content.step, files_in(out))


def _newest_samples(run: Path) -> int:
    """The last step whose samples `samples/progress.png` shows."""
    names = (path.stem.removeprefix("step_") for path in (run / "samples").glob("step_*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _described(content: StateFile, run: Path, kind: str, base: str) -> Trained:
    """What the card says: the run's files where they are there."""
    files = Run(run)
    summary = files.summary()
    is_last = summary is not None and summary.get("steps") == content.step
    return Trained(
        config=Config.model_validate(content.config),
        base=base,
        kind=kind,
        step=content.step,
        rewards=content.rewards,
        metrics=metrics_until(files, content.step),
        before=evaluation_of(files, "before"),
        after=evaluation_of(files, "after") if is_last else None,
    )


def _name_base(path: Path, base: str) -> None:
    """PEFT finds an adapter's base by this name."""
    facts = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    write_text(path, json.dumps(facts, indent=2, sort_keys=True) + "\n")


def exported(directory: Path) -> list[str]:
    names = files_in(directory)
    if CARD not in names or not any(_is_exported(name) and name.endswith(".safetensors") for name in names):
        raise UsageError(f"{directory} is no run and no exported model: make one with `unigrpo export RUN --out DIR`")
    if unexpected := next((name for name in names if not _is_exported(name)), None):
        raise UsageError(f"{directory / unexpected} is no file of an export: move it elsewhere, then push again")
    return names


def _is_exported(name: str) -> bool:
    *folders, last = name.split("/")
    hidden = any(folder.startswith(".") or folder in ("runs", "checkpoints") for folder in folders)
    return len(folders) <= 1 and not hidden and any(fnmatchcase(last, own) for own in EXPORTED)


def push(directory: Path, repo: str, private: bool) -> str:
    """Upload a directory to a model repository of the hub, which is made where there is none; its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(library_name="unigrpo")
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=directory, commit_message="Upload by unigrpo")
    except HFValidationError as error:
        raise UsageError(f"--repo {repo}: {first_line(error)}; write it as ORG/NAME") from error
    except Exception as error:  # of the hub's client, its transport and the file system
        raise UnigrpoError(
            f"cannot push to {repo} ({first_line(error)}); log in with `hf auth login` as one who may write there"
        ) from error
    return str(url)
