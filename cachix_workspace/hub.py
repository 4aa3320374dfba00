"""The websockets that are open, by agent, by log and by token."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator

from cachix_workspace.refusal import Refusal
from cachix_workspace.websocket import REPLACED, RESTART, REVOKED, Socket


class Hub:
    """Finds open sockets. Its lock is held for look-ups only, never while anything is sent."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._used: collections.Counter[int] = collections.Counter()  # slots, by token
        self._sockets: set[Socket] = set()
        self._agents: dict[str, Socket] = {}
        self._by_log: dict[str, set[Socket]] = {}
        self._stopping = False

    @contextlib.contextmanager
    def slot(self, token_id: int, most: int) -> Iterator[None]:
        """Use one of the connections that sockets may have. Plain requests need the rest.

        Raises Refusal: 503 if none is left, 429 if the token has `most` already.
        """
        with self._lock:
            if self._stopping:
                raise Refusal(503, "the server restarts")
            if self._used.total() >= self._limit:
                raise Refusal(503, "too many connections: try again later")
            if self._used[token_id] >= most:
                raise Refusal(429, f"this token has {most} websockets already: close some of them")
            self._used[token_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._used[token_id] -= 1
                if not self._used[token_id]:
                    del self._used[token_id]

    @contextlib.contextmanager
    def track(self, sock: Socket, log_id: str | None = None) -> Iterator[None]:
        """Know this socket during the block.

        With `log_id` it is woken when that deployment changes.
        """
        with self._lock:
            self._sockets.add(sock)
            if log_id is not None:
                self._by_log.setdefault(log_id, set()).add(sock)
            if self._stopping:
                sock.end(*RESTART)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)
                if log_id is not None:
                    self._by_log[log_id].discard(sock)
                    if not self._by_log[log_id]:
                        del self._by_log[log_id]

    def register(self, agent_id: str, sock: Socket) -> None:
        """Make this the agent's socket, and close the former one (4001)."""
        with self._lock:
            former = self._agents.get(agent_id)
            self._agents[agent_id] = sock
        if former is not None:
            former.end(*REPLACED)

    def unregister(self, agent_id: str, sock: Socket) -> bool:
        """Forget the agent's socket; whether the agent is gone, while the server goes on."""
        with self._lock:
            current = self._agents.get(agent_id) is sock
            if current:
                del self._agents[agent_id]
            return current and not self._stopping

    def dismiss(self, agent_id: str) -> None:
        """Close the agent's socket (1012): it comes again, if it may."""
        with self._lock:
            sock = self._agents.get(agent_id)
        if sock is not None:
            sock.end(*RESTART)

    def wake_agent(self, agent_id: str) -> None:
        """Let the agent's socket look for a deployment to send."""
        with self._lock:
            sock = self._agents.get(agent_id)
        if sock is not None:
            sock.wake()

    def wake_agents(self) -> None:
        """Let the sockets of all agents look."""
        with self._lock:
            socks = list(self._agents.values())
        for sock in socks:
            sock.wake()

    def wake_viewers(self, *deployment_ids: str) -> None:
        """Let viewers look: these deployments have changed, or their logs have grown."""
        with self._lock:
            viewers = [sock for each in deployment_ids for sock in self._by_log.get(each, ())]
        for viewer in viewers:
            viewer.wake()

    def token_ids(self) -> set[int]:
        """The tokens that open sockets were authenticated with."""
        with self._lock:
            return {sock.token_id for sock in self._sockets}

    def revoke(self, token_ids: set[int]) -> None:
        """Close the sockets of these tokens (4003)."""
        with self._lock:
            revoked = [sock for sock in self._sockets if sock.token_id in token_ids]
        for sock in revoked:
            sock.end(*REVOKED)

    def stop(self) -> None:
        """Close all sockets (1012), and accept no more."""
        with self._lock:
            self._stopping = True
            socks = list(self._sockets)
        for sock in socks:
            sock.end(*RESTART)
