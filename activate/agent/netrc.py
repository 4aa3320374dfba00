"""A netrc for Nix, which carries the agent's token to a private cache."""

from __future__ import annotations

import contextlib
import os

from activate import lock


def write_netrc(state: str, url: str, token: str, also: str) -> lock.Lock:
    """A netrc for Nix that only this user can read, locked while it is in use: what is not locked is stale.

    It replaces Nix' own netrc-file, so what that says of other hosts is kept.
    """
    from urllib.parse import urlsplit

    machine = urlsplit(url).hostname
    others = ""
    with contextlib.suppress(OSError, ValueError), open(also, encoding="utf-8") as file:
        others = file.read(1 << 20)
    os.makedirs(state, mode=0o700, exist_ok=True)
    held = lock.take(os.path.join(state, f"netrc-{os.getpid()}-{os.urandom(4).hex()}"))
    assert held is not None
    os.pwrite(held.fd, f"machine {machine} password {token}\n{others}".encode(), 0)
    return held


def remove_stale(state: str) -> None:
    """Remove what an agent that was killed has left."""
    with contextlib.suppress(OSError):
        for name in os.listdir(state):
            path = os.path.join(state, name)
            if name.startswith("netrc-") and not lock.held(path):
                os.unlink(path)
