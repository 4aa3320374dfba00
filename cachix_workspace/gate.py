"""The gate: connections that send a request, or wait to, without a thread.

The lot's thread reads heads, and bodies that are small, and hands whole requests to a few threads.
A peer that takes its time costs a descriptor and a little memory, for a bounded time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from typing import Any

from cachix_workspace.door import Door
from cachix_workspace.parking import Lot, Parked
from cachix_workspace.quick import Quick, Read, Write

logger = logging.getLogger(__name__)

KEEP_ALIVE = 75.0  # seconds that an idle connection is kept for an agent's next report
HEAD_TIME = 10.0  # seconds for a whole head, from its first byte on
MAX_FIELDS, MAX_FIELD = 40, 4096  # fields of a head, and bytes of each
MAX_HEAD = MAX_FIELDS * MAX_FIELD
SMALL = 1 << 16  # bytes of a body that is awaited here; larger ones have threads of their own
LINGER = 1.0  # seconds that a peer has to take an answer before its connection is closed
YOUNG = 2.0  # seconds in which a connection is not hung up on for a newer one
PIECE = 1 << 17  # bytes of a file in memory
UNFINISHED = 64 << 20  # bytes of all requests that are not whole: for more nobody gets memory
TOGETHER = 64  # answers from memory that are sent at once

END = b"\r\n\r\n"
LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d{1,15})[ \t]*\r$")
LETTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\r\n")
# For one who speaks TLS, most of the time: an answer lets him see that nobody does here.
NO_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b'Content-Length: 39\r\n\r\n{"error":"this is no request of HTTP"}\n'
)
OPEN_ENDED = re.compile(rb"(?im)^(transfer-encoding|expect):")
WAITS = re.compile(rb"(?im)^expect:[ \t]*100-continue[ \t]*\r\n")
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


class Visitor(Parked):
    """A connection between its requests."""

    __slots__ = (
        "_is_busy",
        "_is_lingering",
        "_kept",
        "_needs",
        "_until",
        "address",
        "conn",
        "file",
        "gate",
        "head",
        "is_known",
        "is_new",
        "since",
    )

    def __init__(self, gate: Gate, conn: Any, address: str) -> None:
        super().__init__()
        self.gate, self.conn, self.address = gate, conn, address
        self.head = bytearray()
        self.file: tuple[int, int, int] | None = None
        self.is_new = True  # it has sent no request
        self.is_known = False  # it has shown a valid token
        self.since = 0.0  # when it came, or came back
        self._needs = 0  # bytes of head and body; 0 while the head is not whole
        self._kept: Door | None = None  # an answer that the peer has not taken yet
        self._is_lingering = self._is_busy = False  # busy: a thread reads a narinfo for it
        self._until = 0.0  # how long the peer may take

    def answered(self, door: Door, is_kept: bool, rest: bytes) -> None:
        """Be ready for the lot after a request, to send what is left of its answer."""
        self.is_known, self.is_new = self.is_known or door.is_known, False
        self.head = bytearray(rest)
        self.file, self._kept, self._needs = door.file, door, 0
        self.is_leaving, self._is_lingering = False, not is_kept

    # --- for the lot's thread ---------------------------------------------------------------------

    def is_reading(self) -> bool:
        """Nothing is read while an answer is made, or sent."""
        return self._is_lingering or not (self.output or self.file or self._is_busy)

    def arrived(self) -> None:
        """Send what is left, then wait for a request or the end."""
        self.since = time.monotonic()
        door, self._kept = self._kept, None
        if door is not None and door.kept:
            self.put(bytes(door.kept))
        else:
            self.drained()

    def drained(self) -> None:
        """The peer has taken all that was offered: go on with the file, or settle."""
        if self.file is not None:
            self._send_piece()
        else:
            self._settle()

    def received(self, data: bytes) -> None:
        """Take a part of a request."""
        if self._is_lingering or self.lot is None:
            return
        if not self.head and data[0] not in LETTERS:
            self._is_lingering = True
            self.put(NO_REQUEST)
            return
        is_first = not self.head
        self.head += data
        self._look()
        if self.sock is None or self._is_busy or not self.head:
            return
        if is_first and not self._needs:
            self._give(self.gate.head_time)
        self.gate.note_unfinished(self)

    def timed(self, now: float) -> None:
        """The peer took too long."""
        if self.output or self.file is not None:
            return
        if now < self._until or self._is_busy:
            self.expect(max(self._until, now + LINGER))
            return
        if self._needs:
            self.gate.pass_on(self, is_cut=True)  # the application says so
        elif self.lot is not None:
            self.lot.hang_up(self)

    def lost(self) -> None:
        """The connection is over."""
        if self.file is not None:
            os.close(self.file[0])
            self.file = None
        self.gate.forget(self)

    def _give(self, seconds: float) -> None:
        """Give the peer so long from now on."""
        self._until, self.due = time.monotonic() + seconds, float("inf")
        self.expect(self._until)

    def _send_piece(self) -> None:
        assert self.file is not None
        descriptor, offset, left = self.file
        piece = os.pread(descriptor, min(left, PIECE), offset)
        left -= len(piece)
        if left and piece:
            self.file = (descriptor, offset + len(piece), left)
        else:
            os.close(descriptor)
            self.file = None
            self._is_lingering = self._is_lingering or bool(left)  # the file was cut: so is this
        if piece:
            self.offer(piece)
        else:
            self._settle()

    def _settle(self) -> None:
        """Wait for the next request, or for the peer to close."""
        if self.sock is None or self.lot is None:
            return
        if self._is_lingering:
            self.gate.forget_waiting(self)
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self.is_leaving = True
            self._give(LINGER)
            self.lot.look(self)
            return
        self.gate.wait_for(self)
        if self.sock is None:
            return
        first = min(KEEP_ALIVE, self.gate.receive_timeout)
        idle = first if self.is_new else KEEP_ALIVE
        self._until = time.monotonic() + (self.gate.head_time if self.head else idle)
        self.expect(self._until)  # a reminder that comes too early is harmless
        self.lot.look(self)
        if self.head:
            self._look()

    def _look(self) -> None:
        """Pass the request on if it is whole, or can't become so."""
        if not self._needs:
            if self._read():
                return
            end = self.head.find(END)
            if end < 0:
                if len(self.head) > MAX_HEAD:
                    self.gate.pass_on(self, is_cut=True)  # the parser says what is too long
                return
            head = bytes(self.head[: end + 2])
            match = LENGTH.search(head)
            length = int(match[1]) if match else 0
            if 0 < length <= SMALL and self._bid_go_on(head):
                return
            if length > SMALL or OPEN_ENDED.search(head):
                self.gate.pass_on(self, is_large=True)
                return
            self._needs = end + len(END) + length
            if length and len(self.head) < self._needs:
                self._give(self.gate.receive_timeout)
        if len(self.head) >= self._needs and not self._write():
            self.gate.pass_on(self)

    def _bid_go_on(self, head: bytes) -> bool:
        """Tell a peer to send its small body, if it waits to be told; whether it did.

        Nix does so with each upload, and would keep a thread waiting.
        """
        rest, count = WAITS.subn(b"", head)
        if count != 1 or not head.split(b"\r\n", 1)[0].endswith(b" HTTP/1.1"):
            return False
        self.head[: len(head)] = rest
        self.put(GO_ON)
        return True

    def _read(self) -> bool:
        """Answer reads of narinfos at once, or have a thread do it; whether this is one."""
        answers: list[bytes] = []
        read = self.gate.quick.ask(self.head)
        while read is not None and len(answers) < TOGETHER:
            answer = self.gate.quick.remembered(read) or self.gate.quick.absent(read)
            if answer is None:
                break
            answers.append(answer)
            self._note_read(read)
            read = self.gate.quick.ask(self.head)
        if len(answers) == TOGETHER:
            self.offer(b"".join(answers))  # whoever asks for more lets others have their turn
        elif answers:
            self.put(b"".join(answers))
        elif read is not None:
            self._have_done(self._read_file, read)
        return bool(answers) or read is not None

    def _write(self) -> bool:
        """Have a thread store a small upload; whether this is one."""
        write = self.gate.quick.ask_to_write(self.head, self._needs)
        if write is not None:
            self._have_done(self._store, write, bytes(self.head[write.start : write.size]))
        return write is not None

    def _have_done(self, work: Callable[..., None], *arguments: Any) -> None:
        """Have a thread do what is asked for, while nothing more is read."""
        self._is_busy = True
        self.gate.forget_waiting(self)
        try:
            self.gate.work(work, *arguments)
        except RuntimeError:  # the server has ended
            self.gate.lot.hang_up(self)

    def _note_read(self, read: Read) -> None:
        self.gate.forget_waiting(self)
        self.is_new, self.is_known = False, self.is_known or bool(read.reader)
        self._needs = 0
        del self.head[: read.size]

    def _store(self, write: Write, body: bytes) -> None:
        """Store an upload, in a thread."""
        answer = None
        try:
            answer = self.gate.quick.store(write, body)
        except Exception:
            logger.exception("an upload could not be answered")
        self.gate.lot.call(self._send_answer, write, answer)

    def _read_file(self, read: Read) -> None:
        """Read a narinfo, in a thread."""
        answer = None
        try:
            answer = self.gate.quick.answer(read)
        except Exception:
            logger.exception("a narinfo could not be read")
        self.gate.lot.call(self._send_answer, read, answer)

    def _send_answer(self, read: Read, answer: bytes | None) -> None:
        self._is_busy = False
        if self.sock is None:
            return
        if answer is None:
            self.gate.pass_on(self)
        else:
            self._note_read(read)
            self.put(answer)


