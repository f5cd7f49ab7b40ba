"""Models on disk, in the layout of BAGEL's release.

A model directory holds `llm_config.json`, `config.json`, `tokenizer.json` and `ema.safetensors`. The embedded
model is such a directory inside the package; a fully fine-tuned checkpoint is one too. Loading is strict on
names and shapes, and reads data only: no file can run code.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.mot import LatentPositions, MoT
from unigrpo_cli.models.sizes import config_files, read_config
from unigrpo_cli.models.unified import PixelCodec, UnifiedModel, edge_ids

EMBEDDED = "embedded"
WEIGHTS = "ema.safetensors"
NOT_FOR_PAINTING = ("vit_model.", "connector.", "vit_pos_embed.")
"""Parts of BAGEL that only image understanding and editing need."""
POSITIONS = "latent_pos_embed.pos_embed"


def embedded_directory() -> Path:
    """Where the embedded model lies inside the installed package."""
    return Path(str(files("unigrpo_cli") / "embedded" / "model"))


def resolve(model: str) -> Path:
    """The directory of a model given by name or path.

    Raises:
        WeightsError: when there is none.
    """
    directory = embedded_directory() if model == EMBEDDED else Path(model)
    if not directory.is_dir():
        raise WeightsError(f"no model at {model}: give `embedded` or a directory with {WEIGHTS} and its configs")
    for name in ("llm_config.json", "config.json", "tokenizer.json", WEIGHTS):
        if not (directory / name).is_file():
            raise WeightsError(f"{directory} is not a complete model: {name} is missing")
    return directory


def load_model(
    model: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> UnifiedModel:
    """Load a policy from a model directory, or the embedded one.

    Raises:
        WeightsError: when files are missing, truncated, or do not fit the configuration.
    """
    directory = resolve(model)
    try:
        config = read_config(directory)
        extra = json.loads((directory / "config.json").read_text())
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{directory}: unreadable configuration ({error!r})") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise WeightsError(f"{directory}/tokenizer.json: {error}") from error
    if config.pixels_per_latent != 1:
        raise WeightsError(
            f"{directory}: this model paints in the latents of an autoencoder (factor "
            f"{config.pixels_per_latent}); this version reads models that paint pixels"
        )
    edges = edge_ids(tokenizer)
    with torch.device("meta"):
        network = MoT(config, edges)
    state = read_weights(directory / WEIGHTS, network, device, dtype)
    network.load_state_dict(state, strict=True, assign=True)
    network.latent_pos_embed.pos_embed.requires_grad_(False)
    return UnifiedModel(network.eval(), tokenizer, PixelCodec(), extra.get("system_prompt", ""))


def read_weights(path: Path, network: MoT, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors for `network` from a safetensors file, checked name by name and shape by shape first.

    The table of latent positions may be absent (it is a formula); where a file has it, the file's is used,
    for BAGEL's is rounded to bf16 and the weights were trained with that.
    """
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            found = {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 - no dict
                if not name.startswith(NOT_FOR_PAINTING)
            }
            if POSITIONS not in found:
                wanted.pop(POSITIONS)
            _audit(path, wanted, found)
            whole = [n for n in wanted if not file.get_slice(n).get_dtype().startswith(("F", "BF"))]
            if whole:
                raise WeightsError(f"{path}: {whole[0]} holds no floating-point numbers")
            state = {name: file.get_tensor(name).to(dtype) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged or truncated ({error}); fetch or save it again") from error
    if POSITIONS not in state:
        config = network.config
        table = LatentPositions(config.max_latent_size, config.hidden_size).pos_embed.detach()
        state[POSITIONS] = table.to(device=device, dtype=dtype)
    return state


def _audit(path: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    misshaped = sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n])
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors missing (e.g. {missing[0]})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected (e.g. {unexpected[0]})")
    if misshaped:
        name = misshaped[0]
        problems.append(
            f"{len(misshaped)} of another shape (e.g. {name}: file {list(found[name])}, "
            f"configuration {list(wanted[name])})"
        )
    if problems:
        raise WeightsError(f"{path} does not fit its configuration: {'; '.join(problems)}")


def save_model(model: UnifiedModel, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model directory that `load_model` reads. For a network without adapters."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = config_files(model.network.config)
    contents["config.json"]["system_prompt"] = model.system_prompt
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    model.tokenizer.save(str(directory / "tokenizer.json"))
    state = {
        name: value.detach().to("cpu", dtype or value.dtype).contiguous()
        for name, value in model.network.state_dict().items()
    }
    save_file(state, directory / WEIGHTS)
