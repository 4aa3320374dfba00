"""Nodes: servers of one workspace that share its database. Each says now and then that it lives.

A node is a data directory. Its row has the number of its latest start: a server whose number is not
there any more must end, as another one has its directory. Times are the database's own.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, delete, func, or_, select, text, update

from cachix_protocol import Error, utc_now
from cachix_workspace.database import add_missing, get_meta, put_meta, upsert
from cachix_workspace.settings import Settings
from cachix_workspace.tables import agents, connection_numbers, meta, nodes

FILE = "node"  # in the data directory: the id
NUMBER = "connection_number"  # in the meta table, where the database has no sequences
DATABASE_TIME = (
    "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
)


@dataclass(frozen=True)
class Node:
    """A node as the database has it."""

    id: str
    host: str
    start: int
    started_on: str
    seen_on: str
    shared: bool  # whether others reach its cache's files


def id_of(data: Path) -> str:
    """The id of a data directory's node; a new one each time if none can be kept there."""
    place = data / FILE
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if not place.exists():
            place.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
        return place.read_text(encoding="ascii").strip()[:64]
    return str(uuid.uuid4())


def moment(connection: Connection, seconds: float = 0.0) -> str:
    """The time so many seconds from now, by the clock that all nodes share."""
    if connection.dialect.name != "postgresql":
        now = utc_now()
    else:
        now = str(connection.execute(text(DATABASE_TIME)).scalar_one())
    if not seconds:
        return now
    time = datetime.datetime.fromisoformat(now.replace("Z", "+00:00"))
    time += datetime.timedelta(seconds=seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def next_numbers(connection: Connection, count: int) -> list[int]:
    """Numbers for connections, each given once in the life of the workspace."""
    if connection.dialect.name == "postgresql":
        series = func.generate_series(1, count).table_valued("value")
        query = select(connection_numbers.next_value()).select_from(series)
        return [int(number) for number in connection.execute(query).scalars()]
    last = int(get_meta(connection, NUMBER) or 0)
    put_meta(connection, NUMBER, str(last + count))
    return list(range(last + 1, last + count + 1))


# --- the life of a node ---------------------------------------------------------------------------


def check(connection: Connection, settings: Settings, node_id: str) -> list[str]:
    """The other nodes that live. Raises Error if a cache is not theirs and this one's."""
    if connection.dialect.name != "postgresql":
        return []
    others = living(connection, settings)
    others.pop(node_id, None)
    apart = [row for row in others.values() if not row.shared]
    if others and (apart or not settings.has_shared_cache):
        host = (apart or list(others.values()))[0].host
        hint = "start each with --cache-directory=DIR --cache-shared, or with --cache-store=URL"
        raise Error(f"another node serves this workspace, on {host}: {hint}")
    return list(others)


def enter(connection: Connection, settings: Settings, node_id: str) -> int:
    """Begin to serve as this node; the number of the start. Raises Error as `check` does.

    The agents that were connected to it, or to nodes that live no more, are offline.
    """
    others = check(connection, settings, node_id)
    (number,) = next_numbers(connection, 1)
    _note(connection, settings, node_id, number)
    _mark_offline(connection, others)
    return number


def living(connection: Connection, settings: Settings) -> dict[str, Node]:
    """The nodes that live, by their ids."""
    oldest = moment(connection, -settings.node_timeout)
    rows = connection.execute(select(nodes).where(nodes.c.seen_on > oldest))
    return {row.id: Node(**row._mapping) for row in rows}


def _note(connection: Connection, settings: Settings, node_id: str, start: int) -> None:
    now = moment(connection)
    values = {"host": socket.gethostname(), "start": start, "shared": settings.has_shared_cache}
    upsert(connection, nodes, nodes.c.id, node_id, **values, started_on=now, seen_on=now)


def beat(connection: Connection, settings: Settings, node_id: str, start: int) -> bool:
    """Say that a node lives; False if another server has taken its place.

    Raises Error as `check` does, if another one has begun to serve in the meantime.
    """
    mine = (nodes.c.id == node_id) & (nodes.c.start == start)
    query = update(nodes).where(mine).values(seen_on=moment(connection))
    if connection.execute(query).rowcount:
        return True
    row = connection.execute(select(nodes.c.start).where(nodes.c.id == node_id)).one_or_none()
    if row is None:  # others have given this node up
        check(connection, settings, node_id)
        _note(connection, settings, node_id, start)
    return row is None


def bury(connection: Connection, settings: Settings) -> list[str]:
    """Note that the agents of nodes which live no more are offline; their ids."""
    oldest = moment(connection, -settings.node_timeout)
    stale = select(nodes.c.id).where(nodes.c.seen_on <= oldest)
    dead = list(connection.execute(stale.with_for_update(skip_locked=True)).scalars())
    if not dead:
        return []
    connection.execute(delete(nodes).where(nodes.c.id.in_(dead)))
    return _mark_gone(connection, agents.c.node_id.in_(dead))


def leave(connection: Connection, node_id: str, start: int) -> None:
    """Serve no more."""
    mine = (nodes.c.id == node_id) & (nodes.c.start == start)
    if connection.execute(delete(nodes).where(mine)).rowcount:
        gone = agents.c.connected & (agents.c.node_id == node_id)
        connection.execute(update(agents).where(gone).values(connected=False, seen_on=utc_now()))


def forget_all(connection: Connection) -> None:
    """Forget all nodes: this is a copy, and they serve the original."""
    connection.execute(delete(nodes))
    _mark_offline(connection, [])


def _mark_offline(connection: Connection, alive: Collection[str]) -> list[str]:
    """Note that agents are offline but for those of some nodes; their ids."""
    strange = or_(agents.c.node_id.is_(None), agents.c.node_id.not_in(alive))
    return _mark_gone(connection, strange)


def _mark_gone(connection: Connection, whose: ColumnElement[bool]) -> list[str]:
    matching = agents.c.connected & whose
    query = select(agents.c.id).where(matching).order_by(agents.c.name)
    ids = list(connection.execute(query.with_for_update(key_share=True)).scalars())
    if ids:
        gone = {"connected": False, "seen_on": utc_now()}
        connection.execute(update(agents).where(agents.c.id.in_(ids)).values(**gone))
    return ids


# --- what one node does for all -------------------------------------------------------------------


def leads(connection: Connection, task: str, node_id: str, seconds: float) -> bool:
    """Whether this node does a task, now and for so many seconds: another one may do it after."""
    key, mine = f"leader:{task}", f" {node_id}"
    add_missing(connection, meta, key=key, value="")
    connection.execute(select(meta.c.key).where(meta.c.key == key).with_for_update())
    held = get_meta(connection, key) or ""
    now = moment(connection)
    if held and not held.endswith(mine) and held.partition(" ")[0] > now:
        return False
    put_meta(connection, key, f"{moment(connection, seconds)}{mine}")
    return True


def resign(connection: Connection, node_id: str) -> None:
    """Let another node do what this one did."""
    theirs = meta.c.key.like("leader:%") & meta.c.value.like(f"% {node_id}")
    connection.execute(delete(meta).where(theirs))
