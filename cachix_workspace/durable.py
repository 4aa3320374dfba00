"""Makes names of files last a power loss: a directory is synced once for all who wait for it.

A file is on the disk after its own fsync, but its name only after one of the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 60.0  # seconds for a sync of somebody else


@dataclass
class _Round:
    """The syncs of a directory: how many have begun, how many have ended, and their waiters."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    begun: int = 0
    ended: int = 0
    users: int = 0


_rounds: dict[Path, _Round] = {}
_lock = threading.Lock()


def sync_directory(path: Path) -> None:
    """Return once the names in a directory, as they are now, are on the disk. Raises OSError.

    Of many callers at the same time, one syncs for all that came before it began.
    """
    with _round_of(path) as turn:
        with turn.changed:
            wanted = turn.begun + 1  # a sync that has begun may not see our name
            while turn.ended < wanted and turn.begun > turn.ended:
                if not turn.changed.wait(PATIENCE):
                    raise OSError(errno.ETIMEDOUT, "the disk does not answer", str(path))
            if turn.ended >= wanted:
                return
            turn.begun += 1
        is_done = False
        try:
            _sync(path)
            is_done = True
        finally:
            with turn.changed:
                if is_done:
                    turn.ended = turn.begun
                else:
                    turn.begun -= 1  # the others try by themselves
                turn.changed.notify_all()


@contextlib.contextmanager
def _round_of(path: Path) -> Iterator[_Round]:
    """The round of a directory, which is forgotten when nobody uses it."""
    with _lock:
        turn = _rounds.setdefault(path, _Round())
        turn.users += 1
    try:
        yield turn
    finally:
        with _lock:
            turn.users -= 1
            if not turn.users:
                del _rounds[path]


def _sync(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
