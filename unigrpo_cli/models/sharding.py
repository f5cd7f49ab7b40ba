"""Weights of the layers shared out over ranks (FSDP2), and whole again where that is needed.

Each rank keeps an even part of every weight of every layer, of its gradient and of its moments; a layer is gathered
when it is passed and dropped afterwards. Everything outside the layers (embeddings, head, last norms, projections,
the vision tower) stays whole on every rank. A pair is sharded matrix by matrix. Gathered weights are the fp32 masters,
so each number is what one process computes. A pass through a sharded network is a collective: all ranks must make
equally many.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unigrpo_cli.models.mot.layers import widen
from unigrpo_cli.parallel.ranks import is_shared

SHARDED: WeakSet[nn.Module] = WeakSet()
"""Networks whose layers are shared out. A look at every weight would take a twentieth of a small model's step."""


def shard(network: nn.Module, layers: Sequence[nn.Module], world: int) -> None:
    """Share the layers out, one by one; what is trained in them becomes fp32 first, so no layer is whole twice.

    Gradients of several ranks are added, not averaged: the objective divides by the episodes of all ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Keys and values of a text that nothing came before are views. The cache is written in place without gradients
    # only, so the case of this warning cannot happen.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    inside = {p for layer in layers for p in layer.parameters()}
    outside = {p for p in network.parameters() if p not in inside}
    mesh = init_device_mesh(next(network.parameters()).device.type, (world,))
    for layer in layers:
        fp32_masters(layer)
        fully_shard(layer, mesh=mesh)
    kind = type(network)
    fully_shard(network, mesh=mesh, ignored_params=outside)
    modules: list[Any] = [*layers, network]
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else a factor is a kind of sum that gloo does not have
    network.__class__ = kind  # transformers looks up by the class which states a network gives
    SHARDED.add(network)


def fp32_masters(module: nn.Module) -> None:
    """Keep what is trained in fp32."""
    for parameter in module.parameters():
        if parameter.requires_grad and (wide := widen(parameter.data)).dtype != parameter.dtype:
            parameter.data = wide


def is_sharded(network: nn.Module) -> bool:
    return network in SHARDED


def most_passes(network: nn.Module, own: int) -> int:
    """How many passes every rank makes where the network is sharded and this rank needs its own number."""
    if not is_sharded(network):
        return own
    count = torch.tensor(own)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one every rank must ask."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every rank has whole, what this one keeps where it is kept as `like` is."""
    moved = full.to(like.device)
    if not is_shared(like) or full.shape != like.shape:
        return moved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)  # no communication
