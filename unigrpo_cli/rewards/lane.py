"""A thread of its own for each reward, so that one that hangs does not hold the run."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any


class Lane:
    """A thread of its own for a reward's calls, so that one that hangs can be left behind.

    One thread for all calls: torch starts a new pool of workers for every new thread that computes, and gives
    it as many as there are cores whatever the main thread was told.
    """

    def __init__(self, name: str):
        self.name = name
        torch = sys.modules.get("torch")
        self._limit = None if torch is None else partial(torch.set_num_threads, torch.get_num_threads())
        self._asked: queue.Queue[Callable[[], Any]] = queue.Queue()
        self._answers: queue.Queue[tuple[bool, Any]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self.lost = False

    def _work(self) -> None:
        if self._limit is not None:
            self._limit()
        while True:
            function = self._asked.get()
            try:
                self._answers.put((True, function()))
            except BaseException as error:  # a reward may even call sys.exit
                self._answers.put((False, error))

    def call(self, function: Callable[[], Any], timeout_s: float | None) -> tuple[bool, Any]:
        """Whether it came back, and its result or its exception.

        Raises:
            TimeoutError: when it did not come back in time; the lane is then lost.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name=f"reward {self.name}")
            self._thread.start()
        self._asked.put(function)
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.lost = True
            raise TimeoutError from None
