"""The agents that have ever connected."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from cachix_protocol import utc_now
from cachix_workspace.refusal import Refusal
from cachix_workspace.tables import agents

MAX_FACT = 64  # characters of what an agent says about its machine


@dataclass(frozen=True)
class AgentRow:
    """An agent as the database has it.

    `connected` is what the running server believes, `seen_on` when that last changed.
    """

    id: str
    name: str
    system: str
    version: str
    created_on: str
    seen_on: str
    connected: bool
    last_index: int
    client: str | None
    owner_id: int | None = None
    token_id: int | None = None
    token_since: str | None = None
    enrolled_by: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this is an agent of cachix-deploy, of a release that says so."""
        return self.client is not None


def client_of(user_agent: str) -> str | None:
    """The version of cachix-deploy that a User-Agent header names; None for any other client."""
    match = re.match(r"cachix-deploy/(\S+)", user_agent)
    return match[1][:MAX_FACT] if match is not None and match[1].isprintable() else None


def register(
    connection: Connection, name: str, system: str, version: str, client: str | None = None
) -> AgentRow:
    """Note that the agent `name` has connected. Its first connection creates it."""
    now = utc_now()
    facts = {
        "system": system[:MAX_FACT],
        "version": version[:MAX_FACT],
        "seen_on": now,
        "connected": True,
        "client": client,
    }
    query = select(agents.c.id).where(agents.c.name == name).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        fixed = {"id": str(uuid.uuid4()), "name": name, "created_on": now, "last_index": 0}
        connection.execute(insert(agents).values(**fixed, **facts))
    else:
        connection.execute(update(agents).where(agents.c.id == row.id).values(**facts))
    return find(connection, name)


def find(connection: Connection, name: str | None) -> AgentRow:
    """The agent of this name. Raises Refusal (403) if it has never connected."""
    row = connection.execute(select(agents).where(agents.c.name == (name or ""))).one_or_none()
    if row is None:
        raise Refusal(
            403,
            f"there is no agent {name!r}: "
            "the header `name` must be that of an agent that has connected to /ws",
        )
    return AgentRow(**row._mapping)


def find_known(connection: Connection, name: str) -> AgentRow | None:
    """The agent of this name; None if it has never connected."""
    row = connection.execute(select(agents).where(agents.c.name == name)).one_or_none()
    return None if row is None else AgentRow(**row._mapping)


def find_id(connection: Connection, name: str) -> str:
    """The id of the agent of this name; empty if it has never connected."""
    query = select(agents.c.id).where(agents.c.name == name)
    return connection.execute(query).scalar_one_or_none() or ""


def get(connection: Connection, agent_id: str) -> AgentRow:
    """The agent of a deployment."""
    row = connection.execute(select(agents).where(agents.c.id == agent_id)).one()
    return AgentRow(**row._mapping)


def list_all(connection: Connection) -> list[AgentRow]:
    """All agents by name."""
    rows = connection.execute(select(agents).order_by(agents.c.name))
    return [AgentRow(**row._mapping) for row in rows]


def mark_disconnected(connection: Connection, agent_id: str | None = None) -> None:
    """Note that an agent is gone, or all that were connected: a starting server has none."""
    gone = agents.c.connected if agent_id is None else agents.c.id == agent_id
    connection.execute(update(agents).where(gone).values(connected=False, seen_on=utc_now()))
