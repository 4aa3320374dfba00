"""The stream of changes that open pages follow: server-sent events."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from flask import Blueprint, Response, request

from cachix_protocol import dumps
from cachix_workspace import people
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.database import reason_of
from cachix_workspace.feed import ALL
from cachix_workspace.pages.access import COOKIE, current, page
from cachix_workspace.parking import Parked
from cachix_workspace.turns import Guest

logger = logging.getLogger(__name__)

events_pages = Blueprint("events", __name__)

PAUSE = 0.5  # seconds between two messages: changes meanwhile are told together
QUIET = 15.0  # seconds after which a comment shows that the stream lives, if the session does
LOOK = 1.0  # seconds between two looks whether it shall end
LASTS = 3600.0  # seconds until a browser must ask again, and show who it is
MOST_TOPICS = 200  # in one message: more mean `all`
MOST_OF_ONE = 8  # streams of one session: the tabs of a browser share one


class Readers:
    """The streams of each session. The newest ones count: it has left the pages of the others.

    A server hears of that only when it sends something.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[str, list[Stream]] = {}

    def enter(self, stream: Stream) -> None:
        """Know a stream of a session. It ends the oldest one if there are MOST_OF_ONE."""
        oldest = None
        with self._lock:
            streams = self._streams.setdefault(stream.key, [])
            if len(streams) == MOST_OF_ONE:
                oldest = streams.pop(0)
            streams.append(stream)
        if oldest is not None:
            oldest.end()

    def leave(self, stream: Stream) -> None:
        """Forget a stream."""
        with self._lock:
            streams = self._streams.get(stream.key, [])
            if stream in streams:
                streams.remove(stream)
            if not streams:
                self._streams.pop(stream.key, None)

    def parked(self) -> list[Guest]:
        """The streams that wait without a thread."""
        with self._lock:
            streams = [each for some in self._streams.values() for each in some]
        return [each.guest for each in streams if each.guest is not None]

    def count(self) -> int:
        """How many streams there are."""
        with self._lock:
            return sum(map(len, self._streams.values()))


class Stream:
    """A stream of a session, until workspace, session or stream end, or LASTS seconds are over."""

    def __init__(self, workspace: Workspace, key: str, after: int, cookie: str) -> None:
        self.workspace, self.key, self.cookie = workspace, key, cookie
        self.after, self.ended = after, threading.Event()
        self.guest: Guest | None = None  # that of a stream without a thread
        self._checked = time.monotonic()
        self._end = self._checked + LASTS

    def end(self) -> None:
        """End it, from any thread."""
        self.ended.set()
        if self.guest is not None:
            self.workspace.turns.call(self.guest)

    def next(self, timeout: float) -> tuple[bytes, bool]:
        """The next message, perhaps an empty one, and whether there are more to come."""
        if time.monotonic() > self._end or self.ended.is_set():
            return b"", False
        changes = self.workspace.feed.wait(self.after, timeout)
        if changes is None:
            return b"event: restart\ndata: []\n\n", False
        self.after, topics = changes
        message = b""
        if topics:
            names = topics if len(topics) <= MOST_TOPICS else [ALL]
            message = f"id: {self.after}\ndata: {dumps(names)}\n\n".encode()
        if time.monotonic() > self._checked + QUIET:
            self._checked = time.monotonic()
            if not self._is_valid():
                return b"", False
            message += b": alive\n\n"
        return message, True

    def _is_valid(self) -> bool:
        """Whether the session goes on; a proxy in front sees to it by itself."""
        if not self.cookie:
            return bool(self.workspace.settings.auth_header)
        with self.workspace.database.read() as connection:
            return people.viewer(connection, self.cookie) is not None

    def __iter__(self) -> Iterator[bytes]:
        """The messages, by a thread that waits for them."""
        goes_on, message = True, b"retry: 2000\n\n"
        while goes_on:
            if message:
                yield message
            if message.startswith(b"id:"):
                self.ended.wait(PAUSE)
            message, goes_on = self.next(LOOK)
        if message:
            yield message


