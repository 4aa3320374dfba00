"""Old deployments and their logs are removed, and logs that came line by line made compact."""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select

from cachix_protocol import SUCCEEDED, TERMINAL
from cachix_workspace import logs, membership
from cachix_workspace.context import Workspace
from cachix_workspace.database import Database, Lock, get_meta, note_change, put_meta, reason_of
from cachix_workspace.tables import agents, deployments, log_chunks, runs

logger = logging.getLogger(__name__)

INTERVAL = 600.0  # seconds between two looks whether it is night
LEADS = 3600.0  # seconds for which no other node prunes
HOUR = 3  # UTC
LAST = "pruned_on"  # the key in the meta table: a day
BATCH = 200  # deployments that are removed in one transaction: agents wait for its end
KEPT_PATHS = 2  # the paths that succeeded last: what runs, and what a roll-back goes back to
NEW = datetime.timedelta(hours=24)  # a run without deployments may be a roll-out that begins
SETTLED = datetime.timedelta(hours=1)  # after its end no lines come to a log any more


@dataclass(frozen=True)
class Limits:
    """Deployments to keep of each agent, and days to keep any; 0 for no limit."""

    count: int = 0
    days: float = 0.0


@dataclass(frozen=True)
class Past:
    """A deployment, as far as it matters here."""

    id: str
    index: int
    status: str
    store_path: str
    created_on: str


@dataclass
class Result:
    """The numbers of deployments removed and of logs made compact."""

    deployments: int = 0
    logs: int = 0


def ago(period: datetime.timedelta) -> str:
    """The time so long ago, as the database has times."""
    moment = datetime.datetime.now(datetime.timezone.utc) - period
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


def too_old(history: Iterable[Past], limits: Limits, oldest: str) -> list[str]:
    """The ids of an agent's deployments to remove, where `oldest` is the time that `days` allow.

    Its newest one stays, and one that has not ended, and those that succeeded last.
    """
    surplus, paths = [], set[str]()
    newest_first = sorted(history, key=lambda past: past.index, reverse=True)
    for place, past in enumerate(newest_first):
        is_new = past.status == SUCCEEDED and past.store_path not in paths
        if is_new:
            paths.add(past.store_path)
        needed = is_new and len(paths) <= KEPT_PATHS
        beyond = bool(limits.count) and place >= limits.count
        late = bool(limits.days) and past.created_on < oldest
        if (beyond or late) and place and past.status in TERMINAL and not needed:
            surplus.append(past.id)
    return surplus


def prune(database: Database, limits: Limits) -> Result:
    """Remove what the limits say, and make logs compact, in many short transactions."""
    result = Result()
    for batch in _batches(expired(database, limits)):
        with database.write(Lock.ROWS) as connection:
            _remove(connection, batch)
        result.deployments += len(batch)
    if result.deployments:
        with database.write() as connection:
            _remove_empty_runs(connection)
            note_change(connection)
    for deployment_id in scattered(database):
        with database.write(Lock.ROWS) as connection:
            _make_compact(connection, deployment_id)
        result.logs += 1
    return result


def expired(database: Database, limits: Limits) -> list[str]:
    """The ids of all deployments to remove."""
    if not limits.count and not limits.days:
        return []
    oldest = ago(datetime.timedelta(days=limits.days))
    with database.read() as connection:
        ids = list(connection.execute(select(agents.c.id)).scalars())
    surplus: list[str] = []
    for agent_id in ids:
        with database.read() as connection:
            surplus += too_old(_history(connection, agent_id), limits, oldest)
    return surplus


def _history(connection: Connection, agent_id: str) -> list[Past]:
    columns = (
        deployments.c[name] for name in ("id", "index", "status", "store_path", "created_on")
    )
    query = select(*columns).where(deployments.c.agent_id == agent_id)
    return [Past(**row._mapping) for row in connection.execute(query)]


def _batches(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[first : first + BATCH] for first in range(0, len(ids), BATCH))


