"""The drainer: a child of the switch process that takes whatever the commands write.

A command that can't write its output may fail, and so may its rollback. So they write into a pipe,
which nobody can truncate, and not into the log file, whose disk may be full. The drainer empties
the pipe into the log, drops what the disk does not take, and goes on, without writing, when the
switch process has ended: a service that keeps the pipe open must neither block nor be killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import struct
from _socket import socket as Socket
from _socket import socketpair  # `socket` makes enums of hundreds of constants: 2 ms

READ_BYTES = 1 << 16
PIPE_BYTES = 1 << 20  # more than any pipe holds by default
RESERVE = 1 << 16  # bytes of the disk that the log leaves free for the journal
KEPT_BYTES = 1 << 18  # of the latest output, for those who judge it
HEAD = struct.Struct("=QQ")  # bytes so far, bytes that are lost and were not yet told
TITLE = b"cachix-deploy log"


class Tally:
    """How much was written so far, and the latest of it, in memory that all drainers share."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, HEAD.size + KEPT_BYTES)

    @property
    def total(self) -> int:
        """The bytes that commands have written so far."""
        return int(HEAD.unpack_from(self.memory)[0])

    @property
    def lost(self) -> int:
        """The bytes that the disk did not take, as far as the log does not say so yet."""
        return int(HEAD.unpack_from(self.memory)[1])

    def note_lost(self, lost: int) -> None:
        """Replace the number of bytes that were lost."""
        HEAD.pack_into(self.memory, 0, self.total, lost)

    def add(self, data: bytes) -> None:
        """Keep the latest output."""
        total = self.total + len(data)
        latest = data[-KEPT_BYTES:]
        at = (total - len(latest)) % KEPT_BYTES
        first = latest[: KEPT_BYTES - at]
        self._put(at, first)
        self._put(0, latest[len(first) :])
        HEAD.pack_into(self.memory, 0, total, self.lost)

    def _put(self, at: int, data: bytes) -> None:
        start = HEAD.size + at
        self.memory[start : start + len(data)] = data

    def since(self, start: int) -> bytes:
        """The output from byte `start` on, or the last KEPT_BYTES of it."""
        total = self.total
        size = min(total - start, KEPT_BYTES)
        at = (total - size) % KEPT_BYTES
        ring = self.memory[HEAD.size + at :] + self.memory[HEAD.size : HEAD.size + at]
        return ring[:size]


class Drainer:
    """Empties the pipe `source` into the file `log`; answers each byte of `control` with it."""

    def __init__(self, source: int, control: Socket, log: int, tally: Tally) -> None:
        self.source, self.control, self.log, self.tally = source, control, log, tally
        self.writes = True

    def run(self) -> None:
        """Go on until nobody can write into the pipe any more."""
        poll = select.poll()
        poll.register(self.source, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self.control.fileno() not in ready:
                if not self.take(READ_BYTES):
                    return
                continue
            question = b""
            with contextlib.suppress(OSError):
                question = self.control.recv(1)
            at_end = not self.take(PIPE_BYTES)
            self.tell_lost()
            if not question:  # the switch process has ended: another one may write the log now
                poll.unregister(self.control)
                self.writes = False
            with contextlib.suppress(OSError):
                self.control.sendall(question)
            if at_end:
                return

    def take(self, most: int) -> bool:
        """Take what is in the pipe, about `most` bytes. False at its end."""
        taken = 0
        while taken < most:
            try:
                data = os.read(self.source, READ_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            taken += len(data)
            if self.writes:
                self.tally.add(data)
                self.keep(data)
        return True

    def keep(self, data: bytes) -> None:
        """Append output to the log. Bytes that the disk does not take are counted."""
        self.tell_lost()
        left = len(data) if self.tally.lost else self.write(data)
        if left:
            self.tally.note_lost(self.tally.lost + left)

    def tell_lost(self) -> None:
        """Say in the log how much of it is missing, as soon as the disk takes that and more."""
        lost = self.tally.lost
        if not (lost and self.writes and has_room(self.log, 2 * READ_BYTES)):
            return
        if not self.write(f"\n[{describe(lost)}]\n".encode()):
            self.tally.note_lost(0)

    def write(self, data: bytes) -> int:
        """Append to the log; how many bytes the disk did not take."""
        try:
            while data and has_room(self.log, len(data)):
                data = data[os.write(self.log, data) :]
        except OSError:
            pass
        return len(data)


def has_room(log: int, size: int) -> bool:
    """Whether the log may take so many bytes, so that there is room for the journal after them."""
    disk = os.fstatvfs(log)
    blocks = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
    return blocks * disk.f_frsize >= size + RESERVE


def describe(lost: int) -> str:
    """A message about output that is lost."""
    return f"{lost} bytes of the output are missing: the disk of the log did not take them"


def fork(source: int, log: int, tally: Tally) -> tuple[int, Socket]:
    """Start a drainer; its PID, and our end of its control socket. Raises OSError."""
    ours, theirs = socketpair()
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid:
        theirs.close()
        return pid, ours
    try:
        _settle({source, theirs.fileno(), log})
        Drainer(source, theirs, log, tally).run()
    finally:
        os._exit(0)


def _settle(kept: set[int]) -> None:
    """Keep nothing of the switch process but these descriptors: no lock, no pipe to the agent."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    for fd in map(int, os.listdir("/dev/fd")):
        if fd not in kept:
            with contextlib.suppress(OSError):
                os.close(fd)
    with contextlib.suppress(Exception):
        _rename(TITLE)


def _rename(title: bytes) -> None:
    """Show `title` instead of the switch process' command line, where there is a /proc."""
    import ctypes

    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: see proc(5)
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, title, min(len(title), end - start - 1))
    with open("/proc/self/comm", "wb") as file:
        file.write(title)
