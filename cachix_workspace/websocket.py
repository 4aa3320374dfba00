"""One websocket: its frames by wsproto, what it has received, and the code for its end.

The lot's thread reads and sends; any thread may call `take`, `send_texts`, `wake` and `end`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from wsproto import ConnectionType, WSConnection
from wsproto.connection import Connection, ConnectionState
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Message,
    Ping,
    Pong,
    Request,
)
from wsproto.utilities import ProtocolError, RemoteProtocolError

from cachix_workspace.parking import Parked
from cachix_workspace.settings import Settings
from cachix_workspace.turns import Guest, Turns

logger = logging.getLogger(__name__)

REPLACED = (4001, "another agent of this name has connected")
REVOKED = (4003, "the token was revoked or has expired")
RESTART = (1012, "the server restarts")
UNAVAILABLE = (1013, "the workspace can't use its database: try again later")
INTERNAL_ERROR = (1011, "internal error")
COMPLETE = (1000, "the log is complete")
SILENT = (1008, "Ping/Pong timeout")
TOO_SLOW = (1008, "the message came too slowly, or too many are as large")
TOO_MANY = (1008, "too many pings, pongs or empty frames")
TOO_BIG = (1009, "Message is too big")
MAX_MESSAGE = 1 << 20  # bytes
# Nothing is read while more is unhandled, and so, by TCP, the peer waits.
BACKLOG = 2000  # messages
LARGE = 1 << 20  # characters of a message that is not whole, beyond which few may be
MOST_LARGE = 2  # at a time
LARGE_TIME = 60.0  # seconds for a large message to become whole
BACKLOG_SIZE = 1 << 20  # characters
MOST_EMPTY = 1000  # frames without a message between two pings of ours; a peer needs two
PING = b"\x89\x00"  # a frame
TICK = 0.2  # seconds: pings are put off to a multiple of this, so that many go, and come, at once
GOODBYE = 2.0  # seconds for the peer to answer a close
HEADERS = ("Host", "Upgrade", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version")


class Handshake:
    """The handshake of a request that asks to become a websocket. No compression is agreed to."""

    def __init__(self, headers: Any) -> None:
        """Raises ProtocolError or UnicodeError if the request can't become one."""
        fields = ((name, headers.get(name)) for name in HEADERS)
        lines = [f"{name}: {value}" for name, value in fields if value is not None]
        server = WSConnection(ConnectionType.SERVER)
        server.receive_data("\r\n".join(["GET / HTTP/1.1", *lines, "", ""]).encode())
        if not any(isinstance(event, Request) for event in server.events()):
            raise RemoteProtocolError("it is not whole")
        self.answer = server.send(AcceptConnection())
        assert server.connection is not None
        self.protocol: Connection = server.connection


class LargeMessages:
    """Sockets whose message is large and not whole: a few at a time, the others wait unread.

    Only the lot's thread uses it.
    """

    def __init__(self) -> None:
        self._here: set[Socket] = set()
        self._waiting: dict[Socket, None] = {}

    def enter(self, sock: Socket) -> bool:
        """Whether a message may grow now; if not, `go_on` is called later."""
        if len(self._here) < MOST_LARGE:
            self._here.add(sock)
            return True
        self._waiting[sock] = None
        return False

    def leave(self, sock: Socket) -> None:
        """A message is whole, or its socket has ended. The next one may go on."""
        self._waiting.pop(sock, None)
        self._here.discard(sock)
        while self._waiting and len(self._here) < MOST_LARGE:
            first = next(iter(self._waiting))
            del self._waiting[first]
            self._here.add(first)
            first.go_on()


large_messages = LargeMessages()


