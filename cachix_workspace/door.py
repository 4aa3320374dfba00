"""The connection of a request, as gunicorn's thread uses it: it waits for no peer without need.

What a peer does not take at once is kept, up to a limit, and so is a file: the lot sends them after
the request. A body that comes too slowly ends it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from typing import IO, Any

from cachix_workspace.parking import SLOWEST, receive, send

KEPT = 1 << 20  # bytes that a thread leaves to the lot; beyond them it waits for the peer
SLOWEST_BODY = 1000  # bytes a second that a body must come with in the long run


class Door:
    """Looks like a socket that blocks. Raises ConnectionResetError if the peer stalls."""

    def __init__(self, sock: Any, receive_timeout: float, send_timeout: float) -> None:
        self.sock = sock
        self.kept = bytearray()
        self.file: tuple[int, int, int] | None = None  # descriptor, offset, bytes to send
        self.is_known = False  # the request has shown a valid token
        self.reader: str | None = None  # who has read a narinfo: see `quick`
        self.is_over = False  # nothing more is to be sent
        self._patience = (receive_timeout, send_timeout)
        self._timeout: float | None = None
        self._began, self._received = 0.0, 0
        self._turn = threading.Lock()  # OpenSSL takes one thread at a time

    # --- what gunicorn calls ----------------------------------------------------------------------

    def recv(self, size: int, _flags: int = 0) -> bytes:
        """The next bytes; none at the end."""
        patience = self._patience[0]
        self._began = self._began or time.monotonic()
        latest = self._began + patience + self._received / SLOWEST_BODY
        if self._timeout is not None:
            patience = min(patience, self._timeout)
        while True:
            with self._turn:
                data = receive(self.sock, size)
            if data is not None:
                self._received += len(data)
                return data
            self._wait(select.POLLIN, min(latest, time.monotonic() + patience))

    def sendall(self, data: bytes) -> None:
        """Send, or keep. Waits for the peer only if much is kept."""
        if self.is_over:
            raise BrokenPipeError(errno.EPIPE, "the answer is over")
        self.kept += data
        latest = time.monotonic() + self._patience[1] + len(self.kept) / SLOWEST
        while True:
            with self._turn, memoryview(self.kept) as view:
                count = send(self.sock, view) if self.kept else 0
            del self.kept[:count]
            if len(self.kept) <= KEPT:
                return
            if not count:
                self._wait(select.POLLOUT, latest)

    def send(self, data: bytes) -> int:
        """As `sendall`; the number of bytes."""
        self.sendall(data)
        return len(data)

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> None:
        """Let the lot send a part of a file, after the request."""
        descriptor = os.dup(file.fileno())
        size = os.fstat(descriptor).st_size - offset
        self.file = (descriptor, offset, size if count is None else min(size, count))

    def shutdown(self, how: int) -> None:
        """Let whoever reads wait no longer, from any thread; or end the answer."""
        if how == socket.SHUT_RD:
            with contextlib.suppress(OSError):  # TLS has a `shutdown` of its own: it forgets keys
                socket.socket.shutdown(self.sock, how)
        else:
            self.is_over = True

    def close(self) -> None:
        """End the answer. The lot closes the connection."""
        self.is_over = True

    def setblocking(self, _flag: bool) -> None:
        """Do nothing: only `recv` and `sendall` wait."""

    def settimeout(self, seconds: float | None) -> None:
        """How long `recv` waits at most."""
        self._timeout = seconds

    def gettimeout(self) -> float | None:
        """How long `recv` waits at most."""
        return self._timeout

    def fileno(self) -> int:
        """The descriptor."""
        return int(self.sock.fileno())

    def _wait(self, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(self.sock.fileno(), event)
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise ConnectionResetError(errno.ECONNRESET, "the peer stalls")


def note_token(environ: dict[str, Any]) -> None:
    """Note that a request has shown a valid token: it does not count for its address."""
    door = environ.get("gunicorn.socket")
    if isinstance(door, Door):
        door.is_known = True


def note_read(environ: dict[str, Any], reader: str) -> None:
    """Note that a request was a plain read of a narinfo, or a plain upload, and by whom."""
    door = environ.get("gunicorn.socket")
    if isinstance(door, Door):
        door.reader = reader
