"""How many connections a server may have: each needs an open file, which the system limits."""

from __future__ import annotations

import contextlib
import resource

from cachix_console import tell

USUAL = 16_000  # connections, of which three quarters may be websockets: enough for 10,000 agents
IDLE_CONNECTIONS = 1024  # connections kept alive beside those in use
OTHER_FILES = 256
BESIDE = IDLE_CONNECTIONS + OTHER_FILES
HINT = "set LimitNOFILE= of its service, or `ulimit -n`"


def connections_of(wanted: int | None) -> int:
    """The connections to serve at a time: those that are wanted, else as many as usual.

    Tells if the system allows fewer.
    """
    needed = (wanted or USUAL) + BESIDE
    allowed = allow_files(needed)
    if allowed >= needed:
        return wanted or USUAL
    if wanted is not None:
        rest = f"--max-connections={wanted} may need {needed}: {HINT}"
        tell(f"warning: only {allowed} open files are allowed, and {rest}")
        return wanted
    most = max(4, allowed - BESIDE, allowed // 2)
    rest = f"it has at most {most} connections at a time; for {USUAL} allow {needed}: {HINT}"
    tell(f"{allowed} open files are allowed, so that {rest}")
    return most


def allow_files(needed: int) -> int:
    """Allow this process so many open files, as far as the hard limit permits; how many it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):  # a filter of system calls may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
