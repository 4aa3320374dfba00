"""The stream of changes that open pages follow: server-sent events."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from flask import Blueprint, Response, request

from cachix_protocol import dumps
from cachix_workspace import people
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.feed import ALL
from cachix_workspace.pages.access import COOKIE, current, page

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

    def enter(self, key: str) -> Stream:
        """A new stream of a session, which ends the oldest one if there are MOST_OF_ONE."""
        with self._lock:
            streams = self._streams.setdefault(key, [])
            if len(streams) == MOST_OF_ONE:
                streams.pop(0).ended.set()
            streams.append(Stream(key))
            return streams[-1]

    def leave(self, stream: Stream) -> None:
        """Forget a stream."""
        with self._lock:
            streams = self._streams.get(stream.key, [])
            if stream in streams:
                streams.remove(stream)
            if not streams:
                self._streams.pop(stream.key, None)

    def count(self) -> int:
        """How many streams there are."""
        with self._lock:
            return sum(map(len, self._streams.values()))


@dataclass(eq=False)
class Stream:
    """A stream of a session, until it ends."""

    key: str
    ended: threading.Event = field(default_factory=threading.Event)


readers = Readers()


@page(events_pages, "/events")
def get_events() -> Response:
    """Changes after `Last-Event-ID`, or after the number in `since`."""
    text = request.headers.get("Last-Event-ID") or request.args.get("since", "")
    after = int(text) if text.isascii() and text.isdigit() and len(text) < 18 else 0
    one = current()
    stream = readers.enter(f"{one.session_id}/{one.name}")
    messages = _messages(current_workspace(), stream, after, request.cookies.get(COOKIE, ""))
    answer = Response(messages)
    answer.call_on_close(lambda: readers.leave(stream))
    answer.mimetype = "text/event-stream"
    answer.headers["X-Accel-Buffering"] = "no"  # nginx would keep messages back
    return answer


def _messages(workspace: Workspace, stream: Stream, after: int, cookie: str) -> Iterator[bytes]:
    """The messages, until workspace, session or stream end, or LASTS seconds are over."""
    end, checked = time.monotonic() + LASTS, time.monotonic()
    yield b"retry: 2000\n\n"
    while time.monotonic() < end and not stream.ended.is_set():
        found = workspace.feed.wait(after, LOOK)
        if found is None:
            return
        after, topics = found
        if topics:
            told = topics if len(topics) <= MOST_TOPICS else [ALL]
            yield f"id: {after}\ndata: {dumps(told)}\n\n".encode()
            stream.ended.wait(PAUSE)
        if time.monotonic() > checked + QUIET:
            checked = time.monotonic()
            if not _is_valid(workspace, cookie):
                return
            yield b": alive\n\n"


def _is_valid(workspace: Workspace, cookie: str) -> bool:
    """Whether the session goes on; a proxy in front sees to it by itself."""
    if not cookie:
        return bool(workspace.settings.auth_header)
    with workspace.database.read() as connection:
        return people.viewer(connection, cookie) is not None