def _lock(connection: Connection, ids: Sequence[str]) -> None:
    """Lock deployments: nobody appends to their logs meanwhile."""
    query = select(deployments.c.id).where(deployments.c.id.in_(ids)).order_by(deployments.c.id)
    connection.execute(query.with_for_update())


def _remove(connection: Connection, ids: Sequence[str]) -> None:
    _lock(connection, ids)
    connection.execute(delete(log_chunks).where(log_chunks.c.deployment_id.in_(ids)))
    connection.execute(delete(deployments).where(deployments.c.id.in_(ids)))


def _remove_empty_runs(connection: Connection) -> None:
    """Remove runs without deployments, but the last one: SQLite would give its number again."""
    used = select(deployments.c.run_id).where(deployments.c.run_id == runs.c.id).exists()
    last = connection.execute(select(func.max(runs.c.id))).scalar() or 0
    is_old = (runs.c.created_on < ago(NEW)) & (runs.c.id < last)
    connection.execute(delete(runs).where(~used & is_old))


# --- logs -----------------------------------------------------------------------------------------


def scattered(database: Database) -> list[str]:
    """The ids of deployments that have ended, and whose logs have many more rows than needed."""
    needed = (
        deployments.c.log_next / logs.CHUNK_LINES
        + func.coalesce(deployments.c.log_size, 0) / logs.CHUNK_CHARACTERS
        + 1
    )
    ended = deployments.c.status.in_(TERMINAL) & (deployments.c.ended_on < ago(SETTLED))
    query = (
        select(deployments.c.id)
        .join(log_chunks, log_chunks.c.deployment_id == deployments.c.id)
        .where(ended)
        .group_by(deployments.c.id)
        .having(func.count() > 2 * needed)
    )
    with database.read() as connection:
        return list(connection.execute(query).scalars())


def _make_compact(connection: Connection, deployment_id: str) -> None:
    """Write the lines of a log into as few rows as there can be."""
    _lock(connection, [deployment_id])
    mine = log_chunks.c.deployment_id == deployment_id
    bodies = select(log_chunks.c.body).where(mine).order_by(log_chunks.c.first)
    lines = [line for body in connection.execute(bodies).scalars() for line in body.split("\n")]
    connection.execute(delete(log_chunks).where(mine))
    first = 0
    for chunk in logs.split(lines):
        values = {"first": first, "count": len(chunk), "body": "\n".join(chunk)}
        connection.execute(insert(log_chunks).values(deployment_id=deployment_id, **values))
        first += len(chunk)


# --- by night -------------------------------------------------------------------------------------


def prune_nightly(workspace: Workspace) -> None:
    """Prune once a day, by night, or later if the server did not run then (a thread)."""
    pause = threading.Event()
    while True:
        try:
            now = datetime.datetime.now(datetime.timezone.utc)
            if is_due(workspace.database, now) and membership.leads(workspace, "retention", LEADS):
                _prune_now(workspace, night_of(now))
        except Exception as error:  # this thread is the only one that prunes: it must go on
            logger.warning("old deployments could not be removed: %s", reason_of(error))
        pause.wait(INTERVAL)


def is_due(database: Database, now: datetime.datetime) -> bool:
    """Whether the night has come since it was pruned last."""
    with database.read() as connection:
        return (get_meta(connection, LAST) or "") < night_of(now)


def night_of(now: datetime.datetime) -> str:
    """The day of the last night."""
    return (now - datetime.timedelta(hours=HOUR)).strftime("%Y-%m-%d")


def _prune_now(workspace: Workspace, night: str) -> None:
    settings = workspace.settings
    result = prune(workspace.database, Limits(settings.keep_deployments, settings.keep_days))
    with workspace.database.write() as connection:
        put_meta(connection, LAST, night)
    if result.deployments or result.logs:
        text = "removed %d old deployments, made %d logs compact"
        logger.info(text, result.deployments, result.logs)
