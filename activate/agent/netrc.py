"""A netrc for Nix, which carries the agent's token to a private cache."""

from __future__ import annotations

import contextlib
import os

from activate import lock
from activate.process import Error


def write_netrc(state: str, url: str, token: str, also: str) -> lock.Lock:
    """Write a netrc that only this user can read; its lock, whose path is that of the netrc.

    It replaces Nix's own netrc-file, `also`, which is copied behind our entry. A netrc that is not
    locked is stale. Raises Error or OSError.
    """
    from urllib.parse import urlsplit

    # curl 7.88, which is Debian's, drops an entry without a login if the file has other ones
    entry = f"machine {urlsplit(url).hostname} login x password {token}\n"
    others = b""
    with contextlib.suppress(OSError, ValueError), open(also, "rb") as file:
        others = file.read(1 << 20)  # as it is: a comment may be in any encoding
    os.makedirs(state, mode=0o700, exist_ok=True)
    path = os.path.join(state, f"netrc-{os.getpid()}-{os.urandom(4).hex()}")
    taken = lock.take(path)
    if taken is None:
        raise Error(f"{path} is locked by another process")
    os.pwrite(taken.fd, entry.encode() + others, 0)
    return taken


def remove_stale(state: str) -> None:
    """Remove the netrcs of agents that were killed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(state):
            path = os.path.join(state, name)
            if name.startswith("netrc-") and not lock.held(path):
                os.unlink(path)
