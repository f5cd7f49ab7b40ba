"""Weights of the layers shared out over ranks (FSDP2), and whole again where that is needed.

Each rank keeps an even part of every weight of every layer, of its gradient and of its moments; a layer is gathered
when it is passed and dropped afterwards. Everything outside the layers (embeddings, head, last norms, projections,
the vision tower) stays whole on every rank. Gathered weights are the fp32 masters, so each number is what one
process computes. A pass through a sharded network is a collective: all ranks must make equally many.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unigrpo_cli.models.mot.config import LAYERS
from unigrpo_cli.models.mot.layers import widen
from unigrpo_cli.models.mot.network import MoT
from unigrpo_cli.models.mot.policy import MoTPolicy


def shard(network: MoT, world: int) -> None:
    """Share the layers out, layer by layer; what is trained in them becomes fp32 first, so no layer is whole twice.

    Gradients of several ranks are added, not averaged: the objective divides by the episodes of all ranks.
    """
    # Keys and values of a text that nothing came before are views. The cache is written in place without gradients
    # only, so what this warning is about cannot happen.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(network.device.type, (world,))
    layers = network.language_model.model.layers
    for layer in layers:
        fp32_masters(layer)
        fully_shard(layer, mesh=mesh)
    outside = {p for name, p in network.named_parameters() if not name.startswith(LAYERS)}
    fully_shard(network, mesh=mesh, ignored_params=outside)
    for module in (*layers, network):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else a factor is a kind of sum that gloo does not have


def fp32_masters(module: nn.Module) -> None:
    """Keep what is trained in fp32."""
    for parameter in module.parameters():
        if parameter.requires_grad and (wide := widen(parameter.data)).dtype != parameter.dtype:
            parameter.data = wide


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in network.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every rank has whole, what this one keeps where it is kept as `like` is."""
    moved = full.to(like.device)
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)  # asks nobody


def gathered_on_host(policy: MoTPolicy, keep: bool) -> MoTPolicy:
    """The policy with whole weights in host memory, to be saved; of one that is not sharded, itself.

    Args:
        keep: False on ranks that only take part: their weights come to nothing.
    """
    network = policy.network
    if not is_sharded(network):
        return policy
    with torch.device("meta"):
        copy = MoT(network.config, network.boundary_ids)
    state = {}
    for name, value in network.state_dict().items():
        full = whole(value.detach())
        if keep:
            state[name] = full.cpu()
    copy.load_state_dict(state, strict=keep, assign=True)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(name in trained)
    return replace(policy, network=copy.train(False), frozen=None)


@contextmanager
def gathered(policy: MoTPolicy) -> Iterator[MoTPolicy]:
    """The policy with whole weights, to sample with: no pass waits for other ranks, whatever each one writes.

    A copy in the dtypes that the layers compute in, so it says what the sharded one would; gone afterwards. A
    policy that is not sharded is given as it is.
    """
    network = policy.network
    if not is_sharded(network):
        yield policy
        return
    with torch.device("meta"):
        copy = MoT(network.config, network.boundary_ids)
    state = {}
    for name, value in network.state_dict().items():
        value = value.detach()
        if name.startswith(LAYERS) and value.ndim == 2:  # a matrix is cast where it is used, a norm's weight is not
            value = value.to(network.dtype)
        state[name] = whole(value)
    copy.load_state_dict(state, strict=True, assign=True)
    yield replace(policy, network=copy.train(False).requires_grad_(False), frozen=None)
