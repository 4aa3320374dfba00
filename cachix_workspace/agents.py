"""The agents that have ever connected."""

from __future__ import annotations

import datetime
import re
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, insert, not_, select, update

from cachix_protocol import PENDING, utc_now
from cachix_workspace.database import add_all_missing, add_missing
from cachix_workspace.refusal import Refusal
from cachix_workspace.tables import agents, deployments

LABEL = re.compile(r"[a-z0-9-]{1,40}")
MAX_LABELS = 20
MAX_DESCRIPTION = 300  # characters
MAX_FACT = 64  # characters of what an agent says about its machine
FIND = select(agents).where(agents.c.name == bindparam("name"))  # made once: see logs.py
FIND_TO_CHANGE = FIND.with_for_update(key_share=True)
# what an agent says itself, see machine_state
SAID = ("state_on", "running", "running_since", "profile", "kind", "reboot_since", "by_hand")


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
    node_id: str | None = None
    connection: int | None = None
    by_hand: str | None = None
    abilities: str | None = None

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

    def knows(self, ability: str) -> bool:
        """Whether it has said so when it connected last."""
        return ability in (self.abilities or "").split()

    @property
    def program(self) -> str:
        """Its program, for people."""
        return f"cachix-deploy {self.client}" if self.client else "Cachix's agent"

    @property
    def is_ours(self) -> bool:
        """Whether this is an agent of cachix-deploy, of a release that says so."""
        return self.client is not None


def client_of(user_agent: str) -> str | None:
    """The version of cachix-deploy that a User-Agent header names; None for any other client."""
    match = re.match(r"cachix-deploy/([^\s+]+)", user_agent)
    return match[1][:MAX_FACT] if match is not None and match[1].isprintable() else None


def abilities_of(user_agent: str) -> str | None:
    """The words behind the version of cachix-deploy, separated by blanks; None without any."""
    match = re.match(r"cachix-deploy/[^\s+]+\+([a-z-]+(\.[a-z-]+)*)(\s|$)", user_agent)
    return None if match is None or len(match[1]) > MAX_FACT else match[1].replace(".", " ")


def register(
    connection: Connection,
    name: str,
    system: str,
    version: str,
    client: str | None = None,
    abilities: str | None = None,
    place: tuple[str, int] = ("", 0),
) -> AgentRow:
    """Note that the agent `name` has connected. Its first connection creates it.

    `place` is the id of this node, and the number of the connection.

    What another program, or another release, has said of the machine is forgotten: this one may
    say nothing.
    """
    facts = _facts(system, version, client, abilities, place)
    query = select(agents.c.id, agents.c.client).where(agents.c.name == name)
    locked = query.with_for_update(key_share=True)
    row = connection.execute(locked).one_or_none()
    if row is None:
        add_missing(connection, agents, **_new(name), **facts)
        row = connection.execute(locked).one()  # another node may have been faster
    facts.update({} if row.client == client else dict.fromkeys(SAID))
    connection.execute(update(agents).where(agents.c.id == row.id).values(**facts))
    return find(connection, name)


def _facts(
    system: str,
    version: str,
    client: str | None,
    abilities: str | None,
    place: tuple[str, int],
) -> dict[str, Any]:
    """The columns of an agent that has connected just now."""
    return {
        "system": system[:MAX_FACT],
        "version": version[:MAX_FACT],
        "seen_on": utc_now(),
        "connected": True,
        "client": client,
        "abilities": abilities,
        "node_id": place[0],
        "connection": place[1],
    }


def _new(name: str) -> dict[str, Any]:
    """The columns of a new agent that never change, and its counter."""
    return {"id": str(uuid.uuid4()), "name": name, "created_on": utc_now(), "last_index": 0}


@dataclass(frozen=True)
class Newcomer:
    """An agent of which nothing is known, what it says of itself, and its token."""

    name: str
    system: str
    version: str
    client: str | None
    abilities: str | None
    connection: int
    token_id: int


def unknown_names(connection: Connection, names: Collection[str]) -> set[str]:
    """Those of some names that no agent has."""
    known = select(agents.c.name).where(agents.c.name.in_(names))
    return set(names) - set(connection.execute(known).scalars())


def register_new(
    connection: Connection, node_id: str, newcomers: Collection[Newcomer]
) -> dict[str, str]:
    """Note that new agents have connected to this node; their ids by name.

    Those that another node has registered meanwhile are left out.
    """
    rows = []
    for each in newcomers:
        said = (each.system, each.version, each.client, each.abilities)
        facts = _facts(*said, (node_id, each.connection))
        token = {"token_id": each.token_id, "token_since": facts["seen_on"]}
        rows.append({**_new(each.name), **facts, **token})
    add_all_missing(connection, agents, rows)
    ids = [row["id"] for row in rows]
    query = select(agents.c.name, agents.c.id).where(agents.c.id.in_(ids))
    return {row.name: row.id for row in connection.execute(query)}


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
    empty = {"system": "", "version": "", "seen_on": "", "connected": False}
    connection.execute(insert(agents).values(**_new(name), **empty))
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


