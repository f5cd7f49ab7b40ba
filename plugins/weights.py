"""Weights of reward models: found in a directory or on the hub, complete, and in a format that cannot run code.

Only .safetensors are read. The user converts .pth, .pt and .bin files once, with the line that the error prints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from unigrpo_cli import RewardContext
from unigrpo_cli.errors import RewardError

_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:/[\w./+-]+)?")
CONVERTIBLE = (".pth", ".pt", ".bin", ".ckpt")
FORMATS = (".safetensors", *CONVERTIBLE)
LFS = "{} is a git-lfs pointer, not the weights; run `git lfs pull` where it was cloned, or use `hf download`"
DIRECTORY = "its directory needs config.json, preprocessor_config.json and model.safetensors, as save_pretrained writes"


def conversion(path: str | Path) -> str:
    """The command that converts a .pth state dict, also one under `state_dict`, to .safetensors."""
    to = Path(path).with_suffix(".safetensors").name
    return (
        'python -c "from torch import load; from safetensors.torch import save_file; '
        f"x = load('{path}', map_location='cpu', weights_only=True); "
        f"save_file({{k: v.contiguous() for k, v in x.get('state_dict', x).items()}}, '{to}')\""
    )


def first_line(error: BaseException) -> str:
    """The first line of an error; also the second when the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text[:300].rstrip(".")


def find_weights(context: RewardContext, reward: str, option: str, given: str) -> Path:
    """The .safetensors file of an option: a file, a directory with one, `org/repo` or `org/repo/file`."""
    path = Path(given).expanduser()
    where = f"reward {reward!r}: {option}={given}"
    if path.is_file():
        return _safe(path, where)
    if path.is_dir():
        return _only_file(path, where)
    if not _HUB.fullmatch(given) or (path.suffix in FORMATS and given.count("/") < 2):
        raise RewardError(f"{where}: no such file; give a .safetensors file, a directory with one, or a hub id")
    return _only_file(*_fetched(context, given, where))


def _fetched(context: RewardContext, given: str, where: str) -> tuple[Path, str]:
    """The snapshot of `org/repo`, or the file of `org/repo/file`, from the hub or its cache."""
    from huggingface_hub import snapshot_download

    repo, name = "/".join(given.split("/")[:2]), "/".join(given.split("/")[2:])
    if name and not name.endswith(".safetensors"):
        raise RewardError(
            f"{where} is not .safetensors, and no other format is read; fetch it with `hf download {repo} {name} "
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
    """The end of an error about a model that cannot be loaded."""
    hint = " (HF_HUB_OFFLINE is set)" if context.offline else ""
    if Path(name).expanduser().is_dir():
        pointer = next((f for f in sorted(Path(name).expanduser().glob("*.safetensors")) if is_lfs_pointer(f)), None)
        remedy = LFS.format(pointer.name) if pointer is not None else DIRECTORY
    else:
        remedy = f"give a directory, or fetch it with `hf download {name}` where there is a network"
    return f"cannot be loaded{hint}: {first_line(error)}; {remedy}"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is git-lfs's note about a file in place of the file."""
    with path.open("rb") as file:
        return file.read(48).startswith(b"version https://git-lfs.github.com/")


def _safe(path: Path, where: str) -> Path:
    if path.suffix == ".safetensors":
        if is_lfs_pointer(path):
            raise RewardError(f"{where}: {LFS.format(path.name)}")
        return path
    raise RewardError(
        f"{where} is not .safetensors, and no other format is read; convert it once with: {conversion(path)}"
    )


def _only_file(path: Path, where: str) -> Path:
    if path.is_file():
        return _safe(path, where)
    found = sorted(path.rglob("*.safetensors"))
    if len(found) == 1:
        return _safe(found[0], where)
    if found:
        names = ", ".join(str(f.relative_to(path)) for f in found[:4])
        raise RewardError(f"{where} has {len(found)} .safetensors files ({names}); name one of them")
    others = [f for f in sorted(path.rglob("*")) if f.suffix in CONVERTIBLE]
    remedy = f"; convert {others[0].name} once with: {conversion(others[0])}" if others else ""
    raise RewardError(f"{where} has no .safetensors file{remedy}")


def load_state(path: Path, where: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RewardError(f"{where}: {path.name} cannot be read: {first_line(error)}") from error


def load_transformer(context: RewardContext, reward: str, factory: Any, name: str, dtype: Any, **options: Any) -> Any:
    """A transformers model in evaluation mode, on the context's device, with all of its weights from the file."""
    try:
        model, found = factory.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=context.offline,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError: one line for all
        raise RewardError(f"reward {reward!r}: {name} {cannot(context, name, error)}") from error
    absent = sorted(found["missing_keys"]) + sorted(str(k[0]) for k in found["mismatched_keys"])
    if absent:
        raise RewardError(
            f"reward {reward!r}: {name} lacks {len(absent)} weights of a {type(model).__name__} "
            f"({', '.join(absent[:3])}); they would be random, so it is refused"
        )
    model.to(context.device)
    model.eval()
    return model


def dtype_of(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def load_processing(context: RewardContext, reward: str, name: str) -> Any:
    """The transformers processor of a model: preprocessing of pictures, and the tokenizer."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name, local_files_only=context.offline)
    except Exception as error:
        raise RewardError(f"reward {reward!r}: the processor of {name} {cannot(context, name, error)}") from error
