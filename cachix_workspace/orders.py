"""Orders: what CI deploys, what people deploy, retry and roll back. Each makes one run."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection, bindparam, insert, select, update

from cachix_protocol import (
    ABILITY,
    CANCELLED,
    PENDING,
    PLAIN,
    TERMINAL,
    Spec,
    Wish,
    dumps,
    listed,
    loads,
    utc_now,
)
from cachix_workspace import audit, freeze, runs
from cachix_workspace import deployments as all_deployments
from cachix_workspace.agents import AgentRow
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.refusal import Refusal
from cachix_workspace.runs import DEPLOY, RETRY, ROLL_BACK, Source
from cachix_workspace.tables import agents, deployments

ACTIONS = {DEPLOY: "deploy", RETRY: "retry", ROLL_BACK: "roll back"}  # as the audit names them


@dataclass(frozen=True)
class Actor:
    """The actor of an order, as the audit and pages name him, and his address."""

    name: str
    address: str = ""


@dataclass(frozen=True)
class Wanted:
    """The system that an agent is to run; its rollback scripts. `signature` is JSON."""

    store_path: str
    script: str | None = None
    scripts: dict[str, str] = field(default_factory=dict)
    signature: str | None = None
    retry_of: int | None = None
    wish: Wish = PLAIN


@dataclass(frozen=True)
class Order:
    """The deployments that were ordered, by agent, and the ids of those that they replaced."""

    run_id: int
    rows: dict[str, DeploymentRow]
    replaced: list[str]


def order(
    connection: Connection,
    spec: Spec,
    by: Actor,
    source: Source | None = None,
    run_id: int | None = None,
) -> Order:
    """Order what a deploy.json says, as a new run or within one. Raises Refusal as `place` does."""
    wanted = {
        name: Wanted(
            path,
            None,
            spec.rollback_scripts,
            _signed(spec, name),
            wish=spec.wishes.get(name, PLAIN),
        )
        for name, path in spec.agents.items()
    }
    if run_id is not None:
        run_id = runs.go_on(connection, run_id, by.name)
    return place(connection, wanted, by, source=source, run_id=run_id)


def _signed(spec: Spec, name: str) -> str | None:
    signature = spec.signatures.get(name)
    return None if signature is None else dumps(signature)


def place(
    connection: Connection,
    wanted: dict[str, Wanted],
    by: Actor,
    action: str = DEPLOY,
    source: Source | None = None,
    of_run: int | None = None,
    run_id: int | None = None,
) -> Order:
    """Create a run, unless it is there, with a Pending deployment for each agent, by name.

    Raises Refusal: 423 if the workspace is frozen, 400 that names the agents that are unknown, or
    that do not know the operation.
    """
    freeze.check(connection)
    query = select(agents).where(agents.c.name.in_(wanted)).order_by(agents.c.name)
    query = query.with_for_update(key_share=True)  # in one order, or two orders would deadlock
    targets = {row.name: AgentRow(**row._mapping) for row in connection.execute(query)}
    unknown = sorted(name for name in wanted if name not in targets)
    if unknown:
        names = listed([name[:128] for name in unknown])
        hint = "An agent is known once it has connected, or was added."
        raise Refusal(400, f"unknown agents: {names}. {hint}")
    _refuse_beyond(wanted, targets)
    if run_id is None:
        run_id = runs.create(connection, by.name, action, source, of_run)
    created = {name: _planned(targets[name], each, run_id, by) for name, each in wanted.items()}
    replaced = _replace_others(connection, created.values())
    theirs = agents.c.id.in_([row.agent_id for row in created.values()])
    connection.execute(update(agents).where(theirs).values(last_index=agents.c.last_index + 1))
    connection.execute(insert(deployments), [vars(row) for row in created.values()])
    details = [f"{name}, deployment {row.index}: {row.store_path}" for name, row in created.items()]
    audit.record_all(connection, by.name, ACTIONS[action], details, by.address)
    return Order(run_id, created, replaced)


def _refuse_beyond(wanted: dict[str, Wanted], targets: dict[str, AgentRow]) -> None:
    """Raises Refusal (400) for agents that would switch where something else was ordered.

    One that has never connected is asked when it does.
    """
    silent = [a for a in targets.values() if a.has_connected and not a.knows(ABILITY)]
    for wish in {wanted[agent.name].wish for agent in silent} - {PLAIN}:
        raise Refusal(400, beyond([a for a in silent if wanted[a.name].wish == wish], wish))


def beyond(others: Collection[AgentRow], wish: Wish) -> str:
    """A sentence about agents that do not know an operation, or a reboot."""
    names = listed([f"{agent.name} ({agent.program})" for agent in others])
    words = " and ".join(f"`{name}: {word}`" for name, word in wish.to_json().items())
    remedy = "update it to a cachix-deploy that does; nothing was changed"
    return f"the agent does not know {words} and would switch: {names}: {remedy}"


def _planned(agent: AgentRow, wanted: Wanted, run_id: int, by: Actor) -> DeploymentRow:
    """The deployment that an agent is to have next. It is not stored yet."""
    is_known = bool(agent.system)  # one that was added, and has not connected yet, has none
    wish = wanted.wish.to_json()
    return DeploymentRow(
        id=str(uuid.uuid4()),
        agent_id=agent.id,
        index=agent.last_index + 1,
        store_path=wanted.store_path,
        rollback_script=wanted.script or wanted.scripts.get(agent.system),
        status=PENDING,
        reason=None,
        closure_size=None,
        created_on=utc_now(),
        started_on=None,
        finished_on=None,
        log_next=0,
        signature=wanted.signature,
        run_id=run_id,
        actor=by.name,
        retry_of=wanted.retry_of,
        before=agent.running or agent.deployed,
        rollback_scripts=None if is_known or not wanted.scripts else dumps(wanted.scripts),
        operation=wish.get("operation"),
        reboot=wish.get("reboot"),
    )


def choose_scripts(connection: Connection, agent: AgentRow) -> None:
    """Give what waits for an agent the rollback script of its system, which is known only now."""
    unknown = deployments.c.rollback_scripts.is_not(None) & (deployments.c.status == PENDING)
    mine = unknown & (deployments.c.agent_id == agent.id)
    rows = connection.execute(select(deployments.c.id, deployments.c.rollback_scripts).where(mine))
    for row in rows.all():
        values = {"rollback_script": loads(row.rollback_scripts).get(agent.system)}
        this = deployments.c.id == row.id
        connection.execute(update(deployments).where(this).values(**values, rollback_scripts=None))


def _replace_others(connection: Connection, newest: Collection[DeploymentRow]) -> list[str]:
    """Cancel what waits for the agents of these deployments, which are not stored yet; the ids."""
    indexes = {row.agent_id: row.index for row in newest}
    waiting = deployments.c.agent_id.in_(indexes) & (deployments.c.status == PENDING)
    rows = connection.execute(select(deployments.c.id, deployments.c.agent_id).where(waiting)).all()
    if rows:
        ended = {**all_deployments.ended(CANCELLED, None), "reason": bindparam("why")}
        this = deployments.c.id == bindparam("which")
        whys = [f"replaced by deployment {indexes[row.agent_id]}" for row in rows]
        values = [{"which": row.id, "why": why} for row, why in zip(rows, whys)]
        connection.execute(update(deployments).where(this).values(**ended), values)
    return [row.id for row in rows]


# --- retry and roll back --------------------------------------------------------------------------


def signed_only(connection: Connection, names: Collection[str]) -> list[str]:
    """Those of the agents whose last deployment was signed: they want the next one signed too."""
    newest = deployments.c.index == agents.c.last_index
    query = select(agents.c.name).join(deployments).where(newest & agents.c.name.in_(names))
    signed = query.where(deployments.c.signature.is_not(None)).order_by(agents.c.name)
    return list(connection.execute(signed).scalars())


def _refuse_signed(connection: Connection, names: Collection[str]) -> None:
    """Raises Refusal (409) for agents that take signed deployments: this server has no key."""
    signed = signed_only(connection, names)
    if signed:
        how = "start it with `cachix deploy activate` where the key is"
        raise Refusal(409, f"{listed(signed)} take signed deployments only: {how}")


def retry(
    connection: Connection, rows: dict[str, DeploymentRow], by: Actor, of_run: int | None = None
) -> Order:
    """Order deployments that have ended once more, by the agents' names. Raises Refusal."""
    _refuse_signed(connection, rows)
    going = [name for name, row in rows.items() if row.status not in TERMINAL]
    if going or not rows:
        what = f"the deployment of {listed(going)} has not ended" if going else "nothing failed"
        raise Refusal(409, f"there is nothing to retry: {what}")
    wanted = {name: _again(row) for name, row in rows.items()}
    return place(connection, wanted, by, RETRY, of_run=of_run)


