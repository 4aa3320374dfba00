"""A netrc for Nix, which carries the agent's token to a private cache."""

from __future__ import annotations

import contextlib
import os
import re

from activate import lock
from activate.process import Error

HOST = re.compile(r"[0-9A-Za-z._:-]{1,253}")  # of a URL, thus a name or an address
WORD = re.compile(r"[\x21-\x7e]+")


def write_netrc(state: str, url: str, token: str, also: str) -> lock.Lock:
    """Write a netrc that only this user can read; its lock, whose path is that of the netrc.

    It replaces Nix's own netrc-file, `also`, which is copied behind our entry. A netrc that is not
    locked is stale. Raises OSError; Error if a host or a token would be more than one word there.
    """
    from urllib.parse import urlsplit

    host = urlsplit(url).hostname or ""
    if not HOST.fullmatch(host) or not WORD.fullmatch(token):
        what = "the token" if HOST.fullmatch(host) else f"the host of {url[:300]!r}"
        raise Error(f"{what} can't stand in a netrc: give one without blanks")
    # curl 7.88, which is Debian's, drops an entry without a login if the file has other ones
    entry = f"machine {host} login x password {token}\n"
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
