"""Websockets: /ws, /ws-deployment and the log sockets, and the hub that knows which are open.

Each socket has the thread of its request, which alone sends messages and decides the end, and a reader thread of
simple-websocket, which answers pings. The first sleeps on one event, `Socket.event`: a message came, the peer left, or
somebody called `wake` or `end`.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import simple_websocket  # type: ignore[import-untyped]
from sqlalchemy import Connection
from wsproto.events import CloseConnection, TextMessage

from cachix_protocol import (
    FAILED,
    IN_PROGRESS,
    SUCCEEDED,
    TERMINAL,
    AgentRegistered,
    DeploymentStarted,
    FromAgent,
    Undecodable,
    decode_from_agent,
    encode_to_agent,
)
from cachix_workspace import Refusal, Settings, cache, deployments, logs
from cachix_workspace.tables import Database
from cachix_workspace.tokens import Token

logger = logging.getLogger("workspace")

REPLACED = (4001, "another agent of this name has connected")
REVOKED = (4003, "the token was revoked or has expired")
RESTART = (1012, "the server restarts")
INTERNAL_ERROR = (1011, "internal error")
COMPLETE = (1000, "the log is complete")
MAX_MESSAGE = 1 << 20  # bytes
MAX_LINE = (
    32 << 20
)  # bytes on a log socket: Cachix's agent sends a line of any length in one message
BACKLOG = 2000  # messages read but not yet handled; the reader waits beyond, and so, by TCP, does the peer
BACKLOG_SIZE = 1 << 20  # characters of them
IDLE = 60.0  # seconds after which a sleeping thread looks around without being woken
GOODBYE = 2.0  # seconds for the peer to answer a close
LOG_GRACE = 3.0  # seconds that a viewer waits for the last lines of a deployment that has ended


class Wire:
    """The connection as simple-websocket uses it: whole frames, one after the other, from any thread."""

    def __init__(self, raw: socket.socket, timeout: float) -> None:
        self.raw, self.timeout = raw, timeout
        self.lock = threading.Lock()
        self.recv, self.fileno = raw.recv, raw.fileno

    def send(self, frame: bytes) -> int:
        """Send all of `frame`. A peer that takes nothing for `timeout` seconds is hung up on. Raises OSError."""
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
        """Nothing: the server closes what it has opened."""


def _reader(target: Any) -> threading.Thread:
    return threading.Thread(target=target, name="websocket-reader", daemon=True)


class Socket(simple_websocket.Server):  # type: ignore[misc]
    """A websocket whose sends are locked and bounded, whose messages are taken in batches, and whose end has a code."""

    def __init__(
        self, environ: dict[str, Any], token_id: int, settings: Settings, max_message: int
    ) -> None:
        self.token_id = token_id
        self.agent_id: str | None = None
        self.ending: tuple[int, str] | None = None
        self._taken = threading.Event()
        self.wire = Wire(environ["gunicorn.socket"], settings.send_timeout)
        environ = {**environ, "gunicorn.socket": self.wire}
        environ.pop(
            "HTTP_SEC_WEBSOCKET_EXTENSIONS", None
        )  # else the library agrees to permessage-deflate
        super().__init__(
            environ,
            ping_interval=settings.ping_interval,
            max_message_size=max_message,
            receive_bytes=1 << 16,
            thread_class=_reader,
            selector_class=selectors.PollSelector,  # epoll would cost a file descriptor for each socket
        )

    def _thread(self) -> None:
        """The reader. However it ends, the other thread is told (the library forgets to on some errors)."""
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
        return (
            len(self.input_buffer) > BACKLOG
            or sum(map(len, list(self.input_buffer))) > BACKLOG_SIZE
        )

    @property
    def open(self) -> bool:
        """Whether it goes on: the peer is there, and nobody has ended it."""
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
        """The messages that have arrived. Waits for one, a wake or an end, `timeout` seconds at most."""
        if not self.input_buffer and self.open:
            self.event.wait(timeout)
        self.event.clear()
        count = len(self.input_buffer)
        messages = list(self.input_buffer[:count])
        del self.input_buffer[:count]
        self._taken.set()
        return messages

    def send_texts(self, texts: Sequence[str]) -> None:
        """Send one message each, in as few writes as possible. Raises OSError where the peer is gone or stalls."""
        frames = []
        for text in texts:
            frames.append(self.ws.send(TextMessage(data=text)))
        self.wire.send(b"".join(frames))

    def finish(self) -> None:
        """Send the close frame, wait a little for the peer's, hang up. Never raises."""
        code, reason = self.ending or INTERNAL_ERROR
        if self.connected:
            with contextlib.suppress(Exception):  # the peer may be closing at this moment
                self.wire.send(self.ws.send(CloseConnection(code, reason)))
        self.thread.join(
            GOODBYE
        )  # also where the peer closed first: the reader may be about to answer
        self.wire.hang_up()
        self.connected = False
        self._taken.set()
        self.thread.join(GOODBYE)


