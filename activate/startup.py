"""What a process has inherited from its parent, set right before anything else is done."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

OWN_UMASK = 0o077  # of the agent and of its switch processes
COMMAND_UMASK = 0o022  # of what they run


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
