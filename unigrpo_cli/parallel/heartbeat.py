"""A watch over the other processes of a run: a rank that is gone is noticed within half a minute.

The time-outs of torch do not suffice. gloo and NCCL wait in a collective for as long as its time-out allows, which is
30 minutes here because a rank may be setting up a reward; torchrun sees only the processes of its own machine, and
`srun` or a script of one's own sees none. So every rank counts up in the store where they met, from a thread of its
own, each watches the next one's count, and all watch for a report that one has failed. Imports no torch.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT = 1.0
"""Seconds between beats."""
SILENCE = 30.0
"""Seconds without a beat after which a rank counts as gone. A library call may hold Python for some of them."""
GRACE = 5.0
"""Seconds that a rank has to end by itself after another one failed."""
FAREWELL = 10.0
"""Seconds that the first rank waits for the others to leave before it."""
REPORT_WAIT = 3 * BEAT
"""Seconds that a failing rank waits for the others to read its report: the store may end with it."""


@dataclass(frozen=True)
class End:
    """That another rank is gone, and why.

    Args:
        told: the user knows already.
    """

    text: str
    code: int
    told: bool = False


class Heartbeat:
    """This rank's beat, and its watch over the others."""

    def __init__(self, store: Store, rank: int, world: int, silence: float | None = None):
        store.set_timeout(timedelta(seconds=10))  # keys are read only when they exist
        self._store, self.rank, self.world = store, rank, world
        self.silence = silence or float(os.environ.get("UNIGRPO_SILENCE", SILENCE))
        self._lock = threading.Lock()  # the main thread reports through the same connection
        self._over = threading.Event()
        self._found: End | None = None
        self._contact = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Beat and watch until left."""
        thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()  # a thread inside the store while Python ends would abort the process

    def report(self, text: str, code: int, told: bool = False) -> None:
        """Tell the others that this rank fails; the first report counts."""
        if self._add("reports", 1) == 1:
            self._set("report", json.dumps({"text": text, "code": code, "told": told}))

    def wait_until_read(self) -> None:
        """After a report: wait until the others have read it or have failed themselves."""
        until = time.monotonic() + REPORT_WAIT
        read = self._add("read", 1)
        while self._contact and read < self.world and time.monotonic() < until:
            time.sleep(BEAT / 20)
            read = self._add("read", 0)

    def may_tell(self) -> bool:
        """Whether no rank has told the user yet; then this one does."""
        if self._found is not None and self._found.told:
            return False
        count = self._add("told", 1)
        return count == 1 or (count == 0 and self._speaks_without_store())

    def wait_for_an_end(self) -> End | None:
        """Which rank made a collective fail: known at once, after a silence, or None."""
        until = time.monotonic() + self.silence + 4 * BEAT
        while self._found is None and time.monotonic() < until:
            time.sleep(BEAT / 4)
        return self._found

    def leave(self) -> None:
        """Leave at the end; the first rank last, because the store may be in its process."""
        if self.rank:
            self._add("left", 1)
            return
        until = time.monotonic() + FAREWELL
        while self._contact and self._add("left", 0) < self.world - 1 and time.monotonic() < until:
            time.sleep(BEAT / 20)

    # ----- the thread

    def _watch(self) -> None:
        """Beat; end this process when another one has ended and the main thread does not notice."""
        next_one, count = (self.rank + 1) % self.world, 0
        last, last_change = None, time.monotonic()
        while not self._over.wait(BEAT):
            count += 1
            self._set(f"beat {self.rank}", str(count))
            beat = self._read(f"beat {next_one}")
            if beat != last:
                last, last_change = beat, time.monotonic()
            report = self._read("report")
            if report is not None:
                self._add("read", 1)
                self._found = End(**json.loads(report))
            elif not self._contact:
                self._found = End("rank 0 or its launcher is gone: no answer at the address where ranks meet", 1)
            elif time.monotonic() - last_change > self.silence:
                self._found = End(
                    f"rank {next_one} is gone: no sign of it for {self.silence:g} s, so it was killed (check the "
                    "out-of-memory killer) or disconnected",
                    1,
                )
                self.report(self._found.text, self._found.code)
            if self._found is not None:
                self._end(self._found)
                return

    def _end(self, found: End) -> None:
        """End the process, unless it does so by itself."""
        if self._over.wait(GRACE):
            return
        if self.may_tell():
            sys.stderr.write(f"error: {found.text}; every rank ends\n")
            sys.stderr.flush()
        os._exit(found.code)

    # ----- the store, which ends with the process that holds it

    def _set(self, key: str, value: str) -> None:
        if self._contact:
            try:
                with self._lock:
                    self._store.set(key, value)
            except RuntimeError:
                self._contact = False

    def _read(self, key: str) -> str | None:
        if not self._contact:
            return None
        try:
            with self._lock:
                return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            self._contact = False
            return None

    def _add(self, key: str, number: int) -> int:
        """Add to the sum of all ranks under a key and return it; 0 when the store is gone."""
        try:
            with self._lock:
                return int(self._store.add(key, number)) if self._contact else 0
        except RuntimeError:
            self._contact = False
            return 0

    def _speaks_without_store(self) -> bool:
        """One rank per machine, and on the first machine the one after the first."""
        return self.rank == 1 or int(os.environ.get("LOCAL_RANK") or 0) == 0
