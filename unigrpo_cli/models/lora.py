"""Low-rank adapters by peft, in its directory format.

peft is imported where adapters are made or read: it takes seconds, and most commands have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.files import read_object, refuse_non_finite, refuse_odd_files
from unigrpo_cli.models.hub import first_line
from unigrpo_cli.models.mot.layers import Linear, widen
from unigrpo_cli.models.policy import Adapter

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
"""What peft puts before the names of a wrapped model's tensors in an adapter file."""


def add_adapters(network: nn.Module, targets: str, rank: int, alpha: float, seed: int) -> None:
    """Put fresh adapters on the layers that `targets` matches (a regular expression); everything else is frozen.

    peft draws their first matrices from torch's global generator, which is seeded here and left as it was.

    Adapters are kept in fp32 whatever the base is, and compute in the dtype of their input: peft makes them in the
    base's dtype, but updates of the sizes used here are lost to bf16's rounding.
    """
    from peft import LoraConfig

    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, bias="none")
    device = next(network.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # by default all cards, with a warning
        torch.manual_seed(seed)
        _inject(network, config)


def _inject(network: nn.Module, config: LoraConfig) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, network)
    for layer in _adapted(network).values():
        layer.cast_input_dtype_enabled = False
        for matrices in (layer.lora_A, layer.lora_B):
            for name, matrix in list(matrices.items()):
                matrices[name] = _kept_wide(matrix)
    network.adapter_config = config
    network.eval()  # an adapter made elsewhere may have dropout, and a ratio of two dropouts is not 1


def _adapted(network: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that have adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _kept_wide(matrix: nn.Linear) -> Linear:
    """The same matrix in fp32 or wider, in a layer that computes in its input's dtype."""
    bias = None if matrix.bias is None else nn.Parameter(widen(matrix.bias.data))
    return Linear.of(nn.Parameter(widen(matrix.weight.data)), bias)


def adapter_of(network: nn.Module) -> Adapter | None:
    config: LoraConfig | None = getattr(network, "adapter_config", None)
    if config is None:
        return None
    layers = _adapted(network).values()
    acts = any(
        layer.scaling[name] and bool(matrix.weight.any()) for layer in layers for name, matrix in layer.lora_B.items()
    )
    return Adapter(config.r, config.lora_alpha, idle=not acts)


def save_adapters(network: nn.Module, directory: Path, base: str) -> None:
    """Write a PEFT adapter directory: `adapter_config.json` and `adapter_model.safetensors`."""
    config: LoraConfig = network.adapter_config
    config.base_model_name_or_path = base
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    state = {PREFIX + name: value.contiguous() for name, value in _own_state(network).items()}
    save_file(state, directory / WEIGHTS)


def _own_state(network: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors by peft's names. Word embeddings never are; asked whether, peft would ask the hub."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(network, save_embedding_layers=False)


def load_adapters(network: nn.Module, directory: Path) -> None:
    """Put the adapters of a PEFT directory on `network`, strictly."""
    from peft import LoraConfig, set_peft_model_state_dict

    refuse_odd_files(directory)
    if not (directory / "adapter_config.json").is_file():
        raise WeightsError(f"{directory} is no adapter: adapter_config.json is missing; give the directory that has it")
    facts = _facts(directory / "adapter_config.json")
    kind = facts.get("peft_type")
    if kind != "LORA":
        raise WeightsError(f"{directory} is an adapter of kind {kind}; this version takes LoRA adapters")
    state = _read_weights(directory)
    _refuse_rank(directory, facts, state)
    for name, tensor in state.items():
        refuse_non_finite(tensor, name, directory)
    network.requires_grad_(False)
    try:
        config = LoraConfig.from_pretrained(str(directory))
        config.init_lora_weights = True  # other ways change the base's weights, or read more files
        _inject(network, config)
        own_names = {name.removeprefix(PREFIX): value for name, value in state.items()}  # peft 0.18 does not do it
        outcome = set_peft_model_state_dict(network, own_names)
        missing = _own_state(network).keys() - own_names.keys()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, re.error) as error:
        why = " ".join(str(error).split("\n")[:2])  # torch names the first tensor in its second line
        raise WeightsError(f"{directory}: the adapter cannot be used here: {type(error).__name__}: {why}") from error
    if outcome.unexpected_keys:
        raise WeightsError(f"{directory}: the adapter does not fit, e.g. {outcome.unexpected_keys[0]}")
    if missing:
        raise WeightsError(f"{directory}: {len(missing)} tensors of the adapter are missing, e.g. {min(missing)}")


def _facts(path: Path) -> dict[str, Any]:
    """An adapter's configuration, without what would name a module to be imported."""
    facts = read_object(path)
    if facts.get("megatron_config") is not None:
        raise WeightsError(f"{path} names a module of megatron, and data files run no code here; leave it out")
    return facts


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    if not path.is_file():
        other = f", and {OLD_WEIGHTS} is of a form that may run code" if (directory / OLD_WEIGHTS).is_file() else ""
        raise WeightsError(f"{directory}: {WEIGHTS} is missing{other}; save the adapter as {WEIGHTS}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is damaged ({first_line(error)}); fetch or save it again") from error


def _refuse_rank(directory: Path, facts: dict[str, Any], state: dict[str, Tensor]) -> None:
    """The rank that is to be allocated must be one that the file has."""
    ranks = {len(value) for name, value in state.items() if name.endswith("lora_A.weight") and value.ndim}
    patterns = facts.get("rank_pattern") or {}
    said = [facts.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    for rank in said:
        if ranks and (type(rank) is not int or rank not in ranks):
            held = " and ".join(map(str, sorted(ranks)))
            raise WeightsError(
                f"{directory}: adapter_config.json says rank {rank!r}, {WEIGHTS} holds rank {held}; they are of "
                "different adapters, fetch or save both again"
            )


@torch.no_grad()
def merge_adapters(network: nn.Module) -> None:
    """Add the adapters to the base's weights and remove them. Weights that change become fp32: see `add_adapters`."""
    for name, layer in _adapted(network).items():
        base = layer.get_base_layer()
        total = widen(base.weight.data)
        for adapter in layer.active_adapters:
            total = total + widen(layer.get_delta_weight(adapter))
        base.weight = nn.Parameter(total, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, base)
    del network.adapter_config


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The network without its adapters, i.e. the base it started from."""
    layers = list(_adapted(network).values())
    assert layers, "a policy without adapters and without a frozen copy has no reference"
    trained = [(p, p.requires_grad) for p in network.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trained:  # peft makes every adapter trainable when it puts them back
            parameter.requires_grad_(flag)
