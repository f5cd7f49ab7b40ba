"""Threads: one per reward, with deadlines, and a pool that computes batches at the same time on a CPU.

A reward has a thread of its own, so a call that hangs can be abandoned and a call that waits delays nothing else.
On a CPU each batch has a thread, because operators on small tensors gain next to nothing from threads inside them: two
cores are used best by two batches.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

CLOSE_WAIT_S = 1.0
"""Seconds that closing a worker waits for its thread; a call abandoned by an interrupt may take longer."""

Part = TypeVar("Part")
Result = TypeVar("Result")


class Worker:
    """A single-thread executor whose thread may hang.

    `ThreadPoolExecutor` waits for its threads when Python exits, so one reward that hangs would keep the process alive.
    This thread is a daemon. It is one thread for all calls, because torch starts a new pool for every new thread that
    computes and gives it as many threads as there are cores.
    """

    def __init__(self, name: str):
        self.name = name
        self.hung = False
        torch = sys.modules.get("torch")
        self._set_threads = None if torch is None else partial(_limit_threads, torch.get_num_threads())
        self._calls: queue.Queue[tuple[Future, Callable[[], Any]] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def _run(self) -> None:
        if self._set_threads is not None:
            self._set_threads()
        while (call := self._calls.get()) is not None:
            future, function = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # a reward may even call sys.exit
                    future.set_exception(error)
            del call, future, function  # else this thread keeps the reward alive until the next call

    def submit(self, function: Callable[[], Any]) -> Future:
        """Queue a call and return at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name=self.name)
            self._thread.start()
        future: Future = Future()
        self._calls.put((future, function))
        return future

    def wait(self, call: Future, timeout_s: float | None) -> BaseException | None:
        """Wait for a call to end. Returns its exception, or None when it has a result.

        Raises:
            TimeoutError: after `timeout_s`; the worker then counts as hung.
        """
        try:
            return call.exception(timeout_s)
        except TimeoutError:
            self.hung = True
            raise

    def cancel_queued(self) -> None:
        with suppress(queue.Empty):
            while True:
                if (call := self._calls.get_nowait()) is not None:
                    call[0].cancel()

    def close(self) -> None:
        """Accept no more calls. The thread ends after those already queued."""
        self._calls.put(None)
        if self._thread is not None and not self.hung:
            self._thread.join(CLOSE_WAIT_S)


def _limit_threads(count: int) -> None:
    """Set torch's threads for the calling thread and for threads that start later."""
    import torch

    torch.get_num_threads()  # a thread's first use sets its number to the latest value set anywhere
    torch.set_num_threads(count)


_sequential = ContextVar("sequential", default=False)


@contextmanager
def sequential() -> Iterator[None]:
    """Compute batches one after another inside: for code that records the calls of a policy."""
    token = _sequential.set(True)
    try:
        yield
    finally:
        _sequential.reset(token)


def worker_count(batches: int, device: torch.device) -> int:
    """How many batches run at the same time: on a CPU one per torch thread, else one."""
    import torch

    return 1 if device.type != "cpu" or _sequential.get() else max(1, min(batches, torch.get_num_threads()))


def parallel_map(function: Callable[[Part], Result], parts: Sequence[Part], workers: int) -> Iterator[Result]:
    """`function` of each part, in their order, `workers` of them at the same time; with 1 in this thread, when asked.

    Torch's threads are divided among the workers, so a result is bitwise the same whatever else runs, for equal
    `workers`. Workers record gradients where the caller does. At most `workers` results wait to be taken. The first
    exception is raised here. Parts that have not started are then dropped, and
    running ones finish first: a process that exits inside a torch operator crashes.
    """
    if workers == 1:
        yield from map(function, parts)
        return
    import torch

    recording = torch.is_grad_enabled()

    def call(part: Part) -> Result:
        with torch.set_grad_enabled(recording):  # threads do not inherit it
            return function(part)

    threads, waiting = torch.get_num_threads(), iter(parts)
    set_threads = partial(_limit_threads, max(1, threads // workers))
    pool = ThreadPoolExecutor(workers, "batches", initializer=set_threads)
    try:
        started = deque(pool.submit(call, part) for part in islice(waiting, workers))
        while started:
            result = started.popleft().result()
            started += [pool.submit(call, part) for part in islice(waiting, 1)]
            yield result
            del result  # else it lives until the next one is there
    finally:
        pool.shutdown(cancel_futures=True)
        _limit_threads(threads)


@contextmanager
def threads_per_worker(workers: int) -> Iterator[None]:
    """Inside, as many torch threads as `parallel_map` gives each worker: rounding can depend on their number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