def find(connection: Connection, name: str | None, lock: bool = False) -> AgentRow:
    """The agent of this name. Raises Refusal (403) if it has never connected.

    With `lock` it and its deployments are this transaction's: others that decide by them wait.
    """
    row = connection.execute(FIND_TO_CHANGE if lock else FIND, {"name": name or ""}).one_or_none()
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


@dataclass(frozen=True)
class Whereabouts:
    """The name of an agent, and the node and the number of the connection that it has."""

    name: str
    node_id: str | None
    connection: int | None


def whereabouts(connection: Connection, agent_ids: Collection[str]) -> dict[str, Whereabouts]:
    """The whereabouts of these agents, by their ids."""
    columns = (agents.c.name, agents.c.node_id, agents.c.connection)
    query = select(agents.c.id, *columns).where(agents.c.id.in_(agent_ids))
    return {row.id: Whereabouts(*row[1:]) for row in connection.execute(query)}


def names_of(connection: Connection, agent_ids: Collection[str]) -> dict[str, str]:
    """The names of these agents, by their ids."""
    return {id: place.name for id, place in whereabouts(connection, agent_ids).items()}


def list_all(connection: Connection) -> list[AgentRow]:
    """All agents by name."""
    rows = connection.execute(select(agents).order_by(agents.c.name))
    return [AgentRow(**row._mapping) for row in rows]


def connected_ids(connection: Connection, node_id: str, settled: float) -> set[str]:
    """The agents that are noted as connected to a node, for so many seconds at least."""
    moment = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=settled)
    is_settled = agents.c.seen_on < moment.strftime("%Y-%m-%dT%H:%M:%S")
    theirs = agents.c.connected & (agents.c.node_id == node_id)
    return set(connection.execute(select(agents.c.id).where(theirs & is_settled)).scalars())


def with_orders(connection: Connection, node_id: str) -> list[str]:
    """The agents connected to this node for which a deployment waits."""
    waits = select(deployments.c.agent_id).where(deployments.c.status == PENDING)
    theirs = agents.c.connected & (agents.c.node_id == node_id) & agents.c.id.in_(waits)
    return list(connection.execute(select(agents.c.id).where(theirs)).scalars())


def moved(connection: Connection, node_id: str, agent_ids: Collection[str]) -> list[str]:
    """Those of some agents that are connected to this node no more, as far as is noted."""
    theirs = agents.c.connected & (agents.c.node_id == node_id)
    here = set(connection.execute(select(agents.c.id).where(theirs)).scalars())
    return [each for each in agent_ids if each not in here]


@dataclass(frozen=True)
class Arrived:
    """A connection that an agent has made: its number, and when that was."""

    number: int
    time: str


def mark_here(connection: Connection, node_id: str, here: Mapping[str, Arrived]) -> None:
    """Note that agents are connected to this node, unless they are to another one since."""
    theirs = agents.c.id.in_(here)
    in_order = select(agents.c.id).where(theirs).order_by(agents.c.name)
    connection.execute(in_order.with_for_update(key_share=True))
    is_later = agents.c.connected & (agents.c.seen_on > bindparam("time"))
    is_elsewhere = is_later & agents.c.node_id.is_distinct_from(node_id)
    query = update(agents).where((agents.c.id == bindparam("which")) & not_(is_elsewhere))
    values = {"connected": True, "seen_on": bindparam("time"), "node_id": node_id}
    rows = [{"which": id, "number": each.number, "time": each.time} for id, each in here.items()]
    connection.execute(query.values(**values, connection=bindparam("number")), rows)


def mark_gone(connection: Connection, node_id: str, numbers: Collection[int]) -> list[str]:
    """Note that agents are gone whose connection to this node is still one of these; their ids."""
    theirs = (agents.c.node_id == node_id) & agents.c.connection.in_(numbers)
    return _mark(connection, theirs)


def mark_absent(connection: Connection, node_id: str, agent_ids: Collection[str]) -> list[str]:
    """Note that these agents are gone, if they are noted as connected to this node; their ids."""
    theirs = (agents.c.node_id == node_id) & agents.c.id.in_(agent_ids) & agents.c.connected
    return _mark(connection, theirs)


def _mark(connection: Connection, matching: ColumnElement[bool]) -> list[str]:
    in_order = select(agents.c.id).where(matching).order_by(agents.c.name)
    ids = list(connection.execute(in_order.with_for_update(key_share=True)).scalars())
    if ids:
        gone = {"connected": False, "seen_on": utc_now()}
        connection.execute(update(agents).where(agents.c.id.in_(ids)).values(**gone))
    return ids