def retryable(connection: Connection, rows: dict[str, DeploymentRow]) -> dict[str, DeploymentRow]:
    """Those of the deployments that no newer one has followed: their agents still lack them."""
    query = select(agents.c.name, agents.c.last_index).where(agents.c.name.in_(rows))
    newest = {row.name: row.last_index for row in connection.execute(query)}
    return {name: row for name, row in rows.items() if newest[name] == row.index}


def _again(row: DeploymentRow) -> Wanted:
    """The item that repeats a deployment, for the same agent."""
    scripts = loads(row.rollback_scripts or "{}")
    return Wanted(row.store_path, row.rollback_script, scripts, retry_of=row.index, wish=row.wish)


@dataclass(frozen=True)
class Back:
    """The path that an agent would be rolled back to. No path: it can't be, for this reason."""

    name: str
    now: str | None
    then: str | None
    reason: str = ""


def plan_back(connection: Connection, rows: dict[str, DeploymentRow]) -> list[Back]:
    """The plan of rolling these deployments back, by the agents' names: to the former paths."""
    query = select(agents).where(agents.c.name.in_(rows))
    by_name = {row.name: AgentRow(**row._mapping) for row in connection.execute(query)}
    plan = []
    for name, row in sorted(rows.items()):
        agent = by_name[name]
        now, reason = agent.running or agent.deployed, ""
        if row.before is None:
            reason = "nothing is known to have run before"
        elif agent.last_index != row.index:
            reason = f"deployment {agent.last_index} is newer"
        elif now == row.before:
            reason = "runs it already"
        plan.append(Back(name, now, None if reason else row.before, reason))
    return plan


