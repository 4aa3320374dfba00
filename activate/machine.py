"""This boot of the machine, whether another one is needed, and whether it is shutting down."""

from __future__ import annotations

import contextlib
import os

from activate.process import CommandFailed, Error, ask, output

BOOTED_SYSTEM = "/run/booted-system"
BOOT_PARTS = ("kernel", "initrd", "kernel-modules")  # as NixOS itself compares them


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


def needs_reboot(running: str, profile: str, booted: str = BOOTED_SYSTEM) -> bool:
    """Whether a NixOS machine was booted with another kernel than that of its system.

    Both the system that runs and the one that will boot count. In a container there is no kernel.
    """

    def parts(system: str) -> list[str]:
        with contextlib.suppress(OSError):
            return [os.readlink(f"{system}/{part}") for part in BOOT_PARTS]
        return []

    now = parts(booted)
    return bool(now) and any(other and other != now for other in map(parts, (running, profile)))
