"""The feed of changes for pages that are open: topics, numbered, the last ones kept.

A topic is `agents` (the list of them has changed), `agent:ID`, `deployment:ID`, `log:ID`,
`run:NUMBER`, `runs`, or `all`. Whoever hears of one looks for himself: nothing else is told.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

KEPT = 2000  # changes that a page which lost its stream can catch up on
ALL = "all"


class Feed:
    """Changes of this process. Nothing waits for a reader."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._changes: deque[tuple[int, str]] = deque(maxlen=KEPT)
        # A number is never used again: not after a restart either.
        self._last = time.time_ns() // 1000
        self._is_closed = False
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Call this after each change. It must not block."""
        self._listeners.append(listener)

    @property
    def last(self) -> int:
        """The number of the latest change."""
        with self._changed:
            return self._last

    def publish(self, *topics: str) -> None:
        """Tell that these have changed."""
        with self._changed:
            for topic in topics:
                self._last += 1
                self._changes.append((self._last, topic))
            self._changed.notify_all()
        self._tell()

    def close(self) -> None:
        """Let all readers end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def wait(self, after: int, timeout: float) -> tuple[int, list[str]] | None:
        """The number of the latest change, and the topics that changed after that one, each once.

        None once the feed is closed. No topics after `timeout` seconds. `all` if too much was
        missed, or if the number is none of this process.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._is_closed and self._last == after:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            if self._is_closed:
                return None
            oldest = self._changes[0][0] if self._changes else self._last + 1
            if after > self._last or (after < oldest - 1):
                return self._last, [ALL]
            new = (topic for number, topic in self._changes if number > after)
            return self._last, list(dict.fromkeys(new))
