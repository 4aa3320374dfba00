"""The inheritance of a process from its parent, set right before anything else is done.

Its files and its memory, which holds a token, are for nobody else; what it runs gets back what it
would have had without us.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Optional

OWN_UMASK = 0o077  # of the agent and of its switch processes
COMMAND_UMASK = 0o022  # of what they run
PR_SET_DUMPABLE = 4  # see prctl(2)

_former_cores: Optional[tuple[int, int]] = None  # the limits of core files before `protect`
_spawning = threading.Lock()


def protect(writes: bool = True) -> None:
    """Keep this process' memory, and what it `writes`, from other users and from core files."""
    global _former_cores
    if writes:
        os.umask(OWN_UMASK)
    if _former_cores is None:
        _former_cores = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, _former_cores[1]))
    with contextlib.suppress(ImportError, AttributeError, OSError):  # there is no prctl: not Linux
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


@contextlib.contextmanager
def former_limits() -> Iterator[None]:
    """Give processes that are started meanwhile the limits that this one had before `protect`."""
    if _former_cores is None:
        yield
        return
    with _spawning:
        resource.setrlimit(resource.RLIMIT_CORE, _former_cores)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_CORE, (0, _former_cores[1]))


def open_descriptors() -> None:
    """Open /dev/null as each of the descriptors 0, 1 and 2 that is closed.

    Otherwise the next file or socket would be the stdin or the stderr of every command.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed, thus the lowest that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def reset_signals() -> None:
    """Block no signal, and do not ignore the ends of children.

    Where SIGCHLD is ignored the kernel drops each child's exit status, and Python takes it for 0.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def disarm_warnings() -> None:
    """Ignore all warnings if PYTHONWARNINGS or -W makes errors of some.

    One of a library must not end a program that runs for months.
    """
    if any("error" in option for option in sys.warnoptions):
        import warnings

        warnings.simplefilter("ignore")
