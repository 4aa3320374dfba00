"""Other tools that switch the system, such as an operator's `nixos-rebuild`.

They refuse to run beside one another, and would let neither an activation nor a rollback of ours
begin. Their lock can't be taken for ours, which would refuse too; so they are waited for.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import Callable, Optional

from activate import kinds
from activate.process import Error, say
from activate.switch.progress import Progress, Withdrawn

POLL = 0.1  # seconds between two looks at a lock that another tool holds


def holding(kind: kinds.Kind) -> str:
    """The lock file that another tool holds; empty if there is none."""
    return next((path for path in kind.LOCK_FILES if _is_held(path)), "")


def _is_held(path: str) -> bool:
    """Whether a process holds the flock(2) of a file. Asking shares it for a moment."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def wait(
    progress: Progress,
    kind: kinds.Kind,
    wanted: Callable[[], bool] = lambda: True,
    deadline: Optional[float] = None,
) -> None:
    """Wait until no other tool switches the system, by default as long as an activation may take.

    Raises Error at `deadline`, a monotonic time, Stopping on SIGTERM, and Withdrawn when the
    deployment is not `wanted` any more.
    """
    path, began = holding(kind), time.monotonic()
    if path:
        say(progress.log, f"waiting for another tool that switches this system (it holds {path})")
    if deadline is None:
        deadline = began + progress.policy.activation_timeout
    while path:
        if time.monotonic() >= deadline:
            other = f"another tool that switches this system, and holds {path},"
            raise Error(f"{other} did not end within {time.monotonic() - began:.0f} s")
        progress.stop.wait(POLL)
        progress.check_stopping()
        if not wanted():
            raise Withdrawn
        path = holding(kind)


def wait_untouched(
    progress: Progress, kind: kinds.Kind, wanted: Callable[[], bool] = lambda: True
) -> None:
    """Wait while nothing has been changed yet. Raises what `wait` raises."""
    try:
        wait(progress, kind, wanted)
    except Error as error:
        raise Error(f"{error}; nothing was changed") from None
