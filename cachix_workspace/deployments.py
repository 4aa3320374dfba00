"""The state machine of deployments: a transaction for each message, terminal states are final.

    Pending -> InProgress -> Succeeded | Failed | Cancelled

Each agent has one InProgress at most. A newer Pending replaces an older one, which is Cancelled. An
agent is sent its newest Pending while it has nothing InProgress. Sending marks nothing, so that an
agent that reconnects is sent it again.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, select, update

from cachix_protocol import (
    CANCELLED,
    FAILED,
    IN_PROGRESS,
    PENDING,
    SUCCEEDED,
    TERMINAL,
    Deployment,
    Spec,
    Undecodable,
    utc_now,
)
from cachix_workspace.agents import AgentRow
from cachix_workspace.agents import find as find_agent
from cachix_workspace.refusal import Refusal
from cachix_workspace.tables import agents, deployments

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
MAX_REASON = 1 << 16  # characters


@dataclass(frozen=True)
class DeploymentRow:
    """A deployment as the database has it.

    `closure_size` is in bytes, `log_next` is the number of log lines.
    """

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
    """An agent's report: InProgress, Succeeded or Failed. The size is in bytes, if it is known."""

    status: str
    time: str
    closure_size: int | None = None
    reason: str | None = None

    @classmethod
    def from_json(cls, record: Any) -> Report:
        """The report in a request to .../status. Raises Undecodable."""
        reported = (IN_PROGRESS, SUCCEEDED, FAILED)
        if not isinstance(record, dict) or record.get("status") not in reported:
            raise Undecodable(f"`status` must be {IN_PROGRESS}, {SUCCEEDED} or {FAILED}")
        size, reason, time = record.get("closureSize"), record.get("reason"), record.get("time")
        if size is not None and (type(size) is not int or not 0 <= size < 1 << 63):
            raise Undecodable("`closureSize` must be a number of bytes or null")
        if not isinstance(reason, (str, type(None))) or not isinstance(time, str):
            raise Undecodable("`reason` must be a text or null, `time` a text")
        if reason is not None:  # databases take neither NUL nor half a surrogate pair
            reason = reason.replace("\0", "\N{REPLACEMENT CHARACTER}")
            reason = reason.encode("utf-8", "replace").decode()
        return cls(record["status"], time, size, reason)


def transition(current: str, reported: str) -> str | None:
    """The status after a report; None if the deployment had ended differently before."""
    if reported == current:
        return current
    return None if current in TERMINAL else reported


# --- orders ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """The deployments that CI ordered, by agent, and the ids of those that they replaced."""

    rows: dict[str, DeploymentRow]
    replaced: list[str]


def order(connection: Connection, spec: Spec) -> Order:
    """Create a Pending deployment for each agent of `spec`.

    Raises Refusal that names the agents that are unknown.
    """
    named = agents.c.name.in_(spec.agents)
    rows = connection.execute(select(agents).where(named).with_for_update()).all()
    targets = {row.name: AgentRow(**row._mapping) for row in rows}
    unknown = sorted(name for name in spec.agents if name not in targets)
    if unknown:
        names = ", ".join(unknown)
        raise Refusal(400, f"unknown agents: {names}. An agent is known once it has connected.")
    created: dict[str, DeploymentRow] = {}
    replaced: list[str] = []
    for name, agent in targets.items():
        script = spec.rollback_scripts.get(agent.system)
        created[name] = _create(connection, agent, spec.agents[name], script)
        replaced += _replace_others(connection, created[name])
    return Order(created, replaced)


def _create(
    connection: Connection, agent: AgentRow, store_path: str, rollback_script: str | None
) -> DeploymentRow:
    index = agent.last_index + 1
    connection.execute(update(agents).where(agents.c.id == agent.id).values(last_index=index))
    deployment = DeploymentRow(
        id=str(uuid.uuid4()),
        agent_id=agent.id,
        index=index,
        store_path=store_path,
        rollback_script=rollback_script,
        status=PENDING,
        reason=None,
        closure_size=None,
        created_on=utc_now(),
        started_on=None,
        finished_on=None,
        log_next=0,
    )
    connection.execute(insert(deployments).values(**vars(deployment)))
    return deployment


def _replace_others(connection: Connection, newest: DeploymentRow) -> list[str]:
    """Cancel the agent's other Pending deployments; their ids."""
    others = _others(newest, PENDING)
    ids = list(connection.execute(select(deployments.c.id).where(others)).scalars())
    if ids:
        reason = f"replaced by deployment {newest.index}"
        values = {"status": CANCELLED, "reason": reason, "finished_on": utc_now()}
        connection.execute(update(deployments).where(others).values(**values))
    return ids


