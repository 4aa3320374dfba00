"""One websocket.

Each has two threads: that of its request, which alone sends messages and decides the end, and a
reader of simple-websocket, which answers pings. The first sleeps on one event, `Socket.event`: a
message came, the peer left, or somebody called `wake` or `end`.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import simple_websocket  # type: ignore[import-untyped]
from wsproto.events import CloseConnection, TextMessage

from cachix_workspace.settings import Settings

logger = logging.getLogger(__name__)

REPLACED = (4001, "another agent of this name has connected")
REVOKED = (4003, "the token was revoked or has expired")
RESTART = (1012, "the server restarts")
INTERNAL_ERROR = (1011, "internal error")
COMPLETE = (1000, "the log is complete")
MAX_MESSAGE = 1 << 20  # bytes
# The reader waits while more is unhandled, and so, by TCP, does the peer.
BACKLOG = 2000  # messages
BACKLOG_SIZE = 1 << 20  # characters
GOODBYE = 2.0  # seconds for the peer to answer a close


class Wire:
    """The connection for simple-websocket: sends whole frames one by one, from any thread."""

    def __init__(self, raw: socket.socket, timeout: float) -> None:
        self.raw, self.timeout = raw, timeout
        self.lock = threading.Lock()
        self.recv, self.fileno = raw.recv, raw.fileno

    def send(self, frame: bytes) -> int:
        """Send all of `frame`. Raises OSError.

        A peer that takes nothing for `timeout` seconds is disconnected.
        """
        with self.lock:
            deadline = time.monotonic() + self.timeout + len(frame) / 100_000
            rest = memoryview(frame)
            try:
                while rest:
                    rest = rest[self.raw.send(rest) :]
                    if rest and time.monotonic() > deadline:
                        raise TimeoutError("the peer reads too slowly")
            except OSError:
                self.hang_up()
                raise
        return len(frame)

    def hang_up(self) -> None:
        """End the connection at once, from any thread."""
        with contextlib.suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Do nothing: gunicorn closes the connection."""


def _reader(target: Any) -> threading.Thread:
    return threading.Thread(target=target, name="websocket-reader", daemon=True)


class Socket(simple_websocket.Server):  # type: ignore[misc]
    """A websocket with locked and bounded sends, messages in batches, and a code for its end."""

    def __init__(
        self, environ: dict[str, Any], token_id: int, settings: Settings, max_message: int
    ) -> None:
        self.token_id = token_id
        self.ending: tuple[int, str] | None = None
        self._taken = threading.Event()
        self.wire = Wire(environ["gunicorn.socket"], settings.send_timeout)
        environ = {**environ, "gunicorn.socket": self.wire}
        # without the header the library can't agree to permessage-deflate
        environ.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)
        super().__init__(
            environ,
            ping_interval=settings.ping_interval,
            max_message_size=max_message,
            receive_bytes=1 << 16,
            thread_class=_reader,
            selector_class=selectors.PollSelector,  # epoll costs a file descriptor a socket
        )

    def _thread(self) -> None:
        """Read, then wake the other thread, which the library fails to do on some errors."""
        try:
            super()._thread()
        except Exception as error:
            logger.debug("a websocket broke the protocol: %s", error)
        finally:
            self.connected = False
            self.event.set()

    def _handle_events(self) -> bool:
        going = bool(super()._handle_events())
        while self._is_full() and self.open:
            self._taken.wait(1)
            self._taken.clear()
        return going

    def _is_full(self) -> bool:
        messages = list(self.input_buffer)
        return len(messages) > BACKLOG or sum(map(len, messages)) > BACKLOG_SIZE

    @property
    def open(self) -> bool:
        """Whether the peer is there, and nobody has ended the socket."""
        return bool(self.connected) and self.ending is None

    def wake(self) -> None:
        """Let the thread that handles this socket look around."""
        self.event.set()

    def end(self, code: int, reason: str) -> None:
        """Ask for a close with this code, from any thread; the first to ask decides."""
        if self.ending is None:
            self.ending = (code, reason)
        self.event.set()

    def take(self, timeout: float) -> list[str | bytes]:
        """The messages that have arrived.

        Waits for one, a wake or an end, for `timeout` seconds at most.
        """
        if not self.input_buffer and self.open:
            self.event.wait(timeout)
        self.event.clear()
        count = len(self.input_buffer)
        messages = list(self.input_buffer[:count])
        del self.input_buffer[:count]
        self._taken.set()
        return messages

    def send_texts(self, texts: Sequence[str]) -> None:
        """Send a message for each text, in one write.

        Raises OSError if the peer is gone or stalls.
        """
        frames = [self.ws.send(TextMessage(data=text)) for text in texts]
        self.wire.send(b"".join(frames))

    def finish(self) -> None:
        """Send the close frame, wait a little for the peer's, and hang up. Never raises."""
        code, reason = self.ending or INTERNAL_ERROR
        if self.connected:
            with contextlib.suppress(Exception):  # the peer may be closing at this moment
                self.wire.send(self.ws.send(CloseConnection(code, reason)))
        self.thread.join(GOODBYE)  # if the peer closed first, the reader may be about to answer
        self.wire.hang_up()
        self.connected = False
        self._taken.set()
        self.thread.join(GOODBYE)
