"""The backward pass of several losses at once: on a CPU in one thread each, added in their order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from unigrpo_cli.models.policy import TrainablePolicy
from unigrpo_cli.parallel.workers import parallel_map, worker_count


def replay_workers(policy: TrainablePolicy, batches: int) -> int:
    """How many micro-batches are replayed at the same time; one where ranks make their passes together."""
    return 1 if policy.is_sharded else worker_count(batches, policy.device)


def backward(losses: Sequence[Tensor], parameters: Sequence[nn.Parameter], workers: int) -> None:
    """Add the gradients of all losses to `.grad`, in the order of the losses, whichever is computed first."""
    if workers == 1:
        for loss in losses:
            loss.backward()
        return
    gradients_of = partial(torch.autograd.grad, inputs=tuple(parameters), allow_unused=True)
    for gradients in parallel_map(gradients_of, losses, workers):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.contiguous()  # as `backward` lays it out: norms add up in that order
            else:
                parameter.grad.add_(gradient)
