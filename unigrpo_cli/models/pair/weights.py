"""Weights of a pair in memory and on disk, in the layouts of diffusers, transformers and PEFT."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models import lora
from unigrpo_cli.models.base_options import PLAIN
from unigrpo_cli.models.files import read_object, refuse_non_finite
from unigrpo_cli.models.hub import first_line
from unigrpo_cli.models.mot.layers import Linear
from unigrpo_cli.models.mot.weights import read_tensors
from unigrpo_cli.models.pair.facts import AUTOENCODER, INDEX, PAINTER, REASONER, SCHEDULER, TARGETS_LM, TOKENIZER
from unigrpo_cli.models.pair.pipeline import Pipeline, read_pipeline
from unigrpo_cli.models.quantized import quantize_layers
from unigrpo_cli.models.sharding import own_part

OPTIONS = "unigrpo.json"
"""The options a pair was trained with; they go with its weights."""


def load_networks(
    pipeline: Pipeline, device: torch.device, dtype: torch.dtype, quantize: str = PLAIN
) -> tuple[nn.Module, nn.Module, Any]:
    """Reasoner and painter in `dtype`, the autoencoder in fp32; frozen.

    Args:
        quantize: how the matrices of the layers are kept: none, int8 or nf4.

    Raises:
        WeightsError: when files are damaged, not finite, or do not fit their configurations.
    """
    import diffusers
    from transformers import AutoModelForCausalLM

    facts = pipeline.facts
    targets = {REASONER: TARGETS_LM, PAINTER: facts.targets}

    def loaded(part: str, kind: Any, dtype: torch.dtype, key: str) -> Any:
        directory = pipeline.networks[part].directory
        options = {key: dtype, "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        if part == REASONER:
            options["ignore_mismatched_sizes"] = True  # they are reported below, in one line
        try:
            with _quiet():
                network, seen = kind.from_pretrained(str(directory), **options)
        except Exception as error:  # the libraries raise of everything
            raise WeightsError(f"{directory}: it cannot be loaded ({first_line(error)})") from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if seen.get(what):
                name = sorted(map(str, seen[what]))[0]
                count = len(seen[what])
                raise WeightsError(f"{directory}: {count} {what.replace('_keys', '')} tensors, e.g. {name}")
        for name, tensor in network.named_parameters():
            refuse_non_finite(tensor, f"{part}.{name}", pipeline.directory)
        if part in targets:
            quantize_layers(network, targets[part], quantize, device)
        return network.to(device).requires_grad_(False).eval()

    return (
        loaded(REASONER, AutoModelForCausalLM, dtype, "dtype"),
        loaded(PAINTER, getattr(diffusers, facts.painter), dtype, "torch_dtype"),
        loaded(AUTOENCODER, getattr(diffusers, facts.autoencoder), torch.float32, "torch_dtype"),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own reports and progress bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def matrices(network: nn.Module, targets: str) -> dict[str, nn.Linear]:
    """The matrices that `targets` matches, by name."""
    pattern = re.compile(targets)
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and pattern.fullmatch(n)}


def make_trainable(network: nn.Module, targets: str) -> None:
    """Give the matrices that `targets` matches gradients, in layers that compute in their input's dtype."""
    for name, module in matrices(network, targets).items():
        network.set_submodule(name, Linear.of(module.weight, module.bias).requires_grad_(True))


# ----- files


def options_of(directory: Path) -> dict[str, Any]:
    """The options that were saved with weights or adapters; none for a directory without them.

    Raises:
        WeightsError: when the file is damaged.
    """
    path = directory / OPTIONS
    return read_object(path) if path.is_file() else {}


def save(networks: nn.ModuleDict, source: Pipeline, options: Mapping[str, Any], directory: Path, base: str) -> None:
    """Adapters of both networks in a PEFT directory each, or the whole pipeline.

    Args:
        source: the pipeline that the networks were loaded from.
        options: those of `options_of`.

    Raises:
        WeightsError: when the files that the model came with cannot be copied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / OPTIONS).write_text(json.dumps(dict(options), indent=1) + "\n")
    parts: Mapping[str, Any] = dict(networks.items())
    if any(lora.adapter_of(network) is not None for network in parts.values()):
        for part, network in parts.items():
            lora.save_adapters(network, directory / part, base)
        return
    for part, network in parts.items():
        state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        with _quiet():
            network.save_pretrained(str(directory / part), state_dict=state)
    try:
        shutil.copyfile(source.directory / INDEX, directory / INDEX)
        for part in (AUTOENCODER, SCHEDULER):
            _copy(source.directory / part, directory / part)
        _copy(source.tokenizer, directory / TOKENIZER, but=(".safetensors", ".bin"))
    except OSError as error:
        raise WeightsError(
            f"the weights are in {directory}, but the other files of {source.directory} cannot be copied there "
            f"({error.strerror or error}); copy them by hand"
        ) from error


def _copy(source: Path, target: Path, but: tuple[str, ...] = ()) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in but:
            shutil.copyfile(path, target / path.name)


def load_adapters(networks: nn.ModuleDict, options: Mapping[str, Any], directory: Path) -> None:
    """Put saved adapters on both networks, strictly.

    Raises:
        WeightsError: when they are missing or damaged, do not fit, or were trained with other options.
    """
    lacking = [part for part in networks if not (directory / part / "adapter_config.json").is_file()]
    if lacking:
        raise WeightsError(f"{directory} is no adapter of a pair: {lacking[0]}/adapter_config.json is missing")
    for key, value in options_of(directory).items():
        if options.get(key, value) != value:
            raise WeightsError(
                f"{directory} was trained with model_options.{key}={value!r}, here it is {options[key]!r}; give --set "
                f"'model_options.{key}={value}'"
            )
    for part, network in networks.items():
        lora.load_adapters(network, directory / part)


def restore(networks: nn.ModuleDict, directory: Path) -> None:
    """Put the weights of a saved pipeline into these networks, each in the dtype it has here.

    Raises:
        WeightsError: when they are damaged or of another model.
    """
    saved = read_pipeline(directory)
    for part, network in networks.items():
        own, tensors = network.state_dict(), saved.networks[part].tensors
        tied = own.keys() - tensors.keys()
        if (tensors.keys() - own.keys()) or any("lm_head" not in name for name in tied):
            raise WeightsError(f"{directory} holds another model than the one that was trained")
        with torch.no_grad():
            for name, tensor in read_tensors(tensors.items()):
                refuse_non_finite(tensor, name, directory)
                if tensor.shape != own[name].shape:
                    raise WeightsError(f"{directory} holds a model of other sizes than the one that was trained")
                own[name].copy_(own_part(tensor, own[name]))
