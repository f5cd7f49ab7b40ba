"""Several processes that train one policy: who draws what, and what they tell each other.

A rank is one process with one device. Each draws, judges and replays whole groups of a step's prompts; what decides
the step (gradients, advantages, refusals, when to stop) is the same on all. `ALONE` is a run of one process: every
method gives back what it was given, and nothing is started.

`joined` is the way in and out: it meets the other ranks, watches over them, and sees to it that all end when one
does. Numbers travel as tensors and words as JSON: what arrives is data, never code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group is there: its functions keep, as defaults, the one they find
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from unigrpo_cli import errors
from unigrpo_cli.errors import EndedElsewhereError, RankError, UnigrpoError, UsageError
from unigrpo_cli.parallel.heartbeat import Heartbeat, launched
from unigrpo_cli.parallel.workers import Worker

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits in a collective for one that is alive; a reward may take that long to set up."""
BUCKET = 2**24
"""Numbers that are sent at once when gradients are added, 64 MiB of them."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Args:
        rank, world: which of how many.
        local: which on this machine; it has the device of that number.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to people."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    # ----- who draws what

    def refuse_uneven(self, prompts: int, updates: int) -> None:
        """Groups are never split, over ranks no more than over updates.

        Raises:
            UsageError: naming the counts that would do.
        """
        step = self.world * updates
        if prompts % step:
            near = [n for n in (prompts // step * step, -(-prompts // step) * step) if n]
            raise UsageError(
                f"train.prompts_per_step={prompts} cannot be shared out: {self.world} ranks x "
                f"train.minibatches={updates} must divide it, for groups are never split; give "
                f"{' or '.join(map(str, near))}, or start a number of ranks that divides {prompts // updates}"
            )

    def share(self, items: Sequence[T], parts: int = 1) -> list[T]:
        """This rank's own of items: an even run of neighbours from each of `parts` even runs.

        With `parts` the updates of a step, every update has the same groups whatever the number of ranks.
        """
        each = len(items) // (parts * self.world)
        starts = [(part * self.world + self.rank) * each for part in range(parts)]
        return [item for at in starts for item in items[at : at + each]]

    def joined(self, shares: Sequence[Sequence[T]], parts: int = 1) -> list[T]:
        """All ranks' shares in the order of the whole: the inverse of `share`, also of rows per item."""
        each = len(shares[0]) // parts
        return [row for part in range(parts) for own in shares for row in own[part * each : (part + 1) * each]]

    def stretch(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's own of items that need not be even: stretches one after the other, joined by adding up."""
        return items[len(items) * self.rank // self.world : len(items) * (self.rank + 1) // self.world]

    # ----- what they tell each other

    def gather(self, content: Any) -> list[Any]:
        """What each rank has to say, in their order; JSON values, NaN included. Every rank must call this."""
        if self.alone:
            return [content]
        return [json.loads(own.numpy().tobytes()) for own in self._bytes_of_all(_as_bytes(json.dumps(content)))]

    def from_first(self, content: Any) -> Any:
        """What the first rank says; what others give is not looked at."""
        return self.gather(content if self.first else None)[0]

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return flag if self.alone else any(self.gather(flag))

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return number if self.alone else max(self.gather(number))

    def to_first(self, data: Tensor) -> list[Tensor]:
        """Bytes of all ranks, uint8 [n] each, on the first; nothing on the others."""
        if self.alone:
            return [data]
        sizes = self.gather(len(data))
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        held = [torch.empty_like(padded) for _ in sizes] if self.first else None
        dist.gather(padded, held, dst=0)
        return [own[:size] for own, size in zip(held or [], sizes, strict=False)]

    def wait(self) -> None:
        """Until all ranks are here."""
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
        """Around what each rank does by itself: when it fails on one it fails on all, as the same kind of error.

        What is in it must not wait for other ranks, or they would wait for each other.

        Raises:
            UnigrpoError: what went wrong on the first rank that it went wrong on, with its number.
        """
        if self.alone:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        told = None if own is None else {"kind": _kind_of(own), "text": said(own)}
        for rank, found in enumerate(self.gather(told)):
            if found is not None:
                kind = getattr(errors, found["kind"])
                text = found["text"] if found["text"].startswith("rank ") else f"rank {rank}: {found['text']}"
                shared = kind(text)
                shared.everywhere = True
                raise shared from own

    # ----- numbers of a step

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up all ranks' gradients of replicated weights, in place; sharded ones are summed as they arise.

        A weight without a gradient here that has one elsewhere counts as 0 here; without one anywhere it gets none.
        """
        if self.alone:
            return
        whole = [p for p in parameters if not isinstance(p, DTensor)]
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
        """Norm of each gradient that there is, all ranks' parts of a sharded one together: [n], n may be 0."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not any(isinstance(g, DTensor) for g in gradients):
            return torch.stack([g.norm() for g in gradients]) if gradients else torch.zeros(0)
        own = torch.stack([local(g).norm().double() for g in gradients])
        parts = torch.tensor([isinstance(g, DTensor) for g in gradients], device=own.device)
        squares = torch.where(parts, own.square(), 0.0)
        dist.all_reduce(squares)
        return torch.where(parts, squares.sqrt(), own).float()

    def clip_gradients(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Scale gradients to a norm of at most `limit`, over all weights and ranks; gives the norm before."""
        norms = self.gradient_norms(parameters)
        if not len(norms):
            return 0.0
        total = norms.norm()
        factor = torch.clamp(limit / (total + 1e-6), max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor.to(parameter.grad.device))
        return total.item()

    def summed(self, terms: dict[str, float]) -> dict[str, float]:
        """Statistics of an update, each rank's a share of a mean over all: sums, and maxima of maxima."""
        return self._reduced(terms, sum)

    def averaged(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of a step: means over ranks of equally many episodes; of maxima, seconds and GiB the most."""
        return self._reduced(metrics, lambda values: sum(values) / len(values))

    def _reduced(self, metrics: dict[str, float], reduce: Callable[[Sequence[float]], float]) -> dict[str, float]:
        if self.alone:
            return metrics
        rows = self.gather(metrics)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _largest_or(reduce, name)([row[name] for row in rows if name in row]) for name in names}


ALONE = Ranks()


def _largest_or(reduce: Callable[[Sequence[float]], float], name: str) -> Callable[[Sequence[float]], float]:
    """How values of that name become one. The largest is NaN where there is one, which `max` may lose."""
    if not ("max" in name.rsplit("/", 1)[-1] or name.startswith(("seconds/", "memory/"))):
        return reduce
    return lambda values: math.nan if any(v != v for v in values) else max(values)


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one device and dtype, up to BUCKET numbers together."""
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
    """The nearest class of `errors` that an error is of."""
    known = (name for name in (c.__name__ for c in type(error).__mro__) if hasattr(errors, name))
    return next(known, RankError.__name__)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def said(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return text if isinstance(error, UnigrpoError) else f"{type(error).__name__}: {text}"


# ----- the way in and out


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other ranks and stay with them until left; `ALONE` when one process was launched.

    However one rank ends, all do: one that fails says so and the others stop, one that is killed is missed. One
    line says which rank and why, whoever is the first to say it.

    Raises:
        EndedElsewhereError: when another rank has said why this one ends, too.
        RankError: in place of what went wrong on this rank alone, with its number.
        UsageError: when the others cannot be met.
    """
    rank, world, here = launched()
    if world == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(here % torch.cuda.device_count())
    try:
        meeting = Worker("meeting")  # waits outside Python, where no signal would reach the main thread
        peers: Heartbeat = meeting.submit(partial(_meet, rank, world)).result()
        meeting.close()
    except (ValueError, RuntimeError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UsageError(
            f"rank {rank} cannot meet the other {world - 1} at {address} ({said(error)}); start all of them with "
            "`accelerate launch` or torchrun, with the same address and a free port"
        ) from error
    ranks = Ranks(rank, world, here)
    with peers.watched():
        try:
            yield ranks
            ranks.wait()
            peers.part()
        except BaseException as error:
            _leave(error, ranks, peers)
            raise
    dist.destroy_process_group()


def _meet(rank: int, world: int) -> Heartbeat:
    """Wait for all ranks at the place that the launcher names, and make their group."""
    store = next(rendezvous("env://", timeout=PATIENCE))[0]
    # The watch has a connection of its own: one that is used by two threads lets each wait for the other.
    peers = Heartbeat(store.clone(), rank, world)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=PATIENCE)
    return peers


def _leave(error: BaseException, ranks: Ranks, peers: Heartbeat) -> None:
    """End with an error that all ranks know, or tell them, or find out whose end this one comes from.

    Raises:
        EndedElsewhereError: when another rank has told the user.
        RankError: in place of an error of this rank alone, or the echo of another rank's end.
    """
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    text, gone, known = f"rank {ranks.rank}: {said(error)}", None, getattr(error, "everywhere", False)
    if known:
        ranks.wait()  # a launcher that sees one exit ends the others, which may still be saving
        text = ""
    elif _is_of_the_network(error) and (gone := peers.wait_for_an_end()) is not None:
        text, code = gone.text, gone.code
    tells = peers.may_tell()
    if known:
        peers.part()
    elif gone is None:
        peers.report(text, code, told=True)
        peers.be_heard()
    if not tells:
        raise EndedElsewhereError(code) from error
    if text and not isinstance(error, KeyboardInterrupt):
        shown = RankError(text)
        shown.exit_code = code
        raise shown from error


def _is_of_the_network(error: BaseException) -> bool:
    """Whether a collective failed, most likely because somebody is not there any more."""
    words = ("gloo", "NCCL", "Connection", "Broken pipe", "Timed out")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )
