"""Files of judges: found in a directory or on the hub, in a form that cannot run code, and never half a model.

Nothing here unpickles. Weights that are published as .pth, .pt or .bin are converted once, by the user, with the
one line that the error prints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from unigrpo_cli import RewardContext
from unigrpo_cli.errors import RewardError

_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:/[\w./+-]+)?")
PICKLED = (".pth", ".pt", ".bin", ".ckpt")
FORMS = (".safetensors", *PICKLED)


def conversion(path: str | Path) -> str:
    """The line to type that turns a pickled state dict (also one under `state_dict`) into .safetensors."""
    to = Path(path).with_suffix(".safetensors").name
    return (
        'python -c "from torch import load; from safetensors.torch import save_file; '
        f"x = load('{path}', map_location='cpu', weights_only=True); "
        f"save_file({{k: v.contiguous() for k, v in x.get('state_dict', x).items()}}, '{to}')\""
    )


def first_line(error: BaseException) -> str:
    """What an error says first; when that ends with a colon, also what it announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text[:300].rstrip(".")


def find_weights(context: RewardContext, reward: str, option: str, given: str) -> Path:
    """The .safetensors file that an option names: a file, a directory with one, `org/repo` or `org/repo/file`.

    Raises:
        RewardError: when there is none, or it is pickled, or there are several.
    """
    path = Path(given).expanduser()
    where = f"reward {reward!r}: {option}={given}"
    if path.is_file():
        return _unpickled(path, where)
    if path.is_dir():
        return _only_file(path, where)
    if not _HUB.fullmatch(given) or (path.suffix in FORMS and given.count("/") < 2):
        raise RewardError(f"{where}: no such file; give a .safetensors file, a directory with one, or a hub id")
    return _only_file(*_fetched(context, given, where))


def _fetched(context: RewardContext, given: str, where: str) -> tuple[Path, str]:
    """What the hub (or its cache) has under `org/repo` or `org/repo/file`."""
    from huggingface_hub import snapshot_download

    repo, name = "/".join(given.split("/")[:2]), "/".join(given.split("/")[2:])
    if name and not name.endswith(".safetensors"):
        raise RewardError(
            f"{where} is not .safetensors, and nothing here unpickles; fetch it with `hf download {repo} {name} "
            f"--local-dir .` and convert it with: {conversion(name)}"
        )
    try:
        found = snapshot_download(repo, allow_patterns=[name or "*.safetensors"], local_files_only=context.offline)
    except Exception as error:  # the hub's own errors, its cache's, and the network's
        raise RewardError(f"{where} {cannot(context, repo, error)}") from error
    if name and not (Path(found) / name).is_file():
        raise RewardError(f"{where}: the repository {repo} has no file {name}")
    return Path(found) / name, where


def cannot(context: RewardContext, name: str, error: BaseException) -> str:
    """The tail of an error about a model that is not to be had."""
    hint = " (HF_HUB_OFFLINE is set)" if context.offline else ""
    return (
        f"cannot be loaded{hint}: {first_line(error)}; it must be a directory, or fetch it where there is a "
        f"network with `hf download {name}` and give its directory"
    )


def _unpickled(path: Path, where: str) -> Path:
    if path.suffix == ".safetensors":
        return path
    raise RewardError(
        f"{where} is not .safetensors, and nothing here unpickles; convert it once with: {conversion(path)}"
    )


def _only_file(path: Path, where: str) -> Path:
    if path.is_file():
        return _unpickled(path, where)
    found = sorted(path.rglob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(f.relative_to(path)) for f in found[:4])
        raise RewardError(f"{where} has {len(found)} .safetensors files ({names}); name one of them")
    pickled = [f for f in sorted(path.rglob("*")) if f.suffix in PICKLED]
    remedy = f"; convert {pickled[0].name} once with: {conversion(pickled[0])}" if pickled else ""
    raise RewardError(f"{where} has no .safetensors file{remedy}")


def load_state(path: Path, where: str) -> dict[str, Any]:
    """Tensors by name.

    Raises:
        RewardError: when the file is broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RewardError(f"{where}: {path.name} cannot be read: {first_line(error)}") from error


def load_transformer(context: RewardContext, reward: str, factory: Any, name: str, dtype: Any) -> Any:
    """A transformers model, in evaluation mode, with every one of its weights from the file.

    Raises:
        RewardError: when it is not to be had, or a part of it would be random.
    """
    try:
        model, found = factory.from_pretrained(
            name, dtype=dtype, use_safetensors=True, local_files_only=context.offline, output_loading_info=True
        )
    except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError of shapes: one line for all
        raise RewardError(f"reward {reward!r}: {name} {cannot(context, name, error)}") from error
    absent = sorted(found["missing_keys"]) + sorted(str(k[0]) for k in found["mismatched_keys"])
    if absent:
        raise RewardError(
            f"reward {reward!r}: {name} lacks {len(absent)} weights of a {type(model).__name__} "
            f"({', '.join(absent[:3])}); they would be random, so it is refused"
        )
    return model.to(context.device).eval()


def load_processing(context: RewardContext, reward: str, name: str) -> Any:
    """The transformers processor that goes with a model: preprocessing of pictures and the tokenizer.

    Raises:
        RewardError: when it is not to be had.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name, local_files_only=context.offline)
    except Exception as error:
        raise RewardError(f"reward {reward!r}: the processor of {name} {cannot(context, name, error)}") from error