class Hub:
    """Which sockets are open. Its lock is held for look-ups only, never while anything is sent."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._held = 0
        self._sockets: set[Socket] = set()
        self._agents: dict[str, Socket] = {}
        self._by_log: dict[str, set[Socket]] = {}
        self._stopping = False

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """One of the connections that sockets may hold: plain requests need the rest. Raises Refusal (503)."""
        with self._lock:
            if self._stopping or self._held >= self._limit:
                raise Refusal(
                    503,
                    "the server restarts"
                    if self._stopping
                    else "too many connections: try again later",
                )
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1

    @contextlib.contextmanager
    def holding(self, opened: Socket, log_id: str | None = None) -> Iterator[None]:
        """Know this socket while the block runs; with `log_id` it is woken when that deployment changes."""
        with self._lock:
            self._sockets.add(opened)
            if log_id is not None:
                self._by_log.setdefault(log_id, set()).add(opened)
            if self._stopping:
                opened.end(*RESTART)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(opened)
                if log_id is not None:
                    self._by_log[log_id].discard(opened)
                    if not self._by_log[log_id]:
                        del self._by_log[log_id]

    def register(self, agent_id: str, opened: Socket) -> None:
        """This socket is the agent's now; one that was before is closed (4001)."""
        with self._lock:
            former = self._agents.get(agent_id)
            self._agents[agent_id] = opened
        if former is not None:
            former.end(*REPLACED)

    def unregister(self, agent_id: str, left: Socket) -> bool:
        """Whether the agent is gone by that, and the server goes on."""
        with self._lock:
            current = self._agents.get(agent_id) is left
            if current:
                del self._agents[agent_id]
            return current and not self._stopping

    def wake_agent(self, agent_id: str) -> None:
        """Something may be due for the agent."""
        with self._lock:
            opened = self._agents.get(agent_id)
        if opened is not None:
            opened.wake()

    def wake_viewers(self, *deployment_ids: str) -> None:
        """These deployments have changed, or their logs have grown."""
        with self._lock:
            viewers = [opened for each in deployment_ids for opened in self._by_log.get(each, ())]
        for viewer in viewers:
            viewer.wake()

    def reports_by_log(self, agent_id: str, deployment_id: str) -> bool:
        """Whether that agent has the deployment's log socket open: it is at work and needs no reminder."""
        with self._lock:
            return any(
                opened.agent_id == agent_id for opened in self._by_log.get(deployment_id, ())
            )

    def token_ids(self) -> set[int]:
        with self._lock:
            return {opened.token_id for opened in self._sockets}

    def revoke(self, token_ids: set[int]) -> None:
        """Close the sockets of tokens that no longer count."""
        with self._lock:
            ended = [opened for opened in self._sockets if opened.token_id in token_ids]
        for opened in ended:
            opened.end(*REVOKED)

    def stop(self) -> None:
        """Close all sockets (1012), and take no more."""
        with self._lock:
            self._stopping = True
            ended = list(self._sockets)
        for opened in ended:
            opened.end(*RESTART)


