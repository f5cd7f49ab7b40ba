"""A thread for each reward, so that one that hangs can be left behind and one that waits keeps nobody waiting."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass
class Pending:
    """A call that was handed to a lane; `answer` is whether it came back, and its result or its exception."""

    function: Callable[[], Any]
    done: threading.Event = field(default_factory=threading.Event)
    answer: tuple[bool, Any] = (False, None)


class Lane:
    """A thread of its own for a reward's calls, which it makes in the order in which they were handed over.

    One thread for all calls: torch starts a new pool of workers for every new thread that computes, and gives
    it as many as there are cores whatever the main thread was told.
    """

    def __init__(self, name: str):
        self.name = name
        torch = sys.modules.get("torch")
        self._limit = None if torch is None else partial(torch.set_num_threads, torch.get_num_threads())
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
            self._thread = threading.Thread(target=self._work, daemon=True, name=f"reward {self.name}")
            self._thread.start()
        call = Pending(function)
        self._asked.put(call)
        return call

    def close(self) -> None:
        """No more calls: the thread ends when it has made those it was handed."""
        self._asked.put(None)

    def wait(self, call: Pending, timeout_s: float | None) -> tuple[bool, Any]:
        """Whether it came back, and its result or its exception.

        Raises:
            TimeoutError: when it did not come back in time; the lane is then lost.
        """
        if not call.done.wait(timeout_s):
            self.lost = True
            raise TimeoutError
        return call.answer
