"""Connections that wait without a thread: one thread owns all of them, and reads as bytes come.

A request's thread parks its connection here and goes back. From then on only the thread `parking`
touches the socket, which never blocks; other threads ask it to by `Lot.call`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
BLOCK = 1 << 16  # bytes read from a connection at a time
SLICE = 1 << 18  # bytes offered to the kernel at a time
CLOGGED = 1 << 18  # bytes that wait for a peer: nothing more is read from it, or made for it
SLOWEST = 100_000  # bytes a second that a peer must take in the long run
MOMENT = 0.005  # seconds of sending, until it is looked whether anything has come
IDLE = 60.0  # seconds that the thread sleeps if nothing happens


class Parked:
    """A connection in the lot. All methods are called by the lot's thread, and none may block."""

    __slots__ = (
        "due",
        "is_leaving",
        "lot",
        "must_take_by",
        "output",
        "sock",
        "took",
        "wanted",
    )

    def __init__(self) -> None:
        self.lot: Lot | None = None
        self.sock: Any = None  # None once it is over
        self.wanted = 0  # the events that the selector looks for
        self.output = bytearray()
        self.must_take_by = math.inf  # when the peer must have taken all output
        self.took = 0.0  # when it took some of it last
        self.due = math.inf  # when `timed` is called
        self.is_leaving = False  # it is hung up once all output was taken

    @property
    def is_clogged(self) -> bool:
        """Whether much waits for the peer to take it."""
        return len(self.output) > CLOGGED

    def is_reading(self) -> bool:
        """Whether anything may be read now."""
        return not self.is_clogged

    def arrived(self) -> None:
        """The connection is in the lot now."""

    def received(self, data: bytes) -> None:
        """The peer has sent something."""

    def taken(self) -> None:
        """The peer has taken so much that it is not clogged any more."""

    def drained(self) -> None:
        """The peer has taken all output."""

    def timed(self, now: float) -> None:
        """`due` has come. Sets the next one, by `expect`."""

    def lost(self) -> None:
        """The connection is over, whoever ended it."""

    def expect(self, moment: float) -> None:
        """Have `timed` called at this moment, unless it is called earlier."""
        if self.lot is not None and moment < self.due:
            self.due = moment
            self.lot.remind(moment, self)

    def put(self, data: bytes) -> None:
        """Send this after all that was put before. A peer that takes it too slowly is cut off."""
        if self.sock is None or self.is_leaving or self.lot is None:
            return
        now = time.monotonic()
        if not self.output:
            self.must_take_by, self.took = now + self.lot.timeout, now
        self.must_take_by += len(data) / SLOWEST
        self.output += data
        self.lot.flush(self)
        if self.output:
            self.expect(self.lot.latest(self))

    def offer(self, data: bytes) -> None:
        """Send this when the peer takes anything: not at once, so that others have their turn."""
        if self.sock is not None and self.lot is not None:
            self.took = time.monotonic()
            self.must_take_by = self.took + self.lot.timeout + len(data) / SLOWEST
            self.output += data
            self.expect(self.lot.latest(self))
            self.lot.look(self)

    def leave(self) -> None:
        """Hang up as soon as the peer has taken all output."""
        self.is_leaving = True
        if self.lot is not None and not self.output:
            self.lot.hang_up(self)


