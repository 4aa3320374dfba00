"""What survives a power loss: files that are replaced whole, and file systems that are flushed."""

from __future__ import annotations

import contextlib
import os
import threading

from activate.process import Error

SYNC_TIMEOUT = 300.0  # seconds


def write_durably(path: str, content: bytes) -> None:
    """Replace a file so that after a power loss it has its old content or its new one. Raises OSError."""
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while content:
            content = content[os.write(fd, content) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(directories: list[str]) -> None:
    """Flush the file systems that these directories are on, those that exist. Raises Error past the deadline."""
    places = {os.stat(place).st_dev: place for place in directories if os.path.isdir(place)}
    thread = threading.Thread(
        target=_syncfs, args=(list(places.values()),), name="sync", daemon=True
    )
    thread.start()
    thread.join(SYNC_TIMEOUT)
    if thread.is_alive():
        raise Error(
            f"the file systems of {' '.join(directories)} could not be synced within {SYNC_TIMEOUT:.0f} s"
        )


def _syncfs(places: list[str]) -> None:
    import ctypes

    call = getattr(ctypes.CDLL(None), "syncfs", None)
    if call is None:
        os.sync()  # all of them, where the system can't flush one
        return
    for place in places:
        with contextlib.suppress(OSError):
            fd = os.open(place, os.O_RDONLY)
            call(fd)
            os.close(fd)
