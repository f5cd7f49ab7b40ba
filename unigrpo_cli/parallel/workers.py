"""Threads that are handed calls: for each reward, for the meeting of ranks, for each batch that is beside others.

A reward has a thread of its own, so that one that hangs can be left behind and one that waits keeps nobody
waiting. Batches have one each on a CPU, because operators on small tensors gain next to nothing from the threads
inside them: two cores are used by two batches.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

LAST_CALL_S = 1.0
"""How long a lane that is closed is waited for; a call that an interrupt left behind may take longer."""

Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass
class Pending:
    """A call that was handed to a lane; `answer` is whether it came back, and its result or its exception."""

    function: Callable[[], Any]
    done: threading.Event = field(default_factory=threading.Event)
    answer: tuple[bool, Any] = (False, None)


class Lane:
    """A thread that makes calls in the order in which they were handed over.

    One thread for all calls: torch starts a new pool of workers for every new thread that computes, and gives
    it as many as there are cores whatever the main thread was told.
    """

    def __init__(self, name: str):
        self.name = name
        torch = sys.modules.get("torch")
        self._limit = None if torch is None else partial(_limit_threads, torch.get_num_threads())
        self._asked: queue.Queue[Pending | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self.lost = False

    def _work(self) -> None:
        if self._limit is not None:
            self._limit()
        while True:
            call = self._asked.get()
            if call is None:
                return
            try:
                call.answer = (True, call.function())
            except BaseException as error:  # a reward may even call sys.exit
                call.answer = (False, error)
            call.done.set()
            del call  # or this thread would keep the reward alive until it is asked again

    def submit(self, function: Callable[[], Any]) -> Pending:
        """Hand over a call without waiting for it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name=self.name)
            self._thread.start()
        call = Pending(function)
        self._asked.put(call)
        return call

    def drop(self) -> None:
        """Forget calls that have not begun."""
        with suppress(queue.Empty):
            while True:
                self._asked.get_nowait()

    def close(self) -> None:
        """No more calls: the thread ends when it has made those it was handed; it is waited for, not for long."""
        self._asked.put(None)
        if self._thread is not None and not self.lost:
            self._thread.join(LAST_CALL_S)

    def wait(self, call: Pending, timeout_s: float | None) -> tuple[bool, Any]:
        """Whether it came back, and its result or its exception.

        Raises:
            TimeoutError: when it did not come back in time; the lane is then lost.
        """
        if not call.done.wait(timeout_s):
            self.lost = True
            raise TimeoutError
        return call.answer


def _limit_threads(count: int) -> None:
    """Torch's threads of the thread that calls this, and of threads that are new."""
    import torch

    torch.get_num_threads()  # a thread's first use sets its number to the latest that anyone has asked for
    torch.set_num_threads(count)


_in_turn = ContextVar("in_turn", default=False)


@contextmanager
def in_turn() -> Iterator[None]:
    """Inside, batches are computed one after the other: for who watches what a policy is asked."""
    token = _in_turn.set(True)
    try:
        yield
    finally:
        _in_turn.reset(token)


def at_once(batches: int, device: torch.device) -> int:
    """How many batches are computed at the same time: on a CPU one for each of torch's threads, else one."""
    import torch

    return 1 if device.type != "cpu" or _in_turn.get() else max(1, min(batches, torch.get_num_threads()))


def parallel_map(function: Callable[[Part], Result], parts: Sequence[Part], beside: int) -> Iterator[Result]:
    """`function` of each part, in their order, `beside` of them at the same time; one alone when it is asked for.

    Torch's threads are shared out, so a result is the same to the bit whatever is computed beside it, where as many
    are. At most `beside` results wait to be asked for. The first exception is raised here. However this ends, what
    has not begun is left out, and what runs is waited for: a process that ends amid torch's operators crashes.
    """
    if beside == 1:
        yield from map(function, parts)
        return
    import torch

    threads, todo = torch.get_num_threads(), iter(parts)
    own_threads = partial(_limit_threads, max(1, threads // beside))
    pool = ThreadPoolExecutor(beside, "batches", initializer=own_threads)
    try:
        handed = deque(pool.submit(function, part) for part in islice(todo, beside))
        while handed:
            result = handed.popleft().result()
            handed += [pool.submit(function, part) for part in islice(todo, 1)]
            yield result
            del result  # or it would live until the next is there
    finally:
        pool.shutdown(cancel_futures=True)
        _limit_threads(threads)
