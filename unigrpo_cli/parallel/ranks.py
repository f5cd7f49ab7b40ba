"""Several processes that train one policy: which prompts each draws, and what they exchange.

A rank is one process with one device. Each draws, scores and replays whole groups of a step's prompts; what decides the
step (gradients, advantages, refusals, when to stop) is the same on all. `ALONE` is a run of one process: every method
returns what it was given. Numbers travel as tensors and everything else as JSON, so what arrives is data, never code.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unigrpo_cli import errors
from unigrpo_cli.errors import RankError, UnigrpoError, UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

BUCKET = 2**24
"""Numbers per message when gradients are summed: 64 MiB."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Args:
        rank, world: the number of this process, and how many there are.
        local: its number on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    # ----- shares

    def refuse_uneven(self, prompts: int, updates: int) -> None:
        """Groups are never split, neither over ranks nor over updates."""
        step = self.world * updates
        if prompts % step:
            near = [n for n in (prompts // step * step, -(-prompts // step) * step) if n]
            raise UsageError(
                f"train.prompts_per_step={prompts} cannot be divided: {self.world} ranks x "
                f"train.minibatches={updates} must divide it, because groups are never split; give "
                f"{' or '.join(map(str, near))}, or start a number of ranks that divides {prompts // updates}"
            )

    def share(self, items: Sequence[T], parts: int = 1) -> list[T]:
        """This rank's share: from each of `parts` equal stretches of the items, an equal run of neighbours.

        With the updates of a step as `parts`, every update has the same groups for any number of ranks.
        """
        each = len(items) // (parts * self.world)
        starts = [(part * self.world + self.rank) * each for part in range(parts)]
        return [item for at in starts for item in items[at : at + each]]

    def joined(self, shares: Sequence[Sequence[T]], parts: int = 1) -> list[T]:
        """All ranks' shares in the original order: the inverse of `share`, also for several rows per item."""
        each = len(shares[0]) // parts
        return [row for part in range(parts) for own in shares for row in own[part * each : (part + 1) * each]]

    def stretch(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's stretch of items whose number the ranks need not divide; stretches follow each other."""
        return items[len(items) * self.rank // self.world : len(items) * (self.rank + 1) // self.world]

    # ----- exchange

    def gather(self, content: Any) -> list[Any]:
        """The content of every rank, in their order: JSON values, NaN included. Every rank must call this."""
        if self.alone:
            return [content]
        return [json.loads(own.numpy().tobytes()) for own in self._bytes_of_all(_as_bytes(json.dumps(content)))]

    def from_first(self, content: Any) -> Any:
        """The first rank's content; that of the others is ignored."""
        return self.gather(content if self.first else None)[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.alone else any(self.gather(flag))

    def most(self, number: int) -> int:
        """The largest number of any rank."""
        return number if self.alone else max(self.gather(number))

    def to_first(self, data: Tensor) -> list[Tensor]:
        """On the first rank the bytes of all, uint8 [n] each; an empty list on the others."""
        if self.alone:
            return [data]
        sizes = self.gather(len(data))
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        held = [torch.empty_like(padded) for _ in sizes] if self.first else None
        dist.gather(padded, held, dst=0)
        return [own[:size] for own, size in zip(held or [], sizes, strict=False)]

    def wait(self) -> None:
        """Wait until all ranks call this."""
        self.gather(None)

    def _bytes_of_all(self, data: Tensor) -> list[Tensor]:
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        padded = torch.zeros(max(int(s) for s in sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        held = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(held, padded)
        return [own[: int(size)] for own, size in zip(held, sizes, strict=True)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work that each rank does by itself: an error on one is raised on all, as the same class.

        The body must not call collectives: ranks would wait for each other.
        """
        if self.alone:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        content = None if own is None else {"kind": _kind_of(own), "text": describe(own)}
        for rank, found in enumerate(self.gather(content)):
            if found is not None:
                kind = getattr(errors, found["kind"])
                text = found["text"] if found["text"].startswith("rank ") else f"rank {rank}: {found['text']}"
                shared = kind(text)
                shared.everywhere = True
                raise shared from own

    # ----- numbers of a step

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum all ranks' gradients of replicated weights in place; FSDP sums sharded ones.

        A weight with a gradient only on other ranks counts as 0 here; a weight without any gets none.
        """
        if self.alone:
            return
        whole = [p for p in parameters if not is_shared(p)]
        if not whole:
            return
        reached = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32)
        dist.all_reduce(reached, dist.ReduceOp.MAX)
        moved = [p for p, flag in zip(whole, reached.tolist(), strict=True) if flag]
        for p in moved:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets(moved):
            flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
            dist.all_reduce(flat)
            for p, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                assert p.grad is not None
                p.grad.copy_(summed.view_as(p))

    def gradient_norms(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm of each existing gradient, over all ranks' parts of a sharded one: [n], n may be 0."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not any(map(is_shared, gradients)):
            return torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(0)
        own = torch.stack(torch._foreach_norm([local(g) for g in gradients])).double()
        parts = torch.tensor([is_shared(g) for g in gradients], device=own.device)
        squares = torch.where(parts, own.square(), 0.0)
        dist.all_reduce(squares)
        return torch.where(parts, squares.sqrt(), own).float()

    def summed(self, terms: dict[str, float]) -> dict[str, float]:
        """Statistics of an update, where each rank has its part of a mean: their sums; of maxima the largest."""
        return self._reduced(terms, sum)

    def averaged(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of a step: means over ranks; of maxima, seconds and GiB the largest."""
        return self._reduced(metrics, lambda values: sum(values) / len(values))

    def _reduced(self, metrics: dict[str, float], reduce: Callable[[Sequence[float]], float]) -> dict[str, float]:
        if self.alone:
            return metrics
        rows = self.gather(metrics)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _largest_or(reduce, name)([row[name] for row in rows if name in row]) for name in names}


ALONE = Ranks()


def _largest_or(reduce: Callable[[Sequence[float]], float], name: str) -> Callable[[Sequence[float]], float]:
    """The reduction of a metric, by its name. `max` may lose a NaN, so it is looked for."""
    if not ("max" in name.rsplit("/", 1)[-1] or name.startswith(("seconds/", "memory/"))):
        return reduce
    return lambda values: math.nan if any(v != v for v in values) else max(values)


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of neighbours of one device and dtype, up to BUCKET numbers each."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        unlike = bucket and (bucket[0].device, bucket[0].dtype) != (p.device, p.dtype)
        if bucket and (unlike or sum(q.numel() for q in bucket) + p.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def _kind_of(error: Exception) -> str:
    """The nearest class of `errors` in an error's ancestry."""
    known = (name for name in (c.__name__ for c in type(error).__mro__) if hasattr(errors, name))
    return next(known, RankError.__name__)


def is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ranks share a tensor out. Its class takes more than a second to import, and is there once one is made."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; all of another one."""
    return tensor.to_local() if is_shared(tensor) else tensor


def describe(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return text if isinstance(error, UnigrpoError) else f"{type(error).__name__}: {text}"
