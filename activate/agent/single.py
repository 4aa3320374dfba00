"""One agent of a name on a machine: its locks, and how a second one waits for the first.

An agent holds the lock of Cachix's client, which lies below a cache directory: that may be emptied
at any time, and be another one for another HOME. So it holds a lock in the state directory as well.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Callable, Optional

from activate import lock
from activate.process import Error
from activate.values import dataclass


@dataclass(frozen=True)
class Owner:
    """The holder of a lock of the agent's name: an agent, or with `is_gone` its children."""

    pid: str
    is_gone: bool


class Busy(Error):
    """Another agent of the name is running. The message says which."""


def own_path(state: str, name: str) -> str:
    """The lock file of an agent in the state directory. Its content is the PID."""
    return os.path.join(state, f"agent-{name}.lock")


def pid_path(name: str) -> str:
    """The file with the PID of the agent that holds the lock of Cachix's client."""
    return lock.shared_path("agent", name)[: -len("lock")] + "pid"


def owner(state: str, name: str) -> Optional[Owner]:
    """The holder of a lock of the agent's name; None if nobody holds it."""
    shared, own = lock.shared_path("agent", name), own_path(state, name)
    for path, pid_file in ((shared, pid_path(name)), (own, own)):
        if lock.held(path):
            pid = lock.read(pid_file)
            return Owner(pid, pid.isdigit() and not has_open(int(pid), path))
    return None


def has_open(pid: int, path: str) -> bool:
    """Whether a process has a file open; also if only that process runs, and no more is known.

    A PID alone says little: that of an agent that was killed may be another program's by now.
    """
    try:
        wanted = os.stat(path)
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), wanted):
                    return True
        return False
    except PermissionError:
        return True
    except OSError:
        return not os.path.isdir("/proc/self") and _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process runs, where there is no /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def take(state: str, name: str) -> bool:
    """Take the locks of an agent's name for as long as this process lives, if nobody has any.

    The one of Cachix's client is not taken where another user owns its directory. Raises Error if
    they can't be taken for another reason.
    """
    shared_path = lock.shared_path("agent", name)
    try:
        shared = None
        if is_usable := not lock.foreign(shared_path):
            shared = lock.take(shared_path)
            if shared is None:
                return False
        with contextlib.suppress(OSError):  # a state that can't be written must stop no agent
            if lock.take(own_path(state, name), text=str(os.getpid())) is None:
                if shared is not None:
                    shared.close()
                return False
        if is_usable:
            _write_pid(pid_path(name))
    except OSError as error:
        hint = "set XDG_CACHE_HOME to a directory that can be written"
        raise Error(f"{shared_path} can't be locked: {error.strerror}; {hint}") from None
    return True


def _write_pid(path: str) -> None:
    """Write our PID for other agents of the name. A link is not followed. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(b"%d" % os.getpid())


@dataclass(frozen=True)
class Patience:
    """Seconds to wait for an agent to end, and for what one that has ended has left running."""

    agent: float
    children: float


def wait(
    state: str,
    name: str,
    patience: Patience,
    tell: Callable[[str], None],
    pause: Callable[[], bool],
) -> bool:
    """Take the locks of an agent's name, after the former agent; False if `pause` ends the wait.

    Children of an agent that has ended may hold its lock: they lead a deployment. Raises Busy when
    our patience is at an end, else Error.
    """
    began, has_warned = time.monotonic(), False
    while not take(state, name):
        waited, former = time.monotonic() - began, owner(state, name)
        is_gone = former is not None and former.is_gone
        if former is not None and waited > (patience.children if is_gone else patience.agent):
            raise Busy(describe(name, former))
        if is_gone and not has_warned:
            has_warned = True
            tell(f"waiting for the deployment of a former agent named {name} to end")
        if pause():
            return False
    return True


def describe(name: str, former: Owner) -> str:
    """A message on who holds the locks."""
    if former.is_gone:
        return f"what a former agent named {name} (pid {former.pid}) has started is still running"
    pid = f" (pid {former.pid})" if former.pid else ""
    return f"an agent named {name} is already running{pid}"
