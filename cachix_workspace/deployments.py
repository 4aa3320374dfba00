"""Agents and the state machine of their deployments: one transaction for each message, terminal states are final.

    Pending -> InProgress -> Succeeded | Failed | Cancelled

One InProgress for each agent. A newer Pending replaces an older one (Cancelled). An agent is sent its newest Pending
when it has nothing in progress; sending marks nothing, so a new connection is sent it again.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select, update

from cachix_protocol import (
    CANCELLED,
    FAILED,
    IN_PROGRESS,
    PENDING,
    TERMINAL,
    Deployment,
    Spec,
    is_agent_name,
    utc_now,
)
from cachix_workspace import Refusal
from cachix_workspace.tables import agents, deployments

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
MAX_REASON = 1 << 16  # characters


@dataclass(frozen=True)
class Agent:
    """A machine's agent. `connected` is what the running server believes; `seen_on` is when that last changed."""

    id: str
    name: str
    system: str
    version: str
    created_on: str
    seen_on: str
    connected: bool
    last_index: int


@dataclass(frozen=True)
class Record:
    """A deployment as the database has it. `closure_size` is in bytes, `log_next` the number of log lines."""

    id: str
    agent_id: str
    index: int
    store_path: str
    rollback_script: str | None
    status: str
    reason: str | None
    closure_size: int | None
    created_on: str
    started_on: str | None
    finished_on: str | None
    log_next: int

    def to_json(self) -> dict[str, Any]:
        """The answer of protocol.md section 4, and the reason."""
        return {
            "id": self.id,
            "index": self.index,
            "createdOn": self.created_on,
            "startedOn": self.started_on,
            "finishedOn": self.finished_on,
            "storePath": self.store_path,
            "closureSize": self.closure_size,
            "status": self.status,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Report:
    """What an agent says of a deployment: InProgress, Succeeded or Failed. Size in bytes, where it is known."""

    status: str
    time: str
    closure_size: int | None = None
    reason: str | None = None


def transition(current: str, reported: str) -> str | None:
    """The status after an agent's report; None where it is refused, because the deployment has ended otherwise."""
    if reported == current:
        return current
    return None if current in TERMINAL else reported


# --- agents ----------------------------------------------------------------------------------------------------------


def register(connection: Connection, name: str, system: str, version: str) -> Agent:
    """The agent that connects under `name`; it exists from its first connection on."""
    if not is_agent_name(name):
        raise Refusal(
            400,
            "the header `name` must be the agent's name: letters, digits, `.`, `_`, `-`, at most 128",
        )
    now = utc_now()
    row = connection.execute(
        select(agents.c.id).where(agents.c.name == name).with_for_update()
    ).one_or_none()
    facts = {"system": system[:64], "version": version[:64], "seen_on": now, "connected": True}
    if row is None:
        fixed = {"id": str(uuid.uuid4()), "name": name, "created_on": now, "last_index": 0}
        connection.execute(insert(agents).values(**fixed, **facts))
    else:
        connection.execute(update(agents).where(agents.c.id == row.id).values(**facts))
    return agent_of(connection, name)


def agent_of(connection: Connection, name: str | None) -> Agent:
    """Raises Refusal where no agent of this name was ever connected."""
    row = connection.execute(select(agents).where(agents.c.name == (name or ""))).one_or_none()
    if row is None:
        raise Refusal(
            403,
            f"there is no agent {name!r}: the header `name` must be that of one that has connected to /ws",
        )
    return Agent(**row._mapping)


def every_agent(connection: Connection) -> list[Agent]:
    """All agents by name."""
    return [
        Agent(**row._mapping) for row in connection.execute(select(agents).order_by(agents.c.name))
    ]


def disconnected(connection: Connection, agent_id: str | None = None) -> None:
    """Note that an agent is gone; without an id that all are (a server that starts knows of none)."""
    gone = agents.c.connected if agent_id is None else agents.c.id == agent_id
    connection.execute(update(agents).where(gone).values(connected=False, seen_on=utc_now()))


# --- deployments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activated:
    """What an `activate` made: a deployment for each agent's name, and the ids of those it replaced."""

    records: dict[str, Record]
    replaced: list[str]


def activate(connection: Connection, spec: Spec) -> Activated:
    """A Pending deployment for each agent of `spec`. Raises Refusal that names the agents that are unknown."""
    if not spec.agents:
        raise Refusal(400, "`agents` is empty: there is nothing to deploy")
    named = agents.c.name.in_(spec.agents)
    rows = connection.execute(select(agents).where(named).with_for_update()).all()
    known = {row.name: Agent(**row._mapping) for row in rows}
    unknown = sorted(name for name in spec.agents if name not in known)
    if unknown:
        raise Refusal(
            400, f"unknown agents: {', '.join(unknown)}. An agent is known once it has connected."
        )
    records: dict[str, Record] = {}
    replaced: list[str] = []
    for name, agent in known.items():
        records[name] = _create(
            connection, agent, spec.agents[name], spec.rollback_scripts.get(agent.system)
        )
        replaced += _replace(connection, records[name])
    return Activated(records, replaced)


def _create(
    connection: Connection, agent: Agent, store_path: str, rollback_script: str | None
) -> Record:
    index = agent.last_index + 1
    connection.execute(update(agents).where(agents.c.id == agent.id).values(last_index=index))
    record = Record(
        id=str(uuid.uuid4()), agent_id=agent.id, index=index, store_path=store_path, rollback_script=rollback_script,
        status=PENDING, reason=None, closure_size=None, created_on=utc_now(), started_on=None, finished_on=None,
        log_next=0,
    )  # fmt: skip
    connection.execute(insert(deployments).values(**vars(record)))
    return record


def _replace(connection: Connection, newest: Record) -> list[str]:
    """Cancel the agent's other Pending deployments; their ids."""
    others = (
        (deployments.c.agent_id == newest.agent_id)
        & (deployments.c.status == PENDING)
        & (deployments.c.id != newest.id)
    )
    ids = list(connection.execute(select(deployments.c.id).where(others)).scalars())
    if ids:
        reason = f"replaced by deployment {newest.index}"
        values = {"status": CANCELLED, "reason": reason, "finished_on": utc_now()}
        connection.execute(update(deployments).where(others).values(**values))
    return ids


def find(connection: Connection, deployment_id: str, lock: bool = False) -> Record:
    """The deployment, locked for the rest of the transaction with `lock`. Raises Refusal (404)."""
    query = select(deployments).where(deployments.c.id == deployment_id.lower())
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise Refusal(404, f"there is no deployment {deployment_id[:64]}")
    return Record(**row._mapping)


def find_by_index(connection: Connection, name: str, index: int) -> Record:
    """Deployment number `index` of the agent `name`. Raises Refusal (404)."""
    query = (
        select(deployments)
        .join(agents)
        .where((agents.c.name == name) & (deployments.c.index == index))
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        raise Refusal(404, f"agent {name[:128]} has no deployment {index}")
    return Record(**row._mapping)


def find_own(connection: Connection, agent_name: str | None, deployment_id: str) -> Record:
    """The deployment, locked, if it is that agent's. Raises Refusal (403 or 404)."""
    agent = agent_of(connection, agent_name)
    record = find(connection, deployment_id, lock=True)
    if record.agent_id != agent.id:
        raise Refusal(403, f"deployment {record.id} is not one of agent {agent.name}")
    return record


def report(connection: Connection, record: Record, told: Report) -> tuple[Record, bool]:
    """Apply an agent's report; the deployment afterwards, and False where it had ended otherwise before."""
    status = transition(record.status, told.status)
    if status is None:
        return record, False
    if status == record.status and (
        status in TERMINAL or told.closure_size in (None, record.closure_size)
    ):
        return record, True  # a repetition costs no write
    time = told.time if TIME.fullmatch(told.time) else utc_now()
    changes: dict[str, Any] = {"status": status}
    if told.closure_size is not None:
        changes["closure_size"] = told.closure_size
    if status == IN_PROGRESS:
        changes["started_on"] = record.started_on or time
        _end_others(connection, record)
    else:
        changes.update(
            finished_on=time, reason=None if told.reason is None else told.reason[:MAX_REASON]
        )
    connection.execute(update(deployments).where(deployments.c.id == record.id).values(**changes))
    return find(connection, record.id), True


def _end_others(connection: Connection, record: Record) -> None:
    """An agent runs one deployment at a time: one that it left without a word has ended, nobody knows how."""
    others = (
        (deployments.c.agent_id == record.agent_id)
        & (deployments.c.status == IN_PROGRESS)
        & (deployments.c.id != record.id)
    )
    reason = f"the agent went on to deployment {record.index} without reporting the end of this one"
    values = {"status": FAILED, "reason": reason, "finished_on": utc_now()}
    connection.execute(update(deployments).where(others).values(**values))


def cancel(connection: Connection, deployment_id: str) -> tuple[Record, bool]:
    """Cancel a deployment; False where it had ended otherwise. What runs learns it by 409 at its next report."""
    record = find(connection, deployment_id, lock=True)
    if record.status in TERMINAL:
        return record, record.status == CANCELLED
    values = {"status": CANCELLED, "reason": "cancelled", "finished_on": utc_now()}
    connection.execute(update(deployments).where(deployments.c.id == record.id).values(**values))
    return find(connection, record.id), True


def due(connection: Connection, agent_id: str, registering: bool) -> Deployment | None:
    """What the agent is to be sent now: its Pending one if nothing is in progress.

    An agent that registers is sent what is in progress again, as `resumed`: it may have restarted.
    """
    mine = (deployments.c.agent_id == agent_id) & deployments.c.status.in_([PENDING, IN_PROGRESS])
    rows = connection.execute(
        select(deployments).where(mine).order_by(deployments.c.index.desc())
    ).all()
    running = [row for row in rows if row.status == IN_PROGRESS]
    if not rows or (running and not registering):
        return None
    record = Record(**(running or rows)[0]._mapping)
    return Deployment(
        record.store_path, record.id, record.index, record.rollback_script, resumed=bool(running)
    )
