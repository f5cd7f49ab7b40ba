"""Models that several rewards use: loaded once, counted, and moved off the device together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Shared:
    """What the rewards of one run have in common, by key.

    A key names all that decides what is loaded, e.g. ("open_clip", model, pretrained, precision). `loads` counts
    how often each key was loaded: once, however many rewards ask.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: dict[Hashable, Any] = {}
        self._users: Counter[Hashable] = Counter()
        self.loads: Counter[Hashable] = Counter()

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """The model of that key, loaded by the first that asks; each `get` is to be followed by a `release`."""
        with self._lock:
            if key not in self._held:
                self._held[key] = load()
                self.loads[key] += 1
            self._users[key] += 1
            return self._held[key]

    def release(self, key: Hashable) -> None:
        """One user less; without users the model is dropped. Unknown keys are left alone."""
        with self._lock:
            if self._users[key] > 0:
                self._users[key] -= 1
            if not self._users[key]:
                self._held.pop(key, None)

    def move(self, device: str) -> None:
        """Everything held that has a `to` goes to `device`, e.g. "cpu" while a rollout needs the room."""
        with self._lock:
            for model in self._held.values():
                if hasattr(model, "to"):
                    model.to(device)
