"""What one part of the workspace lets the others know: the one seam between nodes.

News have a kind and ids, and whoever hears of them looks for himself. `InProcess` is for one node.
`PostgreSQL` also tells the other nodes, by LISTEN and NOTIFY; as a notification may be lost while
there is no connection, whoever hears also looks from time to time. Notifications of a node are
numbered, so that the others know whether they have missed any.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Protocol

logger = logging.getLogger(__name__)

DUE = "due"  # agents whose sockets look: at what is due, at their names and their connections
DISMISSED = "dismissed"  # agents whose sockets are closed: they come again, if they may
GROWN = "grown"  # deployments that have changed, or whose logs have grown: viewers look
CHANGED = "changed"  # topics of the feed for pages
REVOKED = "revoked"  # tokens; without ids some
ALIVE = "alive"  # agents and deployments that have given a sign of life to another node

CHANNEL = "cachix_workspace"
COUNT, END = "count", "end"  # of a node's notifications: notifiers alone hear of these
LOOK_INTERVAL = 10.0  # seconds between two looks of a node that shares its database
COUNTED = 0.4  # of that interval: then a node that has no news tells how many it has told
GATHER = 0.02  # seconds in which news for other nodes become one notification
BACKOFF = 2.0  # seconds until a connection that broke is tried again
MOST_IDS = 120  # in a notification: PostgreSQL takes 8,000 bytes
MOST_KEPT = 20_000  # ids of a kind that wait for a connection; a look finds the others

Hear = Callable[[str, tuple[str, ...]], None]
Look = Callable[[bool], None]  # whether news were lost


class Notifier(Protocol):
    """Lets this node, and the others, know."""

    is_shared: bool  # whether there may be other nodes

    def publish(self, kind: str, ids: Iterable[str] = ()) -> None:
        """Let all know. This node has heard of it on return; nothing waits for the others."""

    def tell(self, kind: str, ids: Iterable[str]) -> None:
        """Let the other nodes know, and not this one."""

    def start(self, hear: Hear, look: Look) -> None:
        """Call `hear` for all news from now on, and `look` when some may have been lost."""

    def close(self) -> None:
        """Say and hear no more."""


def _heard(hear: Hear | None, kind: str, ids: tuple[str, ...]) -> None:
    """Call a hearer. A failure is its own: whoever publishes goes on."""
    if hear is None:
        return
    try:
        hear(kind, ids)
    except Exception:
        logger.exception("news of kind %s were not heard", kind)


class InProcess:
    """News of the only node."""

    is_shared = False

    def __init__(self) -> None:
        self._hear: Hear | None = None

    def publish(self, kind: str, ids: Iterable[str] = ()) -> None:
        """Let this process know."""
        _heard(self._hear, kind, tuple(dict.fromkeys(ids)))

    def tell(self, kind: str, ids: Iterable[str]) -> None:
        """There are no others."""

    def start(self, hear: Hear, look: Look) -> None:
        """Call `hear` for all news from now on: none is lost."""
        self._hear = hear

    def close(self) -> None:
        """Hear no more."""
        self._hear = None


class Losses:
    """Finds out whether notifications of other nodes were lost, by their numbers.

    A node that falls silent without a word may have died before it told its last news.
    """

    def __init__(self, silence: float) -> None:
        self._silence = silence  # seconds
        self._last: dict[tuple[str, str], tuple[int, float]] = {}  # numbers and times, by life
        self._are_lost = False

    def note(self, node: str, life: str, number: int, now: float) -> None:
        """A notification of a node has come, which it has sent as this number of its life."""
        last, _ = self._last.get((node, life), (0, now))
        self._are_lost = self._are_lost or number != last + 1
        self._last[node, life] = (number, now)

    def end(self, node: str, life: str) -> None:
        """A node has said that it will send no more."""
        self._last.pop((node, life), None)

    def take(self, now: float) -> bool:
        """Whether any were lost since this was called last."""
        silent = [key for key, (_, seen) in self._last.items() if seen < now - self._silence]
        for key in silent:
            del self._last[key]
        are_lost, self._are_lost = self._are_lost or bool(silent), False
        return are_lost


class PostgreSQL:
    """News of nodes that share a database, on a connection of its own, by one thread."""

    is_shared = True

    def __init__(
        self, connect: Callable[[], Any], node_id: str, look_interval: float = LOOK_INTERVAL
    ) -> None:
        self._connect, self._node, self._look_interval = connect, node_id, look_interval
        self._hear: Hear | None = None
        self._look: Look = lambda _: None
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, None]] = {}  # ids, in order, by kind
        self._life, self._number = uuid.uuid4().hex[:12], 0  # of the latest notification
        self._losses = Losses(look_interval)
        self._inside, self._outside = os.pipe()
        os.set_blocking(self._outside, False)
        os.set_blocking(self._inside, False)
        self._is_closed = False
        self.is_connected = threading.Event()

    def publish(self, kind: str, ids: Iterable[str] = ()) -> None:
        """Let this node know, and the others soon."""
        if self._is_closed:
            return
        once = tuple(dict.fromkeys(ids))
        _heard(self._hear, kind, once)
        self._queue(kind, once)

    def tell(self, kind: str, ids: Iterable[str]) -> None:
        """Let the other nodes know soon."""
        once = tuple(dict.fromkeys(ids))
        if once:
            self._queue(kind, once)

    def _queue(self, kind: str, once: tuple[str, ...]) -> None:
        with self._lock:
            if self._is_closed:
                return
            waiting = self._waiting.setdefault(kind, {})
            if len(waiting) + len(once) <= MOST_KEPT:
                waiting.update(dict.fromkeys(once))
            else:
                self._number += 1  # which the others will miss
            self._wake()

    def start(self, hear: Hear, look: Look) -> None:
        """Call `hear` for the news of all nodes, and `look` now and then."""
        self._hear, self._look = hear, look
        threading.Thread(target=self._run, name="notifications", daemon=True).start()

    def close(self) -> None:
        """Say and hear no more."""
        with self._lock:
            self._is_closed = True
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake
            os.write(self._outside, b"x")

    def _run(self) -> None:
        is_told = False
        while not self._is_closed:
            try:
                with contextlib.closing(self._connect()) as connection:
                    is_told = False
                    self._serve(connection)
            except Exception as error:  # of psycopg, or none; this thread is the only one
                self.is_connected.clear()
                if not is_told and not self._is_closed:
                    reason = str(error).partition("\n")[0]
                    logger.warning("other nodes can't be heard: %s", reason)
                is_told = True
                time.sleep(BACKOFF)

    def _serve(self, connection: Any) -> None:
        """Listen and tell until the connection breaks. Raises psycopg.Error or OSError."""
        connection.add_notify_handler(lambda note: self._take(note.payload))
        # a notification is worth no wait for the disk
        connection.execute("SET synchronous_commit = off")
        connection.execute(f"LISTEN {CHANNEL}")
        self.is_connected.set()
        self._losses = Losses(self._look_interval)
        self._look_around(True)  # what came before is lost
        looked = told = time.monotonic()
        counted, interval = 0.0, self._look_interval
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(self._inside, selectors.EVENT_READ)
            while not self._is_closed:
                now = time.monotonic()
                if now >= counted + interval * COUNTED:
                    counted = now
                    self._queue(COUNT, ())
                due = min(looked + interval, counted + interval * COUNTED)
                selector.select(max(0.0, due - now))
                self._receive(connection)
                time.sleep(max(0.0, told + GATHER - time.monotonic()))
                self._tell(connection)
                told = time.monotonic()
                if told >= looked + interval:
                    looked = told
                    self._look_around(self._losses.take(told))
            self._send(connection, [self._record(END, [])])

    def _receive(self, connection: Any) -> None:
        raw = connection.pgconn
        raw.consume_input()  # raises if the server has closed the connection
        while (note := raw.notifies()) is not None:
            self._take(note.extra.decode("utf-8", "replace"))

    def _take(self, payload: str) -> None:
        """Hear a notification, unless it is our own."""
        try:
            record = json.loads(payload)
            node, kind, ids = record["node"], str(record["kind"]), tuple(map(str, record["ids"]))
            # older nodes do not count
            life, number = str(record.get("life", "")), int(record.get("number", 0))
        except (ValueError, KeyError, TypeError):
            logger.warning("a notification has no news: %s", payload[:100])
            return
        if node == self._node:
            return
        if life:
            self._losses.note(node, life, number, time.monotonic())
            if kind == END:
                self._losses.end(node, life)
        if kind not in (COUNT, END):
            _heard(self._hear, kind, ids)

    def _look_around(self, are_lost: bool) -> None:
        try:
            self._look(are_lost)
        except Exception as error:
            logger.warning("a look for lost news failed: %s", error)

    def _tell(self, connection: Any) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._inside, 1 << 16)
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        parts = ((kind, part) for kind, ids in waiting.items() for part in _parts(list(ids)))
        records = [self._record(kind, part) for kind, part in parts]
        if records:
            self._send(connection, records)

    def _record(self, kind: str, ids: list[str]) -> dict[str, Any]:
        """The next notification. One that can't be sent is missed by its number."""
        with self._lock:
            self._number += 1
            count = {"life": self._life, "number": self._number}
        return {"node": self._node, "kind": kind, "ids": ids, **count}

    def _send(self, connection: Any, records: list[dict[str, Any]]) -> None:
        query = "SELECT pg_notify(%s, payload) FROM unnest(%s::text[]) AS payload"
        connection.execute(query, (CHANNEL, list(map(json.dumps, records))))


def _parts(ids: list[str]) -> list[list[str]]:
    """The ids in parts that fit into a notification; one without ids is a part too."""
    return [ids[first : first + MOST_IDS] for first in range(0, len(ids), MOST_IDS)] or [[]]
