"""Experiment trackers, through `accelerate.tracking`: metrics, sheets of samples, and the settings of a run.

A tracker is an observer: one that fails is left out from then on, with one warning, and the run continues.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unigrpo_cli.config import Config
from unigrpo_cli.errors import UsageError, one_line
from unigrpo_cli.io.atomic import write_text
from unigrpo_cli.io.json import to_json
from unigrpo_cli.io.secrets import redacted
from unigrpo_cli.run.config_diff import flat
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.directory import Run
from unigrpo_cli.training.rng_state import put_generators, read_generators

PROJECT = "unigrpo"
IDENTITIES = "trackers.json"
"""The name by which each tracker knows the run, so that a resumed run continues there."""
SAMPLES = "samples"


def refuse_missing(config: Config) -> None:
    for name in config.train.report_to:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder ./wandb is found as a package without a file
            raise UsageError(f'--report-to {name}: the package is missing; pip install "unigrpo-cli[{name}]"')


class Trackers:
    """The trackers of a run that work."""

    def __init__(self, warn: Callable[[str], None]):
        self._warn = warn
        self._working: dict[str, Any] = {}

    def start(self, name: str, start: Callable[[], Any]) -> None:
        """Add the tracker that `start` gives."""
        with self._watched(name):
            self._working[name] = start()

    def log(self, row: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for name, tracker in list(self._working.items()):
            with self._watched(name):
                tracker.log(numbers, step=row["step"])

    def show(self, sheet: Path, step: int) -> None:
        """A sheet of samples as a picture."""
        for name, tracker in list(self._working.items()):
            with self._watched(name), Image.open(sheet) as picture:
                _log_image(name, tracker, np.asarray(picture.convert("RGB")), sheet, step)

    def finish(self) -> None:
        for name, tracker in list(self._working.items()):
            with self._watched(name):
                tracker.finish()

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # a service that is away must not stop a run
            broken = self._working.pop(name, None)
            with suppress(Exception):
                if broken is not None:
                    broken.finish()
            said = one_line(redacted(f"{type(error).__name__}: {error}"))
            self._warn(f"tracker {name} failed and is left out from here on: {said}")


@contextmanager
def open_trackers(config: Config, files: Run, step: int, display: Display) -> Iterator[Trackers]:
    """The trackers of `train.report_to`; a run that is resumed at `step` continues its own."""
    trackers = Trackers(display.warn)
    known = _identities(files)
    kept = read_generators(), torch.get_num_threads()  # a library that draws or sets threads must not change numbers
    if config.train.report_to:
        from accelerate import PartialState

        PartialState()  # accelerate's messages need it
    for name in config.train.report_to:
        trackers.start(name, partial(_started, name, known, config, files, step, display))
    put_generators(kept[0])
    torch.set_num_threads(kept[1])
    if known:
        write_text(files.directory / IDENTITIES, to_json(known, indent=1) + "\n")
    try:
        yield trackers
    finally:
        trackers.finish()


def _identities(files: Run) -> dict[str, str]:
    """What trackers call this run; empty for a new one."""
    with suppress(OSError, ValueError):
        found = json.loads((files.directory / IDENTITIES).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {str(name): str(identity) for name, identity in found.items()}
    return {}


def _started(name: str, known: dict[str, str], config: Config, files: Run, step: int, display: Display) -> Any:
    """A tracker that has begun its run, or continues it; its identity is added to `known`."""
    directory, is_new = files.directory.absolute(), name not in known
    identity = known.get(name, uuid.uuid4().hex[:8])
    tracker = _STARTS[name](identity, is_new, directory, step, display)
    tracker.main_process_only = False  # it is on the first rank alone, and accelerate's state would be set up for it
    tracker.start()
    known[name] = tracker.tracker.info.run_id if name == "mlflow" else identity
    if is_new:
        settings = flat(config.model_dump(mode="json"))
        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in settings.items()}
        tracker.store_init_configuration({key: redacted(v) if isinstance(v, str) else v for key, v in plain.items()})
    return tracker


def _tensorboard(identity: str, is_new: bool, directory: Path, step: int, display: Display) -> Any:
    from accelerate.tracking import TensorBoardTracker

    purge = None if is_new else step + 1  # steps after the checkpoint are made again
    return TensorBoardTracker("tensorboard", logging_dir=directory, purge_step=purge)


def _wandb(identity: str, is_new: bool, directory: Path, step: int, display: Display) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    mode = None
    if not os.environ.get("WANDB_MODE") and wandb.api.api_key is None:  # asking for a key would wait for an answer
        mode = "offline"
        display.say(f"wandb: no key, so the run is kept in {directory / 'wandb'}; `wandb sync` uploads it")
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    quiet = wandb.Settings(console="off", silent=True)
    return WandBTracker(
        project, id=identity, name=directory.name, resume="allow", dir=str(directory), mode=mode, settings=quiet
    )


def _trackio(identity: str, is_new: bool, directory: Path, step: int, display: Display) -> Any:
    from accelerate.tracking import TrackioTracker

    name = f"{directory.name}-{identity}"  # trackio knows a run by its name
    return TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, resume="never" if is_new else "must")


def _mlflow(identity: str, is_new: bool, directory: Path, step: int, display: Display) -> Any:
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(PROJECT, run_id=None if is_new else identity, run_name=directory.name)


_STARTS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def _log_image(name: str, tracker: Any, pixels_HWC: np.ndarray, sheet: Path, step: int) -> None:
    """A picture, by what each tracker has for it."""
    if name == "tensorboard":
        tracker.log_images({SAMPLES: pixels_HWC[None]}, step=step, dataformats="NHWC")
    elif name == "wandb":
        tracker.log_images({SAMPLES: [pixels_HWC]}, step=step)
    elif name == "trackio":
        from trackio import Image as TrackioImage

        tracker.log({SAMPLES: TrackioImage(pixels_HWC)}, step=step)
    else:
        tracker.log_artifact(str(sheet), SAMPLES)