class Lot:
    """The thread, its selector, and what other threads ask it for."""

    _selector: selectors.BaseSelector
    _bell: socket.socket
    _ear: socket.socket

    def __init__(self, timeout: float = 20.0) -> None:
        """`timeout` is how many seconds a peer has to take what it is sent, beyond SLOWEST."""
        self.timeout = timeout
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_rung = False
        self._reminders: list[tuple[float, int, Parked]] = []
        self._numbers = itertools.count()
        self._claims: dict[int, Parked] = {}  # by the id of the request's socket
        self._parked: set[Parked] = set()
        self._is_empty = threading.Condition()

    def start(self) -> None:
        """Start the thread. Nothing can be parked before."""
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        for end in (self._bell, self._ear):
            end.setblocking(False)
        self._selector.register(self._ear, READ)
        threading.Thread(target=self._run, name="parking", daemon=True).start()

    # --- for any thread ---------------------------------------------------------------------------

    def claim(self, sock: Any, parked: Parked) -> None:
        """Have the connection of this request parked when its thread has left it."""
        self._claims[id(sock)] = parked

    def claimed(self, sock: Any) -> Parked | None:
        """What claims a connection that its request has left; it is claimed no more."""
        return self._claims.pop(id(sock), None)

    def park(self, parked: Parked, sock: Any, rest: bytes = b"") -> None:
        """Take a connection, and what was read from it already."""
        self.call(self._arrive, parked, sock, rest)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the lot's thread call this soon."""
        self._calls.append((function, arguments))
        if not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(OSError):  # full: it will be heard
                self._bell.send(b"x")

    def wait_until_empty(self, timeout: float) -> bool:
        """Wait until nothing is parked any more; whether that came in time."""
        with self._is_empty:
            return self._is_empty.wait_for(lambda: not self._parked, timeout)

    def count(self) -> int:
        """How many connections are parked."""
        return len(self._parked)

    # --- for the lot's thread ---------------------------------------------------------------------

    def remind(self, moment: float, parked: Parked) -> None:
        """Call `parked.timed` at this moment."""
        heapq.heappush(self._reminders, (moment, next(self._numbers), parked))

    def latest(self, parked: Parked) -> float:
        """When the peer must have taken some of the output, or all of it."""
        return min(parked.must_take_by, parked.took + self.timeout) if parked.output else math.inf

    def flush(self, parked: Parked) -> None:
        """Offer the peer what waits for it."""
        was_clogged = parked.is_clogged
        try:
            while parked.output:
                with memoryview(parked.output) as view, view[:SLICE] as part:
                    count = send(parked.sock, part)
                if not count:
                    break
                del parked.output[:count]
                parked.took = time.monotonic()
        except OSError as error:
            logger.debug("a peer is gone: %s", error)
            self.hang_up(parked)
            return
        if not parked.output:
            parked.must_take_by = math.inf
            if parked.is_leaving:
                self.hang_up(parked)
                return
            parked.drained()
        if was_clogged and not parked.is_clogged:
            parked.taken()
        self.look(parked)

    def look(self, parked: Parked) -> None:
        """Let the selector look for what this connection waits for now."""
        if parked.sock is None:
            return
        wanted = (READ if parked.is_reading() else 0) | (WRITE if parked.output else 0)
        if wanted == parked.wanted:
            return
        if not wanted:
            self._selector.unregister(parked.sock)
        elif not parked.wanted:
            self._selector.register(parked.sock, wanted, parked)
        else:
            self._selector.modify(parked.sock, wanted, parked)
        parked.wanted = wanted

    def release(self, parked: Parked) -> Any:
        """Let a connection go, and return its socket, which nobody looks at any more."""
        sock, parked.sock = parked.sock, None
        if parked.wanted:
            self._selector.unregister(sock)
            parked.wanted = 0
        parked.due = math.inf
        self._forget(parked)
        return sock

    def hang_up(self, parked: Parked) -> None:
        """End a connection at once."""
        if parked.sock is None:
            return
        sock = self.release(parked)
        for end in (lambda: sock.shutdown(socket.SHUT_RDWR), sock.close):
            with contextlib.suppress(OSError):
                end()
        parked.output.clear()
        parked.lost()

    def _forget(self, parked: Parked) -> None:
        with self._is_empty:
            self._parked.discard(parked)
            if not self._parked:
                self._is_empty.notify_all()

    def _arrive(self, parked: Parked, sock: Any, rest: bytes) -> None:
        sock.setblocking(False)
        parked.lot, parked.sock = self, sock
        self._parked.add(parked)
        self.look(parked)
        parked.arrived()
        if rest and parked.sock is not None:
            parked.received(rest)
        if isinstance(parked.sock, ssl.SSLSocket) and parked.sock.pending():
            self._serve(parked)  # OpenSSL has it already: no selector sees that

    def _run(self) -> None:
        while True:
            try:
                self._turn()
            except Exception:  # all connections depend on this thread
                logger.exception("the thread of parked connections stumbled")

    def _turn(self) -> None:
        now = time.monotonic()
        pause = self._reminders[0][0] - now if self._reminders else IDLE
        writers = []
        for key, mask in self._selector.select(max(0.0, min(pause, IDLE))):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._ear.recv(4096)
                continue
            if mask & WRITE:
                writers.append(key.data)
            if mask & READ and key.data.sock is not None:
                self._guarded(key.data, self._serve, key.data)
        self._is_rung = False
        for _ in range(len(self._calls)):
            function, arguments = self._calls.popleft()
            self._guarded(_owner(function, arguments), function, *arguments)
        self._flush_some(writers)
        now = time.monotonic()
        while self._reminders and self._reminders[0][0] <= now:
            moment, _, parked = heapq.heappop(self._reminders)
            if parked.due == moment:
                parked.due = math.inf
                self._guarded(parked, self._remember, parked, now)

    def _flush_some(self, writers: list[Parked]) -> None:
        """Send, for a moment: who asks is not to wait for all that take. The rest comes next."""
        until = time.monotonic() + MOMENT
        for parked in writers:
            if parked.sock is not None:
                self._guarded(parked, self.flush, parked)
            if time.monotonic() > until:
                return

    def _guarded(
        self, parked: Parked | None, function: Callable[..., None], *arguments: Any
    ) -> None:
        """Call; a failure ends this connection, and no other."""
        try:
            function(*arguments)
        except Exception:
            logger.exception("a parked connection failed")
            if parked is not None:
                self.hang_up(parked)

    def _remember(self, parked: Parked, now: float) -> None:
        if now >= self.latest(parked):
            logger.debug("a peer takes nothing")
            self.hang_up(parked)
            return
        parked.timed(now)
        if parked.output:
            parked.expect(self.latest(parked))

    def _serve(self, parked: Parked) -> None:
        """Read what has come."""
        try:
            data = receive(parked.sock)
        except OSError as error:
            logger.debug("a peer is gone: %s", error)
            data = b""
        if data:
            parked.received(data)
            self.look(parked)
        elif data is not None:
            self.hang_up(parked)


def _owner(function: Callable[..., None], arguments: tuple[Any, ...]) -> Parked | None:
    """The connection that a call concerns."""
    these = (getattr(function, "__self__", None), *arguments[:1])
    return next((each for each in these if isinstance(each, Parked)), None)


def send(sock: Any, data: memoryview) -> int:
    """Send what the kernel takes now; how many bytes. Raises OSError."""
    try:
        if isinstance(sock, ssl.SSLSocket):  # its class may wait: see tls.py
            return ssl.SSLSocket.send(sock, data)
        return int(sock.send(data))
    except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return 0


def receive(sock: Any, size: int = BLOCK) -> bytes | None:
    """The bytes that are there; none if the peer has ended, None if nothing came. Raises OSError.

    A block holds a whole record of TLS, so that nothing stays behind where no selector sees it.
    """
    try:
        if isinstance(sock, ssl.SSLSocket):
            return ssl.SSLSocket.recv(sock, size)
        return bytes(sock.recv(size))
    except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None
