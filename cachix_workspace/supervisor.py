"""gunicorn's supervising process: the signals that it takes, and its worker's signs of life."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time
from typing import Any

from gunicorn.arbiter import Arbiter
from gunicorn.workers import base

# gunicorn would start and stop workers, or itself once more: there is one of each.
IGNORED = (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2)


class Supervisor(Arbiter):
    """Has one worker, and ends in order with SIGHUP too: a terminal that is closed sends it."""

    SIGNALS = [signal.SIGHUP, signal.SIGQUIT, signal.SIGINT, signal.SIGTERM, signal.SIGWINCH]

    def init_signals(self) -> None:
        """Take the signals; `nohup` has SIGHUP ignored, and it stays so."""
        is_kept = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        super().init_signals()
        for number in IGNORED if is_kept else (*IGNORED, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def handle_hup(self) -> None:
        """End in order."""
        self.handle_term()


class Heartbeat:
    """When the worker gave its last sign of life, in memory that both processes share.

    gunicorn has a file in /tmp for it, which may be missing, full or read-only.
    """

    def __init__(self, _config: Any) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._file = os.open(os.devnull, os.O_RDONLY)
        self.notify()

    def notify(self) -> None:
        """Give a sign of life."""
        self._memory[:8] = struct.pack("d", time.monotonic())

    def last_update(self) -> float:
        """When the last one came, by the monotonic clock."""
        return float(struct.unpack("d", self._memory[:8])[0])

    def fileno(self) -> int:
        """A descriptor, which gunicorn closes on exec."""
        return self._file

    def close(self) -> None:
        """Close the descriptor. The memory ends with the processes."""
        with contextlib.suppress(OSError):
            os.close(self._file)


base.WorkerTmp = Heartbeat  # type: ignore[attr-defined,assignment]