readers = Readers()


class ParkedStream(Parked):
    """The connection of a stream."""

    __slots__ = ("guest", "head")

    def __init__(self, head: bytes, guest: Reader) -> None:
        super().__init__()
        self.head, self.guest = head, guest

    def arrived(self) -> None:
        """Send the head of the answer."""
        self.put(self.head)
        self.wake()

    def taken(self) -> None:
        """Look whether there is more."""
        self.wake()

    def lost(self) -> None:
        """Leave."""
        self.guest.stream.ended.set()
        self.wake()

    def wake(self) -> None:
        """Have the stream looked at."""
        self.guest.stream.workspace.turns.call(self.guest)


class Reader(Guest):
    """Looks after a stream that waits without a thread."""

    __slots__ = ("is_over", "looked", "parked", "stream")

    def __init__(self, stream: Stream, head: bytes) -> None:
        super().__init__()
        self.stream, self.looked, self.is_over = stream, 0.0, False
        self.parked = ParkedStream(head + b"retry: 2000\n\n", self)
        stream.guest = self

    @classmethod
    def visit(cls, guests: Sequence[Any]) -> None:
        """Send these streams what has changed."""
        for reader in guests:
            try:
                reader._look()
            except Exception as error:  # the browser comes again
                logger.warning("a stream of changes ends: %s", reason_of(error))
                reader._finish(b"")

    def _look(self) -> None:
        now, turns = time.monotonic(), self.stream.workspace.turns
        if self.is_over or self.parked.lot is None or self.parked.is_clogged:
            return
        is_early = now < self.looked + PAUSE and not self.stream.ended.is_set()
        if is_early:
            turns.call_at(self.looked + PAUSE, self)
            return
        message, goes_on = self.stream.next(0.0)
        if not goes_on:
            self._finish(message)
            return
        if message:
            self.looked = now
            self.parked.lot.call(self.parked.put, message)
        turns.call_at(now + QUIET, self)

    def _finish(self, message: bytes) -> None:
        self.is_over = True
        readers.leave(self.stream)
        if self.parked.lot is not None:
            self.parked.lot.call(self.parked.put, message)
            self.parked.lot.call(self.parked.leave)


class Parking(Response):
    """The answer whose connection is parked: there the messages follow."""

    automatically_set_content_length = False  # it would be 0, and browsers would read no more

    def __init__(self, stream: Stream) -> None:
        super().__init__(mimetype="text/event-stream")
        self.source = stream

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Raises StopIteration, which means to gunicorn that nothing is to be sent."""
        headers = [f"{name}: {value}" for name, value in self.get_wsgi_headers(environ)]
        lines = ["HTTP/1.1 200 OK", "Connection: close", *headers, "", ""]
        reader = Reader(self.source, "\r\n".join(lines).encode("latin-1"))
        readers.enter(self.source)
        self.source.workspace.lot.claim(environ["gunicorn.socket"], reader.parked)
        raise StopIteration


@page(events_pages, "/events")
def get_events() -> Response:
    """Changes after `Last-Event-ID`, or after the number in `since`."""
    text = request.headers.get("Last-Event-ID") or request.args.get("since", "")
    after = int(text) if text.isascii() and text.isdigit() and len(text) < 18 else 0
    one, cookie = current(), request.cookies.get(COOKIE, "")
    stream = Stream(current_workspace(), f"{one.session_id}/{one.name}", after, cookie)
    if "gunicorn.socket" in request.environ and request.method == "GET":
        answer: Response = Parking(stream)
    else:
        readers.enter(stream)
        answer = Response(iter(stream), mimetype="text/event-stream")
        answer.call_on_close(lambda: readers.leave(stream))
    answer.headers["X-Accel-Buffering"] = "no"  # nginx would keep messages back
    return answer


def wake_parked(workspace: Workspace) -> None:
    """Let all streams look: something has changed. This is called in the thread that changed it."""
    parked = readers.parked()
    if parked:
        workspace.turns.call(*parked)
