"""Locks: open-file-description locks on Linux, as in Cachix's client, and flock elsewhere.

Such a lock belongs to the open file. A process that inherits the descriptor holds it too. It is
released when the last copy is closed, thus when all its holders have ended, and never by closing
another descriptor of that file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from typing import Callable, Optional

from activate.environment import cache_home
from activate.values import dataclass

DEPLOYMENT_TIMEOUT = 4 * 3600.0  # seconds to wait for another deployment
NOBODY = 65534  # the owner of everything that a user namespace does not know
TRIES = 20  # at a directory that is deleted meanwhile
POLL = 0.05  # seconds between two attempts to take a lock
OFD = hasattr(fcntl, "F_OFD_SETLK")
FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length, pid
WHOLE_FILE = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class ForeignDirectory(PermissionError):
    """The directory of a lock belongs to another user, who could let us write anywhere."""


@dataclass
class Lock:
    """A lock that is held until `close`. `fd` may be inherited by a child; it is -1 afterwards."""

    path: str
    fd: int

    def write(self, text: str) -> None:
        """Replace the content of the lock's file. Raises OSError."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, text.encode(), 0)

    def is_in_place(self) -> bool:
        """Whether the file still has its name: who opens a new one of that name locks another."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except OSError:
            return False

    def close(self) -> None:
        """Release it, unless another process has inherited it. May be repeated."""
        fd, self.fd = self.fd, -1  # the number may soon be another file's
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def take(
    path: str,
    timeout: float = 0.0,
    text: Optional[str] = None,
    wanted: Callable[[], bool] = lambda: True,
) -> Optional[Lock]:
    """Lock file `path`, and write `text` into it.

    None if another process holds it for `timeout` seconds more, or until it is not `wanted` any
    more. A file that was deleted while it was waited for is made anew. Raises OSError if the file
    can't be opened.
    """
    lock, replaced = _open(path), 0
    deadline = time.monotonic() + timeout
    while not (taken := _try(lock.fd)) or not lock.is_in_place():
        if taken:
            lock.close()
            replaced += 1
            if replaced > TRIES:  # or the file system does not keep the numbers of its inodes
                raise OSError(errno.ESTALE, "it is replaced again and again", path)
            lock = _open(path)
            continue
        if time.monotonic() >= deadline or not wanted():
            lock.close()
            return None
        time.sleep(POLL)
    if text is not None:
        with contextlib.suppress(OSError):
            lock.write(text)
    return lock


def _open(path: str) -> Lock:
    """The file of a lock, which is not taken yet. Raises ForeignDirectory, or another OSError.

    No link is followed.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(TRIES):
        directory = os.path.dirname(path)
        if problem := foreign(path):
            raise ForeignDirectory(errno.EPERM, problem, path)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its directory was deleted this very moment
            return Lock(path, os.open(path, flags, 0o600))
    raise OSError(errno.ESTALE, "its directory is deleted again and again", path)


def foreign(path: str) -> str:
    """A message if the directory of a lock, or that which it would be made in, is another user's.

    Such a lock is neither taken nor asked about.
    """
    directory = os.path.dirname(path)
    while not os.path.lexists(directory):
        directory = os.path.dirname(directory) or "/"
    try:
        owner = os.stat(directory).st_uid
    except OSError:
        return ""
    mine = owner in (0, os.geteuid(), NOBODY)
    return "" if mine else f"{directory} belongs to user {owner}"


def _try(fd: int) -> bool:
    """Whether the lock could be taken at once."""
    try:
        if OFD:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, WHOLE_FILE)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def held(path: str) -> bool:
    """Whether any process holds the lock of file `path`. On Linux, asking never takes the lock."""
    try:
        if foreign(path):
            return False
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if not OFD:
            return not _try(fd)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, WHOLE_FILE)
        return bool(struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def read(path: str) -> str:
    """The content of a lock's file; empty if it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(200).strip()
    except OSError:
        return ""


def shared_path(kind: str, name: str) -> str:
    """A lock file of Cachix's client too. `kind` is agent or deployment, `name` the agent's."""
    return os.path.join(cache_home(), "cachix", "deploy", "locks", f"{kind}-{name}.lock")


def machine_path(profile: str) -> str:
    """The lock file of a profile. All profiles of NixOS and nix-darwin share that of `system`."""
    directory, name = os.path.split(profile)
    if os.path.basename(directory) == "system-profiles":
        directory, name = os.path.dirname(directory), "system"
    return os.path.join(directory, f".cachix-deploy-{name}.lock")
