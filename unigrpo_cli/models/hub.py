"""Where a model is: inside the package, in a directory, or on the hub. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from unigrpo_cli.errors import NotFetchedError, WeightsError

EMBEDDED = "embedded"


def embedded_directory() -> Path:
    """Where the embedded model lies inside the installed package."""
    return Path(str(files("unigrpo_cli") / "toy" / "weights" / "model"))


def locate(model: str, patterns: Iterable[str], fetch: bool = True) -> tuple[Path, str | None]:
    """Directory of a model given by name, path or hub id, and the weights file when the path was one.

    Hub ids go through huggingface_hub, with its cache and its environment variables (HF_HOME, HF_HUB_OFFLINE, ...).

    Args:
        patterns: files to fetch of a model on the hub.
        fetch: False looks in the cache only.

    Raises:
        WeightsError: when there is none; NotFetchedError without `fetch`.
    """
    directory = embedded_directory() if model == EMBEDDED else Path(model)
    if os.path.isfile(directory) and directory.suffix == ".safetensors":  # os.path: any name is only not there
        return directory.parent, directory.name
    if os.path.isdir(directory):
        return directory, None
    accepted = "give `embedded`, a model directory, or a hub id such as ByteDance-Seed/BAGEL-7B-MoT"
    if not is_hub_id(model):
        raise WeightsError(f"no model at {model}: {accepted}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), local_files_only=not fetch)), None
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"no directory {model}, and the hub has no such model (or not for you): {accepted}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise (WeightsError if fetch else NotFetchedError)(
            f"no directory {model}, and it cannot be fetched ({first_line(error)}); fetch it where there is a "
            f"network with `hf download {model}`, and give its directory or the same cache"
        ) from error


def is_hub_id(model: str) -> bool:
    """Whether a name has the form ORG/NAME. A path such as ./model or ../model has not."""
    return re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", model) is not None


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
