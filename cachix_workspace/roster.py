"""The roster: agents and their tokens, read all at once when many come at once.

While few come, each is looked up by itself. When a fleet comes back within seconds, those look-ups
would be most of the work: then all are read once in KEPT seconds. A token that was revoked ends its
agents' sockets within that time, as ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import Connection, select

from cachix_protocol import utc_now
from cachix_workspace.tables import agents, tokens
from cachix_workspace.tokens import AGENT, Token, digest, secret_of

KEPT = 2.0  # seconds
MANY = 20  # look-ups within a second, from which on all are read


@dataclass(frozen=True)
class Member:
    """An agent that has connected before."""

    agent_id: str
    token_id: int | None
    enrolled_by: int | None
    owner_id: int | None
    client: str | None
    abilities: str | None
    system: str
    version: str


@dataclass(frozen=True)
class Snapshot:
    """All agents that have connected, and all valid tokens of agents."""

    members: dict[str, Member]  # by name
    tokens: dict[str, Token]  # by hash

    def token(self, authorization: str | None) -> Token | None:
        """The valid token of a header; None if it has to be looked up."""
        secret = secret_of(authorization)
        token = None if secret is None else self.tokens.get(digest(secret))
        return token if token is not None and token.state(utc_now()) == "valid" else None


def comes_again(member: Member | None, token: Token) -> bool:
    """Whether an agent comes with a token as it came before: there is nothing to decide."""
    if member is None or member.token_id != token.id or token.is_unbound:
        return False
    is_counted = token.most is None or member.enrolled_by == token.id
    gets_secret = token.is_enrolment and member.client is not None and member.owner_id is None
    is_owner = token.issued_by is None or member.owner_id == token.id
    return is_counted and not gets_secret and is_owner


class Roster:
    """The latest snapshot, if there is need of one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count, self._since = 0, 0.0
        self._snapshot: Snapshot | None = None
        self._until = 0.0

    def look(self, read: Callable[[], Snapshot]) -> Snapshot | None:
        """A snapshot of the last KEPT seconds; None while few come."""
        now = time.monotonic()
        with self._lock:  # others wait for the one that reads: they would read the same
            if now > self._since + 1:
                is_quiet = self._count < MANY
                self._count, self._since = 0, now
                if is_quiet:
                    self._snapshot = None
            self._count += 1
            if self._snapshot is None and self._count < MANY:
                return None
            if self._snapshot is None or now > self._until:
                self._snapshot = read()
                self._until = now + KEPT
            return self._snapshot

    def forget(self) -> None:
        """Let the next look read anew. One that is being read counts, for KEPT seconds."""
        self._until = 0.0


def read_members(connection: Connection, names: Collection[str] | None = None) -> dict[str, Member]:
    """The agents that have connected, by name: all, or those of these names."""
    keys = (agents.c.token_id, agents.c.enrolled_by, agents.c.owner_id)
    facts = (agents.c.client, agents.c.abilities, agents.c.system, agents.c.version)
    query = select(agents.c.name, agents.c.id, *keys, *facts).where(agents.c.seen_on != "")
    if names is not None:
        query = query.where(agents.c.name.in_(names))
    return {row[0]: Member(*row[1:]) for row in connection.execute(query)}


def read_snapshot(connection: Connection) -> Snapshot:
    """All that is needed to admit agents."""
    valid = (tokens.c.kind == AGENT) & tokens.c.revoked_on.is_(None)
    rows = connection.execute(select(tokens).where(valid))
    by_hash = {row.hash: Token(**row._mapping) for row in rows}
    return Snapshot(read_members(connection), by_hash)
