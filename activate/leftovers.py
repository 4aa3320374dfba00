"""Commands that an interrupted process left running: marked while they run, ended afterwards.

The mark stands in the file of the machine lock: PID, start time and boot. The lock is free as soon
as its holder is killed, but the command that the holder was waiting for goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from typing import Callable, Optional

from activate import process
from activate.machine import boot_id

MARK_BYTES = 96  # always this long, so that a full disk can't refuse a later mark
POLL = 0.02  # seconds between two looks at a process group
UNKNOWN = "-"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, see proc(5); empty if the process is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode("ascii").split()
    return []


def _pids() -> list[int]:
    """The PIDs of all processes; empty if the system has no /proc."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


def start_time(pid: int) -> Optional[str]:
    """The start time of a process in clock ticks; None if it is gone, `-` without /proc."""
    if not os.path.isdir("/proc/self"):
        return UNKNOWN
    fields = _stat(pid)
    return fields[19] if fields else None


def clear(fd: int) -> None:
    """Remove the mark: the holder of the lock runs no command."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, b" " * MARK_BYTES, 0)


def marker(fd: int) -> Callable[[], None]:
    """A function for the process that becomes a command: it marks itself in a lock's file."""
    boot = boot_id()

    def mark() -> None:
        with contextlib.suppress(Exception):  # a full disk must not prevent a rollback
            words = f"{os.getpid()} {start_time(os.getpid())} {boot}"
            os.pwrite(fd, words.ljust(MARK_BYTES).encode(), 0)

    return mark


def end_marked(fd: int, log: process.Log, timeout: float) -> None:
    """End the process group of the command that the last holder of a lock left running.

    Without /proc it might be a new process of that number, so it is waited for instead, for
    `timeout` seconds.
    """
    words = os.pread(fd, MARK_BYTES, 0).decode("ascii", "replace").split()
    if len(words) != 3 or words[2] != boot_id() or not words[0].isdigit():
        return
    pid, start = int(words[0]), words[1]
    if not _group_runs(pid):
        return
    leftover = f"what an interrupted deployment has left running (process group {pid})"
    if start == UNKNOWN:
        process.say(log, f"waiting for {leftover}")
        _wait_for_group(pid, timeout)
    elif start_time(pid) in (None, start):
        process.say(log, f"ending {leftover}")
        _end_group(pid)


def end_commands(directory: str) -> None:
    """End every process group whose leader has an argument below `directory`.

    They are commands of a deployment, and the process that waited for them was killed.
    """
    prefix = os.fsencode(directory) + b"/"
    for pid, words in _leaders():
        if any(word.startswith(prefix) for word in words):
            _end_group(pid)


def end_starters(deployment_id: str) -> None:
    """End every systemd-run that hangs with a deployment's locks: its agent was killed.

    It has not become a switch process yet, and nobody would tell that to begin.
    """
    for pid, words in _leaders():
        options = words[: words.index(b"--")] if b"--" in words else []
        is_starter = words[-1] == deployment_id.encode() and any(
            word.endswith(b"systemd-run") for word in options
        )
        if is_starter and _is_deserted(pid):
            _end_group(pid)


def _leaders() -> Iterator[tuple[int, list[bytes]]]:
    """The leaders of process groups, each with its command line."""
    for pid in _pids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(1 << 20).rstrip(b"\0").split(b"\0")
            if os.getpgid(pid) == pid:
                yield pid, words


def _is_deserted(pid: int) -> bool:
    """Whether the stdin of a process is a pipe that nobody writes to any more."""
    try:
        fd = os.open(f"/proc/{pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return any(event & select.POLLHUP for _, event in poll.poll(0))
    finally:
        os.close(fd)


def _end_group(pid: int) -> None:
    """End a process group that does not belong to a child of ours."""
    process.end_group(pid, lambda timeout: _wait_for_group(pid, timeout))


def _group_runs(pid: int) -> bool:
    """Whether a process group has a process that is not a zombie."""
    try:
        os.killpg(pid, 0)
    except OSError:
        return False
    processes = [_stat(one) for one in _pids()]
    alive = (fields for fields in processes if fields and fields[0] not in "ZX")
    return not processes or any(fields[2] == str(pid) for fields in alive)


def _wait_for_group(pid: int, timeout: float) -> bool:
    """Whether a process group ends within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while _group_runs(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True