class Gate:
    """Who waits at the gate. All but `enter` is for the lot's thread."""

    def __init__(
        self,
        lot: Lot,
        most: int,
        most_of_one: int,
        receive_timeout: float,
        take: Callable[[Visitor, Any, bool, bool], None],
        left: Callable[[], None],
        quick: Quick,
        work: Callable[..., Any],
    ) -> None:
        """`take` gets whole requests, with their sockets, `left` hears of each end.

        `work` has a thread call a function.
        """
        self.lot, self.most, self.most_of_one = lot, most, most_of_one
        self.receive_timeout, self.head_time = receive_timeout, min(HEAD_TIME, receive_timeout)
        self._take, self._left = take, left
        self.quick, self.work = quick, work
        self._waiting: dict[Visitor, None] = {}  # those that came first are first
        self._by_address: dict[str, dict[Visitor, None]] = {}
        self._unfinished: dict[Visitor, int] = {}  # bytes of their requests
        self._unfinished_size = 0
        self._is_closed = False

    def enter(self, conn: Any, address: str) -> None:
        """Take a new connection, from any thread."""
        self.lot.park(Visitor(self, conn, address), conn.sock)

    def close(self) -> None:
        """Hang up on all that have sent nothing, and on all that come later."""
        self._is_closed = True
        for visitor in [each for each in self._waiting if not each.head]:
            self.lot.hang_up(visitor)

    def wait_for(self, visitor: Visitor) -> None:
        """A connection waits for its request. Others that have waited for long may have to go."""
        if self._is_closed and not visitor.head:
            self.lot.hang_up(visitor)
            return
        self._waiting[visitor] = None
        if len(self._waiting) > self.most:
            self._hang_up_on_first(self._waiting)
        if self.most_of_one and not visitor.is_known:
            same = self._by_address.setdefault(visitor.address, {})
            same[visitor] = None
            if len(same) > self.most_of_one:
                self._hang_up_on_first(same)

    def pass_on(self, visitor: Visitor, is_large: bool = False, is_cut: bool = False) -> None:
        """Hand over a request. One that is cut gets no more bytes."""
        self.forget_waiting(visitor)
        self._take(visitor, self.lot.release(visitor), is_large, is_cut)

    def forget(self, visitor: Visitor) -> None:
        """A connection has ended."""
        self.forget_waiting(visitor)
        self._left()

    def note_unfinished(self, visitor: Visitor) -> None:
        """A request has grown, and is not whole."""
        size = len(visitor.head)
        self._unfinished_size += size - self._unfinished.get(visitor, 0)
        self._unfinished[visitor] = size
        if self._unfinished_size > UNFINISHED:
            self.lot.hang_up(visitor)

    def forget_waiting(self, visitor: Visitor) -> None:
        """A connection waits no more."""
        self._unfinished_size -= self._unfinished.pop(visitor, 0)
        self._waiting.pop(visitor, None)
        same = self._by_address.get(visitor.address)
        if same is not None:
            same.pop(visitor, None)
            if not same:
                del self._by_address[visitor.address]

    def _hang_up_on_first(self, visitors: dict[Visitor, None]) -> None:
        first = next(iter(visitors))
        if first.since < time.monotonic() - YOUNG:
            self.lot.hang_up(first)
