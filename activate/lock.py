"""One helper for every lock: open-file-description locks on Linux, as in Cachix's client, and flock elsewhere.

Such a lock belongs to the open file: a process that inherits the descriptor holds it too, it ends when the last copy
is closed (so with its holders, however they end), and nobody gives it back by closing another descriptor of that file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from dataclasses import dataclass
from typing import Callable, Optional

from activate.process import xdg

DEPLOYMENT_TIMEOUT = 4 * 3600.0  # seconds to wait for another deployment
OFD = hasattr(fcntl, "F_OFD_SETLK")
_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length, pid


@dataclass(frozen=True)
class Lock:
    """A lock that is held until `close`. `fd` may be inherited by a child."""

    path: str
    fd: int

    def write(self, text: str) -> None:
        """Replace what the lock's file says."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, text.encode(), 0)

    def close(self) -> None:
        """Release it, unless another process has inherited it."""
        with contextlib.suppress(OSError):
            os.close(self.fd)


def take(
    path: str,
    timeout: float = 0.0,
    text: Optional[str] = None,
    wanted: Callable[[], bool] = lambda: True,
) -> Optional[Lock]:
    """The lock of file `path`, with `text` written into it; None if it is still held after `timeout` seconds, or as
    soon as it is not wanted any more. Raises OSError where the file can't be opened.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    lock = Lock(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    deadline = time.monotonic() + timeout
    while not _try(lock.fd):
        if time.monotonic() >= deadline or not wanted():
            lock.close()
            return None
        time.sleep(0.05)
    if text is not None:
        with contextlib.suppress(OSError):
            lock.write(text)
    return lock


def _try(fd: int) -> bool:
    try:
        if OFD:
            fcntl.fcntl(
                fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            )
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def held(path: str) -> bool:
    """Whether somebody holds the lock of file `path`. On Linux the lock is not touched by the question."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not OFD:
            return not _try(fd)
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def read(path: str) -> str:
    """What a lock's file says; empty where it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(200).strip()
    except OSError:
        return ""


def shared_path(kind: str, name: str) -> str:
    """The lock files that Cachix's client takes too: `kind` is agent or deployment, `name` the agent's."""
    return os.path.join(
        xdg("XDG_CACHE_HOME", ".cache"), "cachix", "deploy", "locks", f"{kind}-{name}.lock"
    )


def machine_path(profile: str) -> str:
    """The lock of what a profile decides; all profiles of NixOS and nix-darwin share the one of `system`."""
    directory, name = os.path.split(profile)
    if os.path.basename(directory) == "system-profiles":
        directory, name = os.path.dirname(directory), "system"
    return os.path.join(directory, f".cachix-deploy-{name}.lock")
