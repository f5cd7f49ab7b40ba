"""Join the other processes of a run, and leave them: when one rank ends, all do."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its functions keep the group they find as a default
from torch.distributed.rendezvous import rendezvous

from unigrpo_cli.errors import EndedElsewhereError, RankError, UsageError
from unigrpo_cli.parallel.heartbeat import Heartbeat
from unigrpo_cli.parallel.launch import address, launched
from unigrpo_cli.parallel.ranks import ALONE, Ranks, describe
from unigrpo_cli.parallel.workers import Worker

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits in a collective for one that is alive; setting up a reward may take that long."""
JOIN_TIMEOUT = 300.0
"""Seconds that a rank waits for the others to start; UNIGRPO_JOIN_TIMEOUT changes it."""
SAY_AFTER = 2.0
"""Seconds of waiting after which it is said, or half of a shorter limit."""


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the other ranks; `ALONE` when one process was launched.

    When one rank fails, it says so and the others stop; one that is killed is missed. One line says which rank and
    why, whichever rank prints it.

    Raises:
        EndedElsewhereError: when another rank has printed the reason.
        RankError: in place of an error on this rank alone, with its number.
        UsageError: when the others do not come, or share a GPU.
    """
    rank, world, local = launched()
    if world == 1:
        yield ALONE
        return
    host, port = address()
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu_index(local, torch.cuda.device_count()) % torch.cuda.device_count())
    try:
        heartbeat = _meet_or_give_up(rank, world, host, port)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"rank {rank} cannot meet the other {world - 1} at {host}:{port} ({describe(error)}); start all of them "
            "with `accelerate launch` or torchrun, with the same address and a free port"
        ) from error
    ranks = Ranks(rank, world, local)
    with heartbeat.watched():
        try:
            if torch.cuda.is_available():
                _note_shared_gpus(ranks)
            # How many batches a CPU computes at once, and with it the number of collectives, depends on the threads.
            torch.set_num_threads(min(ranks.gather(torch.get_num_threads())))
            yield ranks
            ranks.wait()
            heartbeat.leave()
        except BaseException as error:
            _leave_with(error, ranks, heartbeat)
            raise
    dist.destroy_process_group()


# ----- meet


def _meet_or_give_up(rank: int, world: int, host: str, port: int) -> Heartbeat:
    limit = float(os.environ.get("UNIGRPO_JOIN_TIMEOUT", JOIN_TIMEOUT))
    missing = set(range(world)) - {rank} if rank == 0 else {0}
    worker = Worker("join")  # it waits outside Python, where no signal would reach the main thread
    call = worker.submit(partial(_meet, rank, world, host, port, limit, missing))
    began, said = time.monotonic(), False
    while True:
        try:
            heartbeat: Heartbeat = call.result(timeout=0.2)
            break
        except TimeoutError:
            if call.done():
                raise
        waited, who = time.monotonic() - began, ", ".join(map(str, sorted(missing))) or "the group"
        who = f"rank{'s' if len(missing) > 1 else ''} {who} of {world} at {host}:{port}"
        if waited > min(SAY_AFTER, limit / 2) and not said:
            said = True
            print(f"rank {rank} is waiting for {who}, for up to {limit:g} s", file=sys.stderr, flush=True)
        if waited > limit:
            raise UsageError(
                f"rank {rank} gave up after {limit:g} s of waiting for {who}; start all ranks with `accelerate launch` "
                "or torchrun, with the same address, or give them longer with UNIGRPO_JOIN_TIMEOUT (seconds)"
            )
    worker.close()
    return heartbeat


def _meet(rank: int, world: int, host: str, port: int, limit: float, missing: set[int]) -> Heartbeat:
    """Wait for all ranks, keeping `missing` up to date, and make their group."""
    timeout = timedelta(seconds=limit + 60)  # torch prints a trace when it gives up; this rank does before it
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps the store
        store = next(rendezvous("env://", timeout=timeout))[0]
    else:
        store = dist.TCPStore(host, port, world, rank == 0, timeout, wait_for_workers=False, multi_tenant=True)
    store.set(f"joined {rank}", "1")
    while gone := {other for other in range(world) if not store.check([f"joined {other}"])}:
        missing.clear()
        missing.update(gone)
        time.sleep(0.1)
    missing.clear()
    # The heartbeat has a connection of its own: two threads on one connection wait for each other.
    heartbeat = Heartbeat(store.clone(), rank, world)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store.set_timeout(COLLECTIVE_TIMEOUT)
    group = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)
    return heartbeat


# ----- GPUs

_shared: list[str] = []
"""What `_note_shared_gpus` found; an error only for a run that uses GPUs."""


def gpu_index(local: int, count: int) -> int:
    """The GPU of a rank: the one of its number on its machine, or the only one it sees, as Slurm gives one per task."""
    return 0 if count == 1 else local


def gpu_of_rank(local: int) -> torch.device:
    count = torch.cuda.device_count()
    index = gpu_index(local, count)
    if index >= count or _shared:
        found = _shared[0] if _shared else f"rank {local} of this machine has no GPU"
        raise UsageError(
            f"{found}: it shows {count} GPU{'s' if count != 1 else ''}; start as many processes as it has GPUs, or "
            "give device=cpu"
        )
    return torch.device("cuda", index)


def _note_shared_gpus(ranks: Ranks) -> None:
    index = gpu_index(ranks.local, torch.cuda.device_count())
    own = None
    if index < torch.cuda.device_count():
        uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", index))
        own = [socket.gethostname(), uuid, os.environ.get("CUDA_VISIBLE_DEVICES"), index]
    same = [rank for rank, other in enumerate(ranks.gather(own)) if share_gpu(own, other)]
    _shared[:] = [f"ranks {', '.join(map(str, same))} share one GPU of this machine"] if len(same) > 1 else []


def share_gpu(one: list | None, other: list | None) -> bool:
    """Whether two ranks use one GPU; each is [host, uuid, CUDA_VISIBLE_DEVICES, index], or None without a GPU.

    Of the same visible devices, those of different index are different ones, whatever uuid a driver gives them.
    """
    if one is None or other is None or one[:2] != other[:2]:
        return False
    return one[2] != other[2] or one[3] == other[3]


# ----- leave


def _leave_with(error: BaseException, ranks: Ranks, heartbeat: Heartbeat) -> None:
    """End with an error that all ranks have, or tell them, or find out which rank's end caused this one.

    Raises:
        EndedElsewhereError: when another rank has told the user.
        RankError: in place of an error of this rank alone, or the consequence of another rank's end.
    """
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    text, end, everywhere = f"rank {ranks.rank}: {describe(error)}", None, getattr(error, "everywhere", False)
    if everywhere:
        ranks.wait()  # a launcher that sees one exit ends the others, which may still be saving
        text = ""
    elif _is_of_the_network(error) and (end := heartbeat.wait_for_an_end()) is not None:
        text, code = end.text, end.code
    tells = heartbeat.may_tell()
    if everywhere:
        heartbeat.leave()
    elif end is None:
        heartbeat.report(text, code, told=True)
        heartbeat.wait_until_read()
    if not tells:
        raise EndedElsewhereError(code) from error
    if text and not isinstance(error, KeyboardInterrupt):
        shown = RankError(text)
        shown.exit_code = code
        raise shown from error


def _is_of_the_network(error: BaseException) -> bool:
    """Whether a collective failed, most likely because another rank is gone."""
    words = ("gloo", "NCCL", "Connection", "Broken pipe", "Timed out")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )
