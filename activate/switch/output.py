"""Where the switch process and its commands write: a pipe, which a drainer empties into the log."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import threading
import time
from _socket import socket as Socket
from _socket import socketpair
from typing import Any

from activate.switch import drainer

SYNC_TIMEOUT = 2.0  # seconds for the drainer to take what is in the pipe
PIECE = select.PIPE_BUF  # bytes that a pipe which polls as writable takes without blocking


class Output:
    """The pipe into a log file. `fileno` is for commands, `say` for lines of our own.

    The read end stays open here too, and a drainer that was killed is replaced as soon as the
    kernel says so: as long as one of both lives no command sees a broken pipe.
    """

    control: Socket

    def __init__(self, log: int) -> None:
        """Start to drain into the file `log`. Raises OSError. To be called by the main thread."""
        self.log, self.pid, self.questions = log, 0, 0
        self.shared = self.said = False  # whether a command has had the pipe since our last line
        self.tally = drainer.Tally()
        self.source, self.sink = os.pipe()
        os.set_blocking(self.source, False)
        with contextlib.suppress(OSError):
            os.fchmod(self.sink, 0o666)  # a command of another user may open /dev/stderr
        self.start()
        signal.signal(signal.SIGCHLD, self.look)

    def fileno(self) -> int:
        """The end that commands write to."""
        self.shared = True
        return self.sink

    def start(self) -> None:
        """Start a drainer: a process, or a thread where there can be no more processes."""
        # the signal of an early end must wait until its PID is known
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            self.pid, self.control = drainer.fork(self.source, self.log, self.tally)
        except OSError:
            self.control, theirs = socketpair()
            drain = drainer.Drainer(os.dup(self.source), theirs, self.log, self.tally)
            self.pid = 0
            threading.Thread(target=drain.run, name="drainer", daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def look(self, *_: Any) -> None:
        """Replace a drainer that has ended."""
        if not self.pid:
            return
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(self.pid, os.WNOHANG)[0] == 0:
                return
        self.control.close()
        self.start()

    def settle(self) -> None:
        """Wait until the drainer has taken all that was written so far, but not for long."""
        deadline = time.monotonic() + SYNC_TIMEOUT
        self.questions = self.questions % 255 + 1
        question = bytes([self.questions])
        while (left := deadline - time.monotonic()) > 0:
            control = self.control
            with contextlib.suppress(OSError):
                control.settimeout(left)
                control.sendall(question)
                while answer := control.recv(1):  # a late one may be of an earlier question
                    if answer == question:
                        return
            self.look()
            if self.control is control:
                time.sleep(0.001)  # its end is about to be announced

    def say(self, line: str) -> None:
        """Write a line of our own, after all that was written before. Never raises."""
        if self.shared:  # else there is nothing to wait for
            self.settle()
        with contextlib.suppress(OSError):
            os.set_blocking(self.sink, True)  # a command may have changed that for all
        start = "" if self.last() in (b"", b"\n") else "\n"
        self.shared, self.said = False, True
        data = f"{start}{line}\n".encode("utf-8", "replace")
        poll = select.poll()
        poll.register(self.sink, select.POLLOUT)
        deadline = time.monotonic() + SYNC_TIMEOUT
        while data and time.monotonic() < deadline:
            if poll.poll(100):
                with contextlib.suppress(OSError):
                    data = data[os.write(self.sink, data[:PIECE]) :]

    def last(self) -> bytes:
        """The last byte of the log, or of what it should have; empty at its beginning."""
        if self.said and not self.shared:
            return b"\n"
        if total := self.tally.total:
            return self.tally.since(total - 1)
        with contextlib.suppress(OSError):
            return os.pread(self.log, 1, max(0, os.fstat(self.log).st_size - 1))
        return b""

    def position(self) -> int:
        """How much has been written until now, for `since`."""
        self.settle()
        return self.tally.total

    def since(self, start: int) -> str:
        """The output since a position, or the last part of it."""
        self.settle()
        return self.tally.since(start).decode("utf-8", "replace")

    def size(self) -> int:
        """The size of the log file with all that has been written until now."""
        self.settle()
        status = os.fstat(self.log)
        return status.st_size if stat.S_ISREG(status.st_mode) else 0

    def missing(self) -> str:
        """A message if the end of the output is lost, and the log can't say so."""
        self.settle()
        lost = self.tally.lost
        return drainer.describe(lost) if lost else ""

    def close(self) -> None:
        """End the log: what is written from now on goes nowhere. May be repeated."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.control.close()
        for fd in (self.sink, self.source):
            if fd >= 0:
                os.close(fd)
        self.sink = self.source = -1
