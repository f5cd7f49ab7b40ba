"""Weights in memory and on disk, tensor by tensor.

Reading goes straight to the device: the host never holds more than the largest tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.base_options import PLAIN
from unigrpo_cli.models.files import refuse_non_finite
from unigrpo_cli.models.mot.bagel import (
    AUTOENCODER,
    COMPANIONS,
    INDEX,
    WEIGHTS,
    Release,
    Stored,
    config_files,
    read_release,
)
from unigrpo_cli.models.mot.config import LATENT_POSITIONS, LORA_TARGETS, VISION_POSITIONS, computes_wide
from unigrpo_cli.models.mot.layers import PositionTable
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.quantized import quantized
from unigrpo_cli.models.sharding import own_part

STORED_AS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def network_weights(
    release: Release, device: torch.device | str, dtype: torch.dtype, quantize: str = PLAIN
) -> dict[str, Tensor]:
    """Every tensor of the network on `device`, in `dtype` or, where it computes in fp32 anyway, in that.

    With `quantize` the matrices of the layers are quantised one by one as they are read.

    Tables that the files lack are made from their formula.
    """
    wanted = ((name, release.tensors[name]) for name in release.wanted)
    wide = torch.promote_types(dtype, torch.float32)
    state: dict[str, Tensor] = {}
    for name, tensor in read_tensors(wanted):
        moved = tensor.to(device)
        refuse_non_finite(moved, name, release.directory)
        kept = moved.to(wide if computes_wide(name) else dtype)  # widened there: the host keeps one copy
        stem, _, last = name.rpartition(".")
        if quantize != PLAIN and last == "weight" and re.fullmatch(LORA_TARGETS, stem):
            state |= {f"{stem}.{part}": own for part, own in quantized(kept, quantize).items()}
        else:
            state[name] = kept
    config = release.config
    sides = {LATENT_POSITIONS: config.max_latent_size}
    if config.vision is not None:
        sides[VISION_POSITIONS] = config.vision.side
    for name in sides.keys() - state.keys():
        table = PositionTable(sides[name], config.hidden_size).pos_embed.detach()
        state[name] = table.to(device=device, dtype=dtype)
    return state


def restore_weights(network: MoT, directory: Path) -> None:
    """Put the weights of a checkpoint into a network of the same sizes, each in the dtype it has there."""
    release = read_release(directory).refuse_problems()
    if release.config != network.config:
        raise WeightsError(f"{directory} holds a model of other sizes than the one that was trained")
    own = network.state_dict()
    with torch.no_grad():
        for name, tensor in read_tensors((name, release.tensors[name]) for name in release.wanted):
            refuse_non_finite(tensor, name, directory)
            own[name].copy_(own_part(tensor, own[name]))


def read_tensors(stored: Iterable[tuple[str, Stored]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they are stored, one at a time and in the order of their files.

    Plain reads and no memory map: a map counts as this process's memory, and dies with a file that changes.
    """
    for name, where in sorted(stored, key=lambda item: (str(item[1].path), item[1].begin)):
        raw = torch.empty(where.end - where.begin, dtype=torch.uint8)
        try:
            with where.path.open("rb") as file:
                file.seek(where.begin)
                count = file.readinto(raw.numpy().data)
        except OSError as error:
            raise WeightsError(f"{where.path} cannot be read ({error.strerror or error})") from error
        if count != len(raw):
            raise WeightsError(f"{where.path}: truncated while it was read; fetch or save it again")
        yield name, raw.view(STORED_AS[where.dtype]).view(where.shape)


def save_model(
    network: MoT,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    origin: Release | None = None,
    system_prompt: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a complete model directory in the release's own names; the official code reads it too.

    For a network without adapters. Without `dtype` a weight is written as its release stored it where that loses
    nothing, else as it is here. Tokenizer, configurations and autoencoder of `origin` are copied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, value in network.state_dict().items():
        stored = dtype or _stored_as(name, value, origin)
        state[name] = value.detach().to("cpu", stored).contiguous()
    save_file(state, directory / WEIGHTS)
    if origin is None:
        tokenizer.save(str(directory / "tokenizer.json"))
        for name, content in config_files(network.config, system_prompt).items():
            (directory / name).write_text(json.dumps(content, indent=2) + "\n")
        return
    try:
        for name in COMPANIONS:
            if (origin.directory / name).is_file():
                shutil.copyfile(origin.directory / name, directory / name)
        if origin.autoencoder is not None:
            shutil.copyfile(origin.directory / AUTOENCODER, directory / AUTOENCODER)
    except OSError as error:
        raise WeightsError(
            f"the weights are in {directory / WEIGHTS}, but the other files of {origin.directory} cannot be copied "
            f"there ({error.strerror or error}); copy them by hand"
        ) from error
    if (origin.directory / INDEX).is_file():
        (directory / INDEX).write_text(json.dumps(_index(state, origin), indent=2) + "\n")


def _stored_as(name: str, value: Tensor, origin: Release | None) -> torch.dtype:
    """The dtype that the release has a tensor in, if the value survives it, else its own."""
    if origin is None or name not in origin.tensors:
        return value.dtype
    stored = STORED_AS[origin.tensors[name].dtype]
    return stored if torch.equal(value.to(stored).to(value.dtype), value) else value.dtype


def _index(state: dict[str, Tensor], origin: Release) -> dict:
    """Which file holds which tensor, as the hub wants it."""
    where = dict.fromkeys(state, WEIGHTS) | dict.fromkeys(origin.autoencoder_tensors, AUTOENCODER)
    size = sum(x.numel() * x.element_size() for x in state.values())
    size += sum(t.end - t.begin for t in origin.autoencoder_tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
