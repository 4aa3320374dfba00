"""Durability: files that are replaced as a whole, and file systems that are flushed."""

from __future__ import annotations

import contextlib
import os
import threading

from activate.process import Error

SYNC_TIMEOUT = 300.0  # seconds


def write_durably(path: str, content: bytes) -> None:
    """Replace a file. After a power loss it has its old content or its new one. Raises OSError."""
    temporary = f"{path}.new"
    if os.path.islink(temporary):  # none of ours
        os.unlink(temporary)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, 0o600)
    try:
        while content:
            content = content[os.write(fd, content) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_directory(os.path.dirname(path))


def sync_directory(directory: str) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private(directory: str) -> str:
    """Let nobody else use a directory of ours; a message if others could have written there.

    Raises OSError if its mode can't be changed.
    """
    status = os.stat(directory)
    if status.st_uid != os.geteuid():
        return f"{directory} belongs to user {status.st_uid}, who can change what is done here"
    if status.st_mode & 0o077:
        os.chmod(directory, 0o700)
    if status.st_mode & 0o022:
        return f"others could write to {directory}: its mode is 0700 now"
    return ""


def make_public(directory: str) -> None:
    """Create a directory that all users may read, as its missing parents. Raises OSError."""
    if not directory or os.path.isdir(directory):
        return
    make_public(os.path.dirname(directory))
    with contextlib.suppress(FileExistsError):  # another process was faster
        os.mkdir(directory)
        os.chmod(directory, 0o755)  # mkdir obeys the umask


def sync(directories: list[str]) -> None:
    """Flush the file systems of these directories; a missing directory is skipped.

    Raises Error after SYNC_TIMEOUT.
    """
    places = {os.stat(place).st_dev: place for place in directories if os.path.isdir(place)}
    arguments = (list(places.values()),)
    thread = threading.Thread(target=_syncfs, args=arguments, name="sync", daemon=True)
    thread.start()
    thread.join(SYNC_TIMEOUT)
    if thread.is_alive():
        names = " ".join(directories)
        raise Error(f"the file systems of {names} could not be synced in {SYNC_TIMEOUT:.0f} s")


def _syncfs(places: list[str]) -> None:
    """Flush the file system of each place, or all file systems if this system has no syncfs(2)."""
    import ctypes

    call = getattr(ctypes.CDLL(None), "syncfs", None)
    if call is None:
        os.sync()
        return
    for place in places:
        with contextlib.suppress(OSError):
            fd = os.open(place, os.O_RDONLY)
            call(fd)
            os.close(fd)
