"""The websockets that are open, by agent, by log and by token."""

from __future__ import annotations

import collections
import threading

from cachix_workspace.refusal import Refusal
from cachix_workspace.websocket import REPLACED, RESTART, REVOKED, Socket, wake


class Hub:
    """Finds open sockets. Its lock is held for look-ups only, never while anything is sent."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._used: collections.Counter[int] = collections.Counter()  # slots, by token
        self._total = 0
        self._sockets: set[Socket] = set()
        self._agents: dict[str, Socket] = {}
        self._by_log: dict[str, set[Socket]] = {}
        self._stopping = False
        self._closed = ""  # why no socket is taken now

    def enter(self, token_id: int, most: int) -> None:
        """Use one of the connections that sockets may have. Plain requests need the rest.

        Raises Refusal: 503 if none is left, 429 if the token has `most` already.
        """
        with self._lock:
            if self._stopping:
                raise Refusal(503, "the server restarts")
            if self._closed:
                raise Refusal(503, self._closed)
            if self._total >= self._limit:
                raise Refusal(503, "too many connections: try again later")
            if self._used[token_id] >= most:
                raise Refusal(429, f"this token has {most} websockets already: close some of them")
            self._used[token_id] += 1
            self._total += 1

    def leave(self, token_id: int) -> None:
        """Use a connection no more."""
        with self._lock:
            self._total -= 1
            self._used[token_id] -= 1
            if not self._used[token_id]:
                del self._used[token_id]

    def add(self, sock: Socket) -> None:
        """Know this socket. One of a log is woken when that deployment changes."""
        with self._lock:
            self._sockets.add(sock)
            if sock.log_id is not None:
                self._by_log.setdefault(sock.log_id, set()).add(sock)
            is_late = self._stopping or bool(self._closed)
        if is_late:
            sock.end(*RESTART)

    def remove(self, sock: Socket) -> None:
        """Forget a socket, which uses no connection any more."""
        with self._lock:
            self._sockets.discard(sock)
            if sock.log_id is not None:
                self._by_log[sock.log_id].discard(sock)
                if not self._by_log[sock.log_id]:
                    del self._by_log[sock.log_id]
        self.leave(sock.token_id)

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

    def dismiss(self, *agent_ids: str) -> None:
        """Close the sockets of agents (1012): they come again, if they may."""
        with self._lock:
            socks = [self._agents[each] for each in agent_ids if each in self._agents]
        for sock in socks:
            sock.end(*RESTART)

    def wake_agent(self, *agent_ids: str) -> None:
        """Let the sockets of agents look for a deployment to send."""
        with self._lock:
            socks = [self._agents[each] for each in agent_ids if each in self._agents]
        wake(socks)

    def wake_agents(self) -> None:
        """Let the sockets of all agents look."""
        with self._lock:
            socks = list(self._agents.values())
        wake(socks)

    def wake_viewers(self, *deployment_ids: str) -> None:
        """Let viewers look: these deployments have changed, or their logs have grown."""
        with self._lock:
            viewers = [sock for each in deployment_ids for sock in self._by_log.get(each, ())]
        wake(viewers)

    def wake_all_viewers(self) -> None:
        """Let all viewers look."""
        with self._lock:
            viewers = [sock for socks in self._by_log.values() for sock in socks]
        wake(viewers)

    def agent_ids(self) -> set[str]:
        """The agents that are connected."""
        with self._lock:
            return set(self._agents)

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

    def shut(self, reason: str) -> None:
        """Close all sockets (1012), and accept no more until `open`."""
        with self._lock:
            self._closed = reason
            socks = list(self._sockets)
        for sock in socks:
            sock.end(*RESTART)

    def open(self) -> None:
        """Accept sockets again."""
        with self._lock:
            self._closed = ""

    def stop(self) -> None:
        """Close all sockets (1012), and accept no more."""
        with self._lock:
            self._stopping = True
            socks = list(self._sockets)
        for sock in socks:
            sock.end(*RESTART)
