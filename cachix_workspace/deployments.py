"""The state machine of deployments: a transaction for each message, terminal states are final.

    Pending -> InProgress -> Succeeded | Failed | Cancelled

Each agent has one InProgress at most. A newer Pending replaces an older one, which is Cancelled. An
agent is sent its newest Pending while it has nothing InProgress. Sending marks nothing, so that an
agent that reconnects is sent it again.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, select, update

from cachix_protocol import (
    CANCELLED,
    FAILED,
    IN_PROGRESS,
    PENDING,
    PLAIN,
    SUCCEEDED,
    TERMINAL,
    Deployment,
    Wish,
    dumps,
    loads,
    utc_now,
)
from cachix_workspace.agents import find as find_agent
from cachix_workspace.agents import get as get_agent
from cachix_workspace.refusal import Refusal
from cachix_workspace.reports import (
    DRY_RUN,
    REBOOT_NEEDED,
    TESTED,
    UNREPORTED,
    UNTOUCHED_STEPS,
    Report,
    transition,
)
from cachix_workspace.tables import agents, deployments
from cachix_workspace.tokens import Token

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
MAX_INDEX = (1 << 31) - 1  # more than a database's integers hold is no index
MAX_REASON = 1 << 16  # characters
MAX_STEPS = 50
FIND = select(deployments).where(deployments.c.id == bindparam("id"))  # made once: see logs.py
FIND_TO_CHANGE = FIND.with_for_update(key_share=True)


@dataclass(frozen=True)
class DeploymentRow:
    """A deployment as the database has it.

    `closure_size` and `log_size` are in bytes, `log_next` is the number of log lines.
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
    step: str | None = None
    outcome: str | None = None
    cancel_requested: str | None = None
    cancel_refused: str | None = None
    signature: str | None = None
    log_size: int | None = None
    log_dropped: int | None = None
    ended_on: str | None = None
    run_id: int | None = None
    actor: str | None = None
    retry_of: int | None = None
    before: str | None = None
    steps: str | None = None
    rollback_scripts: str | None = None
    sent_to: int | None = None
    operation: str | None = None
    reboot: str | None = None

    @property
    def wish(self) -> Wish:
        """The operation and the reboot that it asks for."""
        return Wish(self.operation or PLAIN.operation, self.reboot or PLAIN.reboot)

    def to_json(self) -> dict[str, Any]:
        """The answer of protocol.md section 4, and our own additions: see docs/protocol.rst."""
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
            "step": self.step,
            "outcome": self.outcome,
            "cancelRequested": self.cancel_requested,
            "cancelRefused": self.cancel_refused,
            "signature": None if self.signature is None else loads(self.signature),
            "run": self.run_id,
            "startedBy": self.actor,
            "retryOf": self.retry_of,
            "before": self.before,
            "steps": loads(self.steps or "[]"),
            **self.wish.to_json(whole=True),
        }


# --- queries --------------------------------------------------------------------------------------


def find(connection: Connection, deployment_id: str, lock: bool = False) -> DeploymentRow:
    """The deployment, with `lock` locked for the rest of the transaction. Raises Refusal (404)."""
    values = {"id": deployment_id.lower()}
    row = connection.execute(FIND_TO_CHANGE if lock else FIND, values).one_or_none()
    if row is None:
        raise Refusal(404, f"there is no deployment {deployment_id[:64]}")
    return DeploymentRow(**row._mapping)


def find_allowed(connection: Connection, token: Token, deployment_id: str) -> DeploymentRow:
    """The deployment, if the token is for its agent. Raises Refusal (404), as if there was none."""
    row = find(connection, deployment_id)
    if not token.allows(get_agent(connection, row.agent_id).name):
        raise Refusal(404, f"there is no deployment {deployment_id[:64]}")
    return row


def find_by_index(connection: Connection, name: str, index: int) -> DeploymentRow:
    """Deployment number `index` of the agent `name`. Raises Refusal (404)."""
    wanted = (agents.c.name == name) & (deployments.c.index == min(index, MAX_INDEX))
    row = connection.execute(select(deployments).join(agents).where(wanted)).one_or_none()
    if row is None:
        raise Refusal(404, f"agent {name[:128]} has no deployment {index}")
    return DeploymentRow(**row._mapping)


def find_own(
    connection: Connection, agent_name: str | None, deployment_id: str, lock: bool = True
) -> DeploymentRow:
    """The deployment if it is that agent's. Raises Refusal (403 or 404).

    Both are locked, the agent first: whoever decides by all of its deployments does so too.
    """
    agent = find_agent(connection, agent_name, lock)
    deployment = find(connection, deployment_id, lock)
    if deployment.agent_id != agent.id:
        raise Refusal(403, f"deployment {deployment.id} is not one of agent {agent.name}")
    return deployment


