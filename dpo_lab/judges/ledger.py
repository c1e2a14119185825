"""What was asked of an endpoint and answered, on disk: nobody is asked or paid twice."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE = "answers.sqlite"


def request_key(base_url: str, body: Mapping[str, Any]) -> str:
    """The SHA-256 of a request: where it goes, its model, its messages and its parameters.

    The URL counts, since two servers may give two models one name. The API key does not.
    """
    request = json.dumps([base_url.rstrip("/"), dict(body)], sort_keys=True)
    return hashlib.sha256(request.encode()).hexdigest()


class Ledger:
    """Answers by the key of their request, in one SQLite file of a folder.

    Each answer is one transaction, synced to disk before `keep` returns: a process killed at any
    moment loses none that was kept and leaves none half. Threads share a ledger; processes share
    its file.

    Raises:
        ValueError: the file is no ledger.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._lock = threading.Lock()
        self._file = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        try:
            # synced at each answer, once where no other process is just opening it
            self._file.execute("PRAGMA synchronous = FULL")
            with suppress(sqlite3.OperationalError):
                self._file.execute("PRAGMA journal_mode = WAL")
            with self._file:
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body TEXT NOT NULL)"
                )
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise ValueError(
                f"{self.path} cannot be used as a ledger of answers ({error}); choose another "
                "folder as cache"
            ) from error

    def keep(self, key: str, body: str) -> None:
        """Write an answer to disk; the first one for a key stays."""
        with self._lock, self._file:
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, body))

    def find(self, keys: Iterable[str]) -> dict[str, str]:
        """The answers that are there, by key."""
        found = {}
        with self._lock:
            for key in dict.fromkeys(keys):
                rows = self._file.execute("SELECT key, body FROM answers WHERE key = ?", (key,))
                found.update(rows)
        return found

    def __len__(self) -> int:
        with self._lock:
            return self._file.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
