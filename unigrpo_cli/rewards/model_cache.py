"""Models that several rewards use: loaded once, and moved off the device together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Shared:
    """Models by key. A key names everything that decides what is loaded: ("open_clip", model, pretrained, precision).

    `loads` counts how often each key was loaded: once, however many rewards use it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: dict[Hashable, Any] = {}
        self._users: Counter[Hashable] = Counter()
        self.loads: Counter[Hashable] = Counter()

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """The model of a key, loaded at the first call. Each `get` needs a `release`."""
        with self._lock:
            if key not in self._held:
                self._held[key] = load()
                self.loads[key] += 1
            self._users[key] += 1
            return self._held[key]

    def release(self, key: Hashable) -> None:
        """Drop the model when its last user releases it. Unknown keys are ignored."""
        with self._lock:
            if self._users[key] > 0:
                self._users[key] -= 1
            if not self._users[key]:
                self._held.pop(key, None)

    def move(self, device: str) -> None:
        """Move every model that has a `to`, e.g. to "cpu" while a rollout needs the memory."""
        with self._lock:
            for model in self._held.values():
                if hasattr(model, "to"):
                    model.to(device)