@dataclass(frozen=True)
class Open:
    """The deployments of an agent that have not ended: one that runs, and one that waits."""

    running: DeploymentRow | None
    waiting: DeploymentRow | None


def find_open(connection: Connection, agent_ids: Collection[str]) -> dict[str, Open]:
    """The InProgress deployment of each of these agents, and its newest Pending one.

    None waits while an agent is paused.
    """
    is_open = deployments.c.status.in_([PENDING, IN_PROGRESS])
    mine = deployments.c.agent_id.in_(agent_ids) & is_open
    query = select(agents.c.paused_on.label("agent_paused_on"), deployments).join(agents)
    running, waiting = dict[str, DeploymentRow](), dict[str, DeploymentRow]()
    for row in connection.execute(query.where(mine).order_by(deployments.c.index.desc())):
        values = dict(row._mapping)
        is_paused = values.pop("agent_paused_on") is not None
        deployment = DeploymentRow(**values)
        if deployment.status == IN_PROGRESS:
            running.setdefault(deployment.agent_id, deployment)
        elif not is_paused:
            waiting.setdefault(deployment.agent_id, deployment)
    return {each: Open(running.get(each), waiting.get(each)) for each in agent_ids}


def to_wire(row: DeploymentRow) -> Deployment:
    """The message that orders a deployment; `resumed` if the agent was sent it before."""
    return Deployment(
        store_path=row.store_path,
        id=row.id,
        index=row.index,
        rollback_script=row.rollback_script,
        resumed=row.status == IN_PROGRESS,
        signature=None if row.signature is None else loads(row.signature),
        wish=row.wish.to_json() or None,
    )


def list_some(
    connection: Connection,
    limit: int,
    agent: str | None = None,
    status: str | None = None,
    outcome: str | None = None,
    offset: int = 0,
    agent_ids: Collection[str] | None = None,
) -> list[DeploymentRow]:
    """The newest deployments that match, without the first `offset` of them."""
    query = select(deployments).join(agents)
    if agent_ids is not None:
        query = query.where(deployments.c.agent_id.in_(agent_ids))
    for column, value in (
        (agents.c.name, agent),
        (deployments.c.status, status),
        (deployments.c.outcome, outcome),
    ):
        query = query if value is None else query.where(column == value)
    newest = (deployments.c.created_on.desc(), deployments.c.index.desc())
    rows = connection.execute(query.order_by(*newest).limit(limit).offset(offset))
    return [DeploymentRow(**row._mapping) for row in rows]


# --- changes --------------------------------------------------------------------------------------

_UNKNOWN = {
    "status": IN_PROGRESS,
    **dict.fromkeys(("outcome", "reason", "finished_on", "ended_on")),
}


def apply_report(
    connection: Connection, deployment: DeploymentRow, report: Report
) -> tuple[DeploymentRow, bool]:
    """Apply an agent's report; the deployment afterwards, and whether the report was accepted.

    It is not if the deployment had ended differently before, or is to be cancelled and can be.
    """
    if deployment.outcome == UNREPORTED and report.status in TERMINAL:
        deployment = _change(connection, deployment, **_UNKNOWN)  # it comes late, and it counts
    status = transition(deployment.status, report.status)
    denied = report.denies_cancellation(says_steps=deployment.step is not None)
    if status is None and deployment.status == CANCELLED and denied:
        status = report.status  # its agent did not hear of the cancellation in time
        revived = {"cancel_refused": utc_now(), "reason": None}
        revived.update(finished_on=None, ended_on=None)
        deployment = _change(connection, deployment, **revived)
    if status is None:
        return deployment, False
    if deployment.cancel_requested is not None and report.is_before_activation:
        return _change(connection, deployment, **_cancelled()), False
    changes = _news(deployment, report)
    if status == deployment.status and (status in TERMINAL or not changes):
        return deployment, True  # a repetition costs no write
    time = report.time if TIME.fullmatch(report.time) else utc_now()
    changes["status"] = status
    if "step" in changes:
        steps = [*loads(deployment.steps or "[]"), [changes["step"], time]]
        changes["steps"] = dumps(steps[:MAX_STEPS])
    if status == IN_PROGRESS:
        changes["started_on"] = deployment.started_on or time
        fail_others(connection, deployment)
    else:
        reason = None if report.reason is None else report.reason[:MAX_REASON]
        changes.update(ended(status, reason), finished_on=time, outcome=report.outcome)
    if status == SUCCEEDED and report.outcome not in (DRY_RUN, TESTED):
        _note_success(connection, deployment, report.outcome, time)
    return _change(connection, deployment, **changes), True


