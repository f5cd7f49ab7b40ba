"""Earlier answers of a judge in a SQLite file. A fault of the file never stops a run."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def default_path() -> Path:
    """$XDG_CACHE_HOME/unigrpo/judge.sqlite."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "unigrpo" / "judge.sqlite"


def key_of(**facts: Any) -> str:
    """SHA-256 of all facts that decide an answer."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """JSON values by key. Threads and processes may share the file."""

    def __init__(self, path: Path):
        self.path = path
        self.hits = 0
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._off = False

    def get(self, key: str) -> Any:
        row = self._with(lambda db: db.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone())
        try:
            return None if row is None else json.loads(row[0])
        except (ValueError, TypeError, RecursionError):
            return None  # a damaged row is asked again and overwritten

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        row = (key, json.dumps(value), time.time())
        self._with(lambda db: db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row) and None)

    def close(self) -> None:
        with self._lock:
            self._off = True
            self._shut()

    def _with(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Run `work` on the open file; None once the file is off."""
        with self._lock:
            if self._off:
                return None
            try:
                if self._db is None:
                    self._db = self._open()
                return work(self._db)
            except (sqlite3.Error, OSError) as error:  # damaged, full, locked, not writable
                self._off = True
                self._shut()
                warnings.warn(
                    f"the judge's cache {self.path} is off from here on: {error}; delete the file if it is damaged",
                    stacklevel=4,
                )
                return None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT, made REAL)")
        except BaseException:
            db.close()
            raise
        return db

    def _shut(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):  # a damaged file may fail to close
                self._db.close()
            self._db = None