def roll_back(
    connection: Connection, rows: dict[str, DeploymentRow], by: Actor, of_run: int | None = None
) -> Order:
    """Order what ran before these deployments, by the agents' names. Raises Refusal."""
    plan = {back.name: back.then for back in plan_back(connection, rows) if back.then}
    _refuse_signed(connection, plan)
    if not plan:
        raise Refusal(409, "there is nothing to roll back: no agent ran anything else before")
    wanted = {name: _former(connection, rows[name].agent_id, path) for name, path in plan.items()}
    return place(connection, wanted, by, ROLL_BACK, of_run=of_run)


def deploy_path(
    connection: Connection,
    names: Collection[str],
    store_path: str,
    by: Actor,
    action: str = DEPLOY,
    wish: Wish = PLAIN,
) -> Order:
    """Order one path for some agents, with the rollback script it had there. Raises Refusal."""
    _refuse_signed(connection, names)
    query = select(agents.c.name, agents.c.id).where(agents.c.name.in_(names))
    ids = {row.name: row.id for row in connection.execute(query)}
    wanted = {
        name: _former(connection, ids[name], store_path, wish)
        if name in ids
        else Wanted(store_path, wish=wish)
        for name in names
    }
    return place(connection, wanted, by, action)


def _former(connection: Connection, agent_id: str, store_path: str, wish: Wish = PLAIN) -> Wanted:
    """A path with the rollback script that the agent's last deployment of it had."""
    mine = (deployments.c.agent_id == agent_id) & (deployments.c.store_path == store_path)
    newest = select(deployments).where(mine).order_by(deployments.c.index.desc()).limit(1)
    row = connection.execute(newest).one_or_none()
    if row is None:
        return Wanted(store_path, wish=wish)
    return replace(_again(DeploymentRow(**row._mapping)), retry_of=None, wish=wish)
