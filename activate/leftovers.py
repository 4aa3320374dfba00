"""Commands that an interrupted process has left running: noted while they run, ended afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Callable, Optional

from activate import process
from activate.machine import boot_id
from activate.process import say

MARK_BYTES = 96  # always this long, so that a full disk can't refuse a later mark
UNKNOWN = "-"


def _stat(pid: int) -> list[str]:
    """What the kernel tells of a process, from its state on (proc(5), the third of its `stat`); empty: it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode("ascii").split()
    return []


def _processes() -> list[int]:
    """All processes; none where the system does not tell."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


def started(pid: int) -> Optional[str]:
    """When a process was started, as the kernel counts; None where it is gone, `-` where the system does not tell."""
    if not os.path.isdir("/proc/self"):
        return UNKNOWN
    found = _stat(pid)
    return found[19] if found else None


def clear(fd: int) -> None:
    """Note in the file of a lock that its holder runs nothing."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, b" " * MARK_BYTES, 0)


def marker(fd: int) -> Callable[[], None]:
    """For the process that becomes a command: note in the file of a lock what its holder runs, before it runs.

    The lock is free as soon as its holder was killed, but the command that the holder was waiting for goes on.
    """
    boot = boot_id()

    def mark() -> None:
        with contextlib.suppress(Exception):  # a full disk is no reason not to roll back
            os.pwrite(
                fd, f"{os.getpid()} {started(os.getpid())} {boot}".ljust(MARK_BYTES).encode(), 0
            )

    return mark


def end_marked(fd: int, log: int, patience: float) -> None:
    """End what the last holder of a lock has left running, with its process group.

    Where the system does not say whether that is still the same process it is waited for instead, `patience` seconds.
    """
    words = os.pread(fd, MARK_BYTES, 0).decode("ascii", "replace").split()
    if len(words) != 3 or words[2] != boot_id() or not words[0].isdigit():
        return
    pid, start = int(words[0]), words[1]
    if not _group_runs(pid):
        return
    if start == UNKNOWN:
        say(
            log,
            f"waiting for what an interrupted deployment has left running (process group {pid})",
        )
        _wait_for_group(pid, patience)
    elif started(pid) in (None, start):
        say(log, f"ending what an interrupted deployment has left running (process group {pid})")
        end_group(pid)


def end_commands(directory: str) -> None:
    """End the commands, with their process groups, that have an argument below this directory: who waited for them was
    killed."""
    beginning = os.fsencode(directory) + b"/"
    for pid in _processes():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(1 << 20).split(b"\0")
            if any(word.startswith(beginning) for word in words) and os.getpgid(pid) == pid:
                end_group(pid)


def end_group(pid: int) -> None:
    """End a process group that is not of this process' children: SIGTERM, after a while SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.killpg(pid, number)
        if _wait_for_group(pid, process.KILL_AFTER):
            return


def _group_runs(pid: int) -> bool:
    """Whether a process group is there; who has ended and waits for its parent to look does not count."""
    try:
        os.killpg(pid, 0)
    except OSError:
        return False
    found = [_stat(one) for one in _processes()]
    return not found or any(stat[2] == str(pid) and stat[0] not in "ZX" for stat in found if stat)


def _wait_for_group(pid: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while _group_runs(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