def _note_success(
    connection: Connection, deployment: DeploymentRow, outcome: str | None, time: str
) -> None:
    """Note what the agent was deployed last.

    If it says what it runs, it will say that of this one too: until then nobody is to take what it
    ran before for a change by hand.
    """
    newer = others(deployment, SUCCEEDED) & (deployments.c.index > deployment.index)
    if connection.execute(select(deployments.c.id).where(newer).limit(1)).first():
        return  # this report comes late
    mine, path = agents.c.id == deployment.agent_id, deployment.store_path
    deployed = {"deployed": path, "deployed_on": time}
    connection.execute(update(agents).where(mine).values(**deployed))
    if outcome != REBOOT_NEEDED:
        differs = agents.c.running.is_not(None) & (agents.c.running != path)
        runs = {"running": path, "running_since": time, "by_hand": None}
        connection.execute(update(agents).where(mine & differs).values(**runs))


def _news(deployment: DeploymentRow, report: Report) -> dict[str, Any]:
    """The news of a report, but for the status."""
    news: dict[str, Any] = {}
    if report.closure_size not in (None, deployment.closure_size):
        news["closure_size"] = report.closure_size
    if report.step not in (None, deployment.step):
        news["step"] = report.step
    if deployment.cancel_requested is not None and report.is_after_activation:
        news.update(cancel_requested=None, cancel_refused=utc_now())
    return news


def _change(connection: Connection, deployment: DeploymentRow, **changes: Any) -> DeploymentRow:
    """Change a deployment; the deployment afterwards."""
    mine = deployments.c.id == deployment.id
    connection.execute(update(deployments).where(mine).values(**changes))
    return find(connection, deployment.id)


def _cancelled() -> dict[str, Any]:
    """The columns that change when a deployment is cancelled."""
    return {**ended(CANCELLED, "cancelled"), "cancel_requested": None}


def others(deployment: DeploymentRow, status: str) -> ColumnElement[bool]:
    """Matches the agent's other deployments that have this status."""
    return (
        (deployments.c.agent_id == deployment.agent_id)
        & (deployments.c.status == status)
        & (deployments.c.id != deployment.id)
    )


def ended(status: str, reason: str | None) -> dict[str, Any]:
    """The columns that change when a deployment ends now."""
    now = utc_now()
    return {"status": status, "reason": reason, "finished_on": now, "ended_on": now}


def unreported(reason: str) -> dict[str, Any]:
    """The columns that change when a deployment is given up: its agent may report another end."""
    return {**ended(FAILED, reason), "outcome": UNREPORTED}


def give_up(connection: Connection, running: DeploymentRow, waiting: DeploymentRow) -> None:
    """End a deployment that gave no sign of life, because another one is waiting."""
    index = waiting.index
    reason = f"the agent gave no sign of life any more, and deployment {index} was waiting"
    current = find(connection, running.id, lock=True)
    if current.status == IN_PROGRESS:  # else its report has just come
        _change(connection, current, **unreported(reason))


def refuse(connection: Connection, row: DeploymentRow, reason: str) -> None:
    """End a deployment that its agent must not be sent."""
    current = find(connection, row.id, lock=True)
    if current.status not in TERMINAL:
        _change(connection, current, **ended(FAILED, reason), outcome="nothing-changed")


def fail_others(connection: Connection, deployment: DeploymentRow) -> None:
    """Mark an older InProgress deployment that was never reported finished as failed.

    An agent runs one at a time.
    """
    index = deployment.index
    reason = f"the agent went on to deployment {index} without reporting the end of this one"
    older = others(deployment, IN_PROGRESS) & (deployments.c.index < index)
    connection.execute(update(deployments).where(older).values(**unreported(reason)))


def can_cancel(row: DeploymentRow) -> bool:
    """Whether `cancel` would do anything, as far as is known now."""
    if row.status == PENDING:
        return True
    is_untouched = row.step is not None and row.step in UNTOUCHED_STEPS
    return row.status == IN_PROGRESS and is_untouched and row.cancel_requested is None


def cancel(connection: Connection, deployment_id: str) -> tuple[DeploymentRow, bool]:
    """Cancel a deployment, or ask its agent to; False if it had ended differently before.

    A Pending one is cancelled at once. An agent that reports its steps is asked by the 409 to the
    next report of one before the activation. Raises Refusal (409) if it is too late.
    """
    deployment = find(connection, deployment_id, lock=True)
    if deployment.status in TERMINAL:
        return deployment, deployment.status == CANCELLED
    if deployment.status == PENDING:
        return _change(connection, deployment, **_cancelled()), True
    if deployment.step is None:
        raise Refusal(409, "this agent can't be cancelled once it has started")
    if deployment.step not in UNTOUCHED_STEPS:
        raise Refusal(409, f"it is too late to cancel: the agent is {deployment.step} already")
    if deployment.cancel_requested is not None:
        return deployment, True
    return _change(connection, deployment, cancel_requested=utc_now()), True