def _others(deployment: DeploymentRow, status: str) -> ColumnElement[bool]:
    """Matches the agent's other deployments that have this status."""
    return (
        (deployments.c.agent_id == deployment.agent_id)
        & (deployments.c.status == status)
        & (deployments.c.id != deployment.id)
    )


# --- queries --------------------------------------------------------------------------------------


def find(connection: Connection, deployment_id: str, lock: bool = False) -> DeploymentRow:
    """The deployment, with `lock` locked for the rest of the transaction. Raises Refusal (404)."""
    query = select(deployments).where(deployments.c.id == deployment_id.lower())
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise Refusal(404, f"there is no deployment {deployment_id[:64]}")
    return DeploymentRow(**row._mapping)


def find_by_index(connection: Connection, name: str, index: int) -> DeploymentRow:
    """Deployment number `index` of the agent `name`. Raises Refusal (404)."""
    wanted = (agents.c.name == name) & (deployments.c.index == index)
    row = connection.execute(select(deployments).join(agents).where(wanted)).one_or_none()
    if row is None:
        raise Refusal(404, f"agent {name[:128]} has no deployment {index}")
    return DeploymentRow(**row._mapping)


def find_own(connection: Connection, agent_name: str | None, deployment_id: str) -> DeploymentRow:
    """The deployment, locked, if it is that agent's. Raises Refusal (403 or 404)."""
    agent = find_agent(connection, agent_name)
    deployment = find(connection, deployment_id, lock=True)
    if deployment.agent_id != agent.id:
        raise Refusal(403, f"deployment {deployment.id} is not one of agent {agent.name}")
    return deployment


def find_due(connection: Connection, agent_id: str, registering: bool) -> Deployment | None:
    """The deployment to send to the agent now: its Pending one if nothing is InProgress.

    An agent that registers may have restarted, so it is sent the InProgress one again, `resumed`.
    """
    mine = (deployments.c.agent_id == agent_id) & deployments.c.status.in_([PENDING, IN_PROGRESS])
    query = select(deployments).where(mine).order_by(deployments.c.index.desc())
    rows = connection.execute(query).all()
    running = [row for row in rows if row.status == IN_PROGRESS]
    if not rows or (running and not registering):
        return None
    row = DeploymentRow(**(running or rows)[0]._mapping)
    return Deployment(
        store_path=row.store_path,
        id=row.id,
        index=row.index,
        rollback_script=row.rollback_script,
        resumed=bool(running),
    )


# --- changes --------------------------------------------------------------------------------------


def apply_report(
    connection: Connection, deployment: DeploymentRow, report: Report
) -> tuple[DeploymentRow, bool]:
    """Apply an agent's report; the deployment afterwards, and whether the report was accepted.

    It is not if the deployment had ended differently before.
    """
    status = transition(deployment.status, report.status)
    if status is None:
        return deployment, False
    same_size = report.closure_size in (None, deployment.closure_size)
    if status == deployment.status and (status in TERMINAL or same_size):
        return deployment, True  # a repetition costs no write
    time = report.time if TIME.fullmatch(report.time) else utc_now()
    changes: dict[str, Any] = {"status": status}
    if report.closure_size is not None:
        changes["closure_size"] = report.closure_size
    if status == IN_PROGRESS:
        changes["started_on"] = deployment.started_on or time
        _fail_others(connection, deployment)
    else:
        reason = None if report.reason is None else report.reason[:MAX_REASON]
        changes.update(finished_on=time, reason=reason)
    mine = deployments.c.id == deployment.id
    connection.execute(update(deployments).where(mine).values(**changes))
    return find(connection, deployment.id), True


def _fail_others(connection: Connection, deployment: DeploymentRow) -> None:
    """Mark an older InProgress deployment that was never reported finished as failed.

    An agent runs one at a time.
    """
    index = deployment.index
    reason = f"the agent went on to deployment {index} without reporting the end of this one"
    values = {"status": FAILED, "reason": reason, "finished_on": utc_now()}
    others = _others(deployment, IN_PROGRESS)
    connection.execute(update(deployments).where(others).values(**values))


def cancel(connection: Connection, deployment_id: str) -> tuple[DeploymentRow, bool]:
    """Cancel a deployment; False if it had ended differently before.

    A running agent learns of it from the 409 to its next report.
    """
    deployment = find(connection, deployment_id, lock=True)
    if deployment.status in TERMINAL:
        return deployment, deployment.status == CANCELLED
    values = {"status": CANCELLED, "reason": "cancelled", "finished_on": utc_now()}
    mine = deployments.c.id == deployment.id
    connection.execute(update(deployments).where(mine).values(**values))
    return find(connection, deployment.id), True
