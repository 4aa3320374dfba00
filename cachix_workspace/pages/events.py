"""The stream of changes that open pages follow: server-sent events."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

from flask import Blueprint, Response, request

from cachix_protocol import dumps
from cachix_workspace import people
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.feed import ALL
from cachix_workspace.pages.access import COOKIE, current, page
from cachix_workspace.refusal import Refusal

events_pages = Blueprint("events", __name__)

PAUSE = 0.5  # seconds between two messages: changes meanwhile are told together
QUIET = 15.0  # seconds without a change after which a comment shows that the stream lives
LASTS = 3600.0  # seconds until a browser must ask again, and show who it is
MOST_TOPICS = 200  # in one message: more mean `all`
MOST_OF_ONE = 8  # streams of one session: the tabs of a browser share one


class Readers:
    """How many streams each session has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def enter(self, key: str) -> None:
        """Count a stream. Raises Refusal (429) if there are MOST_OF_ONE."""
        with self._lock:
            if self._counts[key] >= MOST_OF_ONE:
                raise Refusal(429, f"this session has {MOST_OF_ONE} streams already")
            self._counts[key] += 1

    def leave(self, key: str) -> None:
        """Count a stream no more."""
        with self._lock:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]


readers = Readers()


@page(events_pages, "/events")
def get_events() -> Response:
    """Changes after `Last-Event-ID`, or after the number in `since`."""
    text = request.headers.get("Last-Event-ID") or request.args.get("since", "")
    after = int(text) if text.isascii() and text.isdigit() and len(text) < 18 else 0
    one = current()
    workspace, key = current_workspace(), f"{one.session_id}/{one.name}"
    readers.enter(key)
    answer = Response(_stream(workspace, after, request.cookies.get(COOKIE, "")))
    answer.call_on_close(lambda: readers.leave(key))
    answer.mimetype = "text/event-stream"
    answer.headers["X-Accel-Buffering"] = "no"  # nginx would keep messages back
    return answer


def _stream(workspace: Workspace, after: int, cookie: str) -> Iterator[bytes]:
    """The messages, until the workspace stops, the session ends or LASTS seconds are over."""
    end = time.monotonic() + LASTS
    yield b"retry: 2000\n\n"
    while time.monotonic() < end:
        found = workspace.feed.wait(after, QUIET)
        if found is None:
            return
        after, topics = found
        if not topics:
            if not _is_valid(workspace, cookie):
                return
            yield b": alive\n\n"
            continue
        told = topics if len(topics) <= MOST_TOPICS else [ALL]
        yield f"id: {after}\ndata: {dumps(told)}\n\n".encode()
        time.sleep(PAUSE)


def _is_valid(workspace: Workspace, cookie: str) -> bool:
    """Whether the session goes on; a proxy in front sees to it by itself."""
    if not cookie:
        return bool(workspace.settings.auth_header)
    with workspace.database.read() as connection:
        return people.viewer(connection, cookie) is not None