class Handlers:
    """What is done on each kind of socket."""

    def __init__(self, database: Database, hub: Hub, settings: Settings) -> None:
        self.database, self.hub, self.settings = database, hub, settings

    def agent(
        self, opened: Socket, token: Token, name: str, system: str, version: str, host: str
    ) -> None:
        """/ws: say who the agent is, then send what is due whenever there is something."""
        with self.database.write() as connection:
            agent = deployments.register(connection, name, system, version)
            known = cache.for_agent(connection, token.cache_id, self.settings, host)
        self.hub.register(agent.id, opened)
        try:
            opened.send_texts([encode_to_agent(AgentRegistered(agent.id, known, "http"))])
            sent = self._deliver(opened, agent.id, None)
            while opened.open:
                opened.take(IDLE)
                sent = self._deliver(opened, agent.id, sent)
        finally:
            if self.hub.unregister(agent.id, opened):
                with self.database.write() as connection:
                    deployments.disconnected(connection, agent.id)

    def _deliver(self, opened: Socket, agent_id: str, sent: int | None) -> int:
        """Send what is due beyond index `sent` (None: the agent registers); the highest index sent on this socket."""
        if not opened.open:
            return sent or 0
        with self.database.read() as connection:
            order = deployments.due(connection, agent_id, registering=sent is None)
        if order is None or order.index <= (sent or 0):
            return sent or 0
        if order.resumed and self.hub.reports_by_log(agent_id, order.id):
            return 0
        opened.send_texts([encode_to_agent(order)])
        return order.index

    def deployment(self, opened: Socket, name: str) -> None:
        """/ws-deployment: reports of Cachix's agent; or nothing at all, where ours tries whether it gets through."""
        while True:
            messages = opened.take(IDLE)
            for message in messages:
                try:
                    self._report(name, decode_from_agent(message))
                except (Undecodable, Refusal) as error:
                    logger.warning(
                        "skipped a message of agent %s on /ws-deployment: %s", name, error
                    )
            if not messages and not opened.open:
                return

    def _report(self, name: str, command: FromAgent) -> None:
        if isinstance(command, DeploymentStarted):
            told = deployments.Report(IN_PROGRESS, command.time, command.closure_size)
        else:
            told = deployments.Report(SUCCEEDED if command.has_succeeded else FAILED, command.time)
        with self.database.write() as connection:
            record = deployments.find_own(connection, name, command.id)
            record, accepted = deployments.report(connection, record, told)
        if not accepted:
            logger.warning(
                "agent %s says %s of a deployment that is %s", name, told.status, record.status
            )
        self.hub.wake_agent(record.agent_id)
        self.hub.wake_viewers(record.id)

    def write_log(self, opened: Socket, name: str, deployment_id: str) -> None:
        """A log socket of Cachix's agent: one line in each message."""
        with self.database.read() as connection:
            opened.agent_id = deployments.agent_of(connection, name).id
        while True:
            messages = opened.take(IDLE)
            lines = []
            for message in messages:
                try:
                    lines.append(logs.decode(message))
                except Undecodable as error:
                    logger.warning("skipped a line of deployment %s: %s", deployment_id, error)
            if lines:
                with self.database.write() as connection:
                    logs.append(
                        connection,
                        deployments.find_own(connection, name, deployment_id),
                        None,
                        lines,
                    )
                self.hub.wake_viewers(deployment_id)
            if not messages and not opened.open:
                return

    def view_log(self, opened: Socket, deployment_id: str) -> None:
        """A viewer: all lines from the first on; closed when the deployment has ended and nothing more is to come."""
        offset, last, quiet_since = 0, "", 0.0
        while opened.open:
            with self.database.read() as connection:
                record = deployments.find(connection, deployment_id)
                lines = logs.read(connection, record.id, offset)
            if lines:
                opened.send_texts(lines)
                offset, last, quiet_since = offset + len(lines), lines[-1], time.monotonic()
                continue
            wait = IDLE
            if record.status in TERMINAL:
                quiet_since = quiet_since or time.monotonic()
                wait = quiet_since + LOG_GRACE - time.monotonic()
                if wait <= 0 or _is_complete(record, last):
                    opened.end(*COMPLETE)
                    return
            opened.take(wait)


def _is_complete(record: deployments.Record, last: str) -> bool:
    """Whether no more lines are to come: none was ever to, or the agent has written its closing line."""
    if record.started_on is None and record.log_next == 0:
        return True
    return bool(last) and logs.is_closing(last)


def mark_all_disconnected(connection: Connection) -> None:
    """A server that starts has no agents yet."""
    deployments.disconnected(connection)
