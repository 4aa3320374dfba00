"""The agents that have ever connected."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from cachix_protocol import utc_now
from cachix_workspace.refusal import Refusal
from cachix_workspace.tables import agents

LABEL = re.compile(r"[a-z0-9-]{1,40}")
MAX_LABELS = 20
MAX_DESCRIPTION = 300  # characters
MAX_FACT = 64  # characters of what an agent says about its machine
# what an agent says itself, see machine_state
SAID = ("state_on", "running", "running_since", "profile", "kind", "reboot_since")


@dataclass(frozen=True)
class AgentRow:
    """An agent as the database has it.

    `connected` is what the running server believes, `seen_on` when that last changed; empty if it
    was added and has never connected. `running` and what follows is what the agent says itself.
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
    description: str | None = None
    labels: str | None = None
    paused_on: str | None = None
    paused_by: str | None = None
    deployed: str | None = None
    deployed_on: str | None = None
    state_on: str | None = None
    running: str | None = None
    running_since: str | None = None
    profile: str | None = None
    kind: str | None = None
    reboot_since: str | None = None

    @property
    def has_connected(self) -> bool:
        """Whether it has ever connected: it may have been added before."""
        return bool(self.seen_on)

    @property
    def label_list(self) -> tuple[str, ...]:
        """Its labels, sorted."""
        return labels_of(self.labels)

    @property
    def runs(self) -> str | None:
        """The store path that it runs: as it says itself, else as it was deployed last."""
        return self.running or self.deployed

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
    """Note that the agent `name` has connected. Its first connection creates it.

    What another program, or another release, has said of the machine is forgotten: this one may
    say nothing.
    """
    now = utc_now()
    facts = {
        "system": system[:MAX_FACT],
        "version": version[:MAX_FACT],
        "seen_on": now,
        "connected": True,
        "client": client,
    }
    query = select(agents.c.id, agents.c.client).where(agents.c.name == name).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        fixed = {"id": str(uuid.uuid4()), "name": name, "created_on": now, "last_index": 0}
        connection.execute(insert(agents).values(**fixed, **facts))
    else:
        facts.update({} if row.client == client else dict.fromkeys(SAID))
        connection.execute(update(agents).where(agents.c.id == row.id).values(**facts))
    return find(connection, name)


def labels_of(stored: str | None) -> tuple[str, ...]:
    """The labels in a column of the database."""
    return tuple(filter(None, (stored or "").split(",")))


def checked_labels(text: str) -> tuple[str, ...]:
    """Labels, separated by commas or spaces, sorted. Raises Refusal (400)."""
    labels = sorted(set(re.split(r"[\s,]+", text.strip(" ,")))) if text.strip(" ,") else []
    wrong = [label for label in labels if not LABEL.fullmatch(label)]
    if wrong or len(labels) > MAX_LABELS:
        rule = f"at most {MAX_LABELS} labels of lower-case letters, digits and `-`"
        raise Refusal(400, f"an agent has {rule}, not {', '.join(wrong)[:100] or 'so many'}")
    return tuple(labels)


def add(connection: Connection, name: str, description: str = "", labels: str = "") -> AgentRow:
    """Note an agent that has not connected yet. Raises Refusal (409) if there is one."""
    if find_known(connection, name) is not None:
        raise Refusal(409, f"there is an agent {name} already")
    fixed = {"id": str(uuid.uuid4()), "name": name, "created_on": utc_now(), "last_index": 0}
    empty = {"system": "", "version": "", "seen_on": "", "connected": False}
    connection.execute(insert(agents).values(**fixed, **empty))
    describe(connection, name, description)
    set_labels(connection, [name], checked_labels(labels))
    return find(connection, name)


def describe(connection: Connection, name: str, description: str) -> None:
    """Say what an agent is."""
    text = " ".join(description.split())[:MAX_DESCRIPTION] or None
    mine = agents.c.name == name
    connection.execute(update(agents).where(mine).values(description=text))


def set_labels(connection: Connection, names: Collection[str], labels: Collection[str]) -> None:
    """Give agents these labels instead of theirs."""
    stored = f",{','.join(sorted(labels))}," if labels else None
    connection.execute(update(agents).where(agents.c.name.in_(names)).values(labels=stored))


def pause(connection: Connection, names: Collection[str], by: str) -> None:
    """Let deployments of agents wait. Those that are paused stay so since they were."""
    mine = agents.c.name.in_(names) & agents.c.paused_on.is_(None)
    connection.execute(update(agents).where(mine).values(paused_on=utc_now(), paused_by=by))


def resume(connection: Connection, names: Collection[str]) -> None:
    """Let agents have what waits for them."""
    mine = agents.c.name.in_(names)
    connection.execute(update(agents).where(mine).values(paused_on=None, paused_by=None))


def find_all(connection: Connection, names: Collection[str]) -> list[AgentRow]:
    """The agents of these names, by name. Raises Refusal (404) that names unknown ones."""
    query = select(agents).where(agents.c.name.in_(names)).order_by(agents.c.name)
    rows = [AgentRow(**row._mapping) for row in connection.execute(query)]
    unknown = sorted(set(names) - {row.name for row in rows})
    if unknown:
        raise Refusal(404, f"there is no agent {', '.join(unknown)[:300]}")
    return rows


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


def names_of(connection: Connection, agent_ids: Collection[str]) -> dict[str, str]:
    """The names of these agents, by their ids."""
    query = select(agents.c.id, agents.c.name).where(agents.c.id.in_(agent_ids))
    return {row.id: row.name for row in connection.execute(query)}


def list_all(connection: Connection) -> list[AgentRow]:
    """All agents by name."""
    rows = connection.execute(select(agents).order_by(agents.c.name))
    return [AgentRow(**row._mapping) for row in rows]


def mark_disconnected(connection: Connection, agent_id: str | None = None) -> None:
    """Note that an agent is gone, or all that were connected: a starting server has none."""
    gone = agents.c.connected if agent_id is None else agents.c.id == agent_id
    connection.execute(update(agents).where(gone).values(connected=False, seen_on=utc_now()))
