"""The watch over the other processes of a run: one that is gone is missed within half a minute.

A rank that waits in a collective for one that was killed would wait for as long as the collective allows. So every
rank beats from a thread of its own into the store that they met at, each watches the beat of the next one, and all
watch for a word that one has failed. Imports no torch.
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

from unigrpo_cli.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT = 1.0
"""Seconds between beats."""
SILENCE = 30.0
"""Seconds without a beat after which a rank is given up. A call into a library may hold Python for some of them."""
GRACE = 5.0
"""Seconds that a rank has to end by itself after another one failed."""
FAREWELL = 10.0
"""Seconds that the first rank waits for the others to leave before it."""
HEARING = 3 * BEAT
"""Seconds that a rank that fails waits for the others to hear of it: the place where they would may go with it."""


def launched() -> tuple[int, int, int]:
    """Rank, world size and rank on this machine, as `accelerate launch`, torchrun or a scheduler's script say.

    Raises:
        UsageError: when they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        world = int(os.environ.get("WORLD_SIZE") or 1)
        rank = int(os.environ.get("RANK") or 0)
        here = int(os.environ.get("LOCAL_RANK") or 0)
    except ValueError as error:
        given = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise UsageError(f"{given}: no whole numbers; start with `accelerate launch` or torchrun") from error
    if not 0 <= rank < world or here < 0:
        raise UsageError(f"RANK={rank} of WORLD_SIZE={world}: start with `accelerate launch` or torchrun")
    return rank, world, here


@dataclass(frozen=True)
class End:
    """That and why another rank is gone.

    Args:
        told: the user knows; nobody else needs to say it.
    """

    text: str
    code: int
    told: bool = False


class Heartbeat:
    """This rank's beat, and its eye on the others."""

    def __init__(self, store: Store, rank: int, world: int, silence: float | None = None):
        store.set_timeout(timedelta(seconds=10))  # nothing is asked for that is not there
        self._store, self.rank, self.world = store, rank, world
        self.silence = silence or float(os.environ.get("UNIGRPO_SILENCE", SILENCE))
        self._lock = threading.Lock()  # the main thread reports through the same connection
        self._over = threading.Event()
        self._found: End | None = None
        self._contact = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Beat and watch until left."""
        thread = threading.Thread(target=self._watch, daemon=True, name="peers")
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

    def be_heard(self) -> None:
        """After a report: until the others have read it, each within a beat, or fail themselves, or cannot."""
        until = time.monotonic() + HEARING
        heard = self._add("heard", 1)
        while self._contact and heard < self.world and time.monotonic() < until:
            time.sleep(BEAT / 20)
            heard = self._add("heard", 0)

    def may_tell(self) -> bool:
        """Whether nobody has told the user yet: then it is for this rank to do so."""
        if self._found is not None and self._found.told:
            return False
        count = self._add("told", 1)
        return count == 1 or (count == 0 and self._speaks_without_store())

    def wait_for_an_end(self) -> End | None:
        """Who was the cause that a collective failed: known at once, after a silence, or nobody."""
        until = time.monotonic() + self.silence + 4 * BEAT
        while self._found is None and time.monotonic() < until:
            time.sleep(BEAT / 4)
        return self._found

    def part(self) -> None:
        """Leave after all is said: the first rank as the last, for the store may be in its process."""
        if self.rank:
            self._add("left", 1)
            return
        until = time.monotonic() + FAREWELL
        while self._contact and self._add("left", 0) < self.world - 1 and time.monotonic() < until:
            time.sleep(BEAT / 20)

    # ----- the thread

    def _watch(self) -> None:
        """Beat; end this process when another has ended and the main thread does not see it by itself."""
        next_one, count = (self.rank + 1) % self.world, 0
        last, heard = None, time.monotonic()
        while not self._over.wait(BEAT):
            count += 1
            self._set(f"beat {self.rank}", str(count))
            beat = self._read(f"beat {next_one}")
            if beat != last:
                last, heard = beat, time.monotonic()
            report = self._read("report")
            if report is not None:
                self._add("heard", 1)
                self._found = End(**json.loads(report))
            elif not self._contact:
                self._found = End("rank 0 or its launcher is gone: nobody answers at the place where ranks meet", 1)
            elif time.monotonic() - heard > self.silence:
                self._found = End(
                    f"rank {next_one} is gone: not heard of for {self.silence:g} s, so it was killed (look for the "
                    "out-of-memory killer) or cut off",
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

    # ----- the store, which goes when the process goes that keeps it

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
        """Add to what all ranks have added under this key, and give the sum; 0 when the store is gone."""
        try:
            with self._lock:
                return int(self._store.add(key, number)) if self._contact else 0
        except RuntimeError:
            self._contact = False
            return 0

    def _speaks_without_store(self) -> bool:
        """One rank per machine, and of the first machine the one after the first."""
        return self.rank == 1 or int(os.environ.get("LOCAL_RANK") or 0) == 0