class Socket(Parked):
    """A parked websocket."""

    __slots__ = (
        "_empty",
        "_greeting",
        "_inbox",
        "_is_deaf",
        "_is_large",
        "_is_waiting",
        "_large_by",
        "_is_full",
        "_parts",
        "_parts_size",
        "_protocol",
        "_settings",
        "_size",
        "_was_pinged",
        "_next_ping",
        "connected",
        "ending",
        "guest",
        "log_id",
        "max_message",
        "token_id",
        "turns",
    )

    def __init__(
        self,
        handshake: Handshake,
        turns: Turns,
        token_id: int,
        settings: Settings,
        max_message: int = MAX_MESSAGE,
        log_id: str | None = None,
    ) -> None:
        super().__init__()
        self.turns, self.token_id, self.log_id = turns, token_id, log_id
        self.max_message = max_message
        self.guest: Guest | None = None  # whoever handles it
        self.connected = True
        self.ending: tuple[int, str] | None = None
        self._settings = settings
        self._greeting = handshake.answer
        self._protocol = handshake.protocol
        self._inbox: list[str | bytes] = []
        self._size = 0  # characters that came since it was looked how many are unhandled
        self._parts: list[str | bytes] = []  # of a message that is not whole
        self._parts_size = 0
        self._is_full = self._is_deaf = self._was_pinged = False
        self._is_large = self._is_waiting = False
        self._large_by = math.inf  # when a large message must be whole
        self._next_ping = 0.0
        self._empty = 0  # frames without a message since our last ping

    # --- for any thread ---------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether the peer is there, and nobody has ended the socket."""
        return self.connected and self.ending is None

    def wake(self) -> None:
        """Let whoever handles this socket look around."""
        if self.guest is not None:
            self.turns.call(self.guest)

    def end(self, code: int, reason: str) -> None:
        """Close with this code, from any thread; the first to ask decides."""
        if self.ending is None:
            self.ending = (code, reason)
            if self.lot is not None:
                self.lot.call(self._say_goodbye)
            self.wake()

    def take(self) -> list[str | bytes]:
        """The messages that have arrived."""
        count = len(self._inbox)
        messages = self._inbox[:count]
        del self._inbox[:count]
        if self._is_full and self.lot is not None:
            self.lot.call(self._read_on)
        return messages

    def send_texts(self, texts: Sequence[str]) -> None:
        """Send a message for each text."""
        if self.lot is not None:
            self.lot.call(self._put_frames, b"".join(map(frame_of, texts)))

    def send_many(self, frames: bytes, will_wake: bool = True) -> None:
        """Send these frames, and wake the handler once the peer may be sent more."""
        if self.lot is not None:
            self.lot.call(self._put_frames, frames, will_wake)

    # --- for the lot's thread ---------------------------------------------------------------------

    def is_reading(self) -> bool:
        """Whether anything may be read now."""
        return not (self._is_full or self._is_waiting or self.is_clogged)

    def arrived(self) -> None:
        """Answer the handshake, and let the handler begin."""
        self.put(self._greeting)
        self._greeting = b""
        self._next_ping = _together(time.monotonic() + self._settings.ping_interval)
        self.expect(self._next_ping)
        if self.ending is not None:
            self._say_goodbye()
        self.wake()

    def received(self, data: bytes) -> None:
        """Take frames apart."""
        if self._is_deaf:
            return
        try:
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                self._handle(event)
                if self._is_deaf or self.sock is None:
                    return
        except (ProtocolError, UnicodeError) as error:
            logger.debug("a websocket broke the protocol: %s", error)
            self._hang_up()
        if len(self._inbox) > BACKLOG or self._size > BACKLOG_SIZE:
            self._is_full = self._is_over_full()

    def taken(self) -> None:
        """Let the handler send more."""
        self.wake()

    def timed(self, now: float) -> None:
        """Ping the peer, or hang up on one that does not answer."""
        if self.ending is not None or not self.connected:
            self._hang_up()  # it had time to say goodbye
            return
        if now >= self._large_by:
            self.end(*TOO_SLOW)
            return
        if now >= self._next_ping:
            if self._was_pinged and self.is_reading():  # else its pong is unread
                self.end(*SILENT)
                return
            self._was_pinged, self._empty = True, 0
            self.put(PING)
            self._next_ping = _together(now + self._settings.ping_interval)
        self.expect(min(self._next_ping, self._large_by))

    def lost(self) -> None:
        """Let the handler end."""
        self.connected = False
        self._forget_parts()
        self.wake()

    def go_on(self) -> None:
        """Read on: other large messages are whole."""
        self._is_waiting = False
        if self.lot is not None:
            self.lot.look(self)

    def _hang_up(self) -> None:
        if self.lot is not None:
            self.lot.hang_up(self)

    def _put_frames(self, frames: bytes, will_wake: bool = False) -> None:
        if self.ending is None and self.connected:
            self.put(frames)
        if will_wake and not self.is_clogged:  # else `taken` does
            self.wake()

    def _read_on(self) -> None:
        self._is_full = self._is_over_full()
        if self.lot is not None:
            self.lot.look(self)

    def _is_over_full(self) -> bool:
        messages = list(self._inbox)
        self._size = sum(map(len, messages))
        is_full = len(messages) > BACKLOG or self._size > BACKLOG_SIZE
        if is_full:
            self.wake()
        return is_full

    def _say_goodbye(self) -> None:
        """Send the close frame, and wait a little for the peer's."""
        if self.sock is None or self._protocol.state is not ConnectionState.OPEN:
            return
        code, reason = self.ending or INTERNAL_ERROR
        self.put(bytes(self._protocol.send(CloseConnection(code, reason))))
        self.due = float("inf")
        self.expect(time.monotonic() + GOODBYE)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Message):
            self._take_part(event)
        elif isinstance(event, Ping):
            self._count_empty()
            if self._protocol.state is ConnectionState.OPEN:
                self.put(bytes(self._protocol.send(event.response())))
        elif isinstance(event, Pong):
            self._count_empty()
            self._was_pinged = False
        elif isinstance(event, CloseConnection):
            # it is still open if this is no frame of the peer's, but its fault
            if self._protocol.state in (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING):
                self.put(bytes(self._protocol.send(event.response())))
            self.connected = False
            self.due = float("inf")
            self.expect(time.monotonic() + GOODBYE)
            self.leave()

    def _count_empty(self) -> None:
        """End a peer that keeps the thread of all connections busy with nothing."""
        self._empty += 1
        if self._empty > MOST_EMPTY:
            self._is_deaf = True
            self.end(*TOO_MANY)

    def _take_part(self, event: Message[Any]) -> None:
        """Take a message, or a part of one."""
        if self.ending is not None:
            return
        part = event.data if isinstance(event.data, str) else bytes(event.data)
        if part:
            self._parts.append(part)
            self._parts_size += len(part)
        elif not event.message_finished:
            self._count_empty()
        if self._parts_size > LARGE and not self._is_large and not event.message_finished:
            self._is_large, self._large_by = True, time.monotonic() + LARGE_TIME
            self.expect(self._large_by)
            self._is_waiting = not large_messages.enter(self)
        if self._parts_size > self.max_message:
            self._forget_parts()
            self._is_deaf = True
            self.end(*TOO_BIG)
        elif event.message_finished:
            message = part[:0].join(self._parts)  # type: ignore[arg-type]
            self._forget_parts()
            self._size += len(message)
            self._inbox.append(message)
            self.wake()

    def _forget_parts(self) -> None:
        self._parts.clear()
        self._parts_size = 0
        if self._is_large:
            self._is_large, self._large_by = False, math.inf
            large_messages.leave(self)


def _together(moment: float) -> float:
    """The next tick from a moment on."""
    return math.ceil(moment / TICK) * TICK


def frame_of(text: str) -> bytes:
    """The frame of a message that a server sends."""
    data = text.encode()
    size = len(data)
    if size < 126:
        return b"\x81%c%b" % (size, data)
    if size < 1 << 16:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), data)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), data)


def wake(socks: Sequence[Socket]) -> None:
    """Let those who handle these sockets look around, together."""
    guests = [sock.guest for sock in socks if sock.guest is not None]
    if guests:
        socks[0].turns.call(*guests)
