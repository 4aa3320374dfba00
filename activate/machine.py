"""This boot of the machine, and whether it is shutting down."""

from __future__ import annotations

import contextlib
import os

from activate.process import CommandFailed, Error, ask, output


def boot_id() -> str:
    """The id of this boot of the machine; empty if the system has none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        with contextlib.suppress(Error):
            return output(["sysctl", "-n", "kern.bootsessionuuid"], 5).strip()
        return ""


def is_stopping() -> bool:
    """Whether systemd is shutting the machine down."""
    if not os.path.isdir("/run/systemd/system"):
        return False
    with contextlib.suppress(CommandFailed):
        return "stopping" in ask(["systemctl", "is-system-running"], 10)[1]
    return False
