"""The API for agents, deployments and runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from flask import Response
from sqlalchemy import Connection

from cachix_protocol import FAILED, PLAIN, WISHES, Wish, is_store_path
from cachix_workspace import (
    agents,
    deployments,
    enrolment,
    fleet,
    logs,
    orders,
    owners,
    past,
    runs,
    states,
    upkeep,
)
from cachix_workspace.context import current_workspace
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.enrolment import Terms
from cachix_workspace.fleet import Brief, Filter
from cachix_workspace.management import shapes
from cachix_workspace.management.access import (
    admins,
    allows,
    by,
    check_admin,
    check_agents,
    operations,
    operators,
    own_agents,
)
from cachix_workspace.management.shapes import Json
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import AGENT

blueprint = operations("fleet", "Agents, deployments and runs")


# --- agents ---------------------------------------------------------------------------------------


def _briefs(connection: Connection, names: list[str] | None = None) -> list[Brief]:
    workspace = current_workspace()
    lost_after = workspace.settings.lost_after
    return fleet.brief_of_all(connection, workspace.signs, lost_after, names)


def _detail(connection: Connection, name: str) -> Json:
    """All that is known of an agent. Raises Refusal (404)."""
    [row] = agents.find_all(connection, [name])
    former = past.succeeded_paths(connection, row.id)
    binding = owners.bindings(connection, [name])[name]
    return shapes.agent_detail(_briefs(connection, [name])[0], binding, row, former)


@blueprint.get("/agents")
@blueprint.arguments(shapes.AgentQuery, location="query")
@blueprint.response(200, shapes.Agents)
@operators
def list_agents(query: Json) -> Json:
    """List agents: what needs a look first, then by name"""
    wanted = Filter(query["text"], query["label"], query["state"])
    page, limit = query["page"], query["limit"]
    with current_workspace().database.read() as connection:
        briefs = [one for one in _briefs(connection) if wanted.matches(one) and allows(one.name)]
        listed_briefs = briefs[(page - 1) * limit : page * limit + 1]
        bound = owners.bindings(connection, [one.name for one in listed_briefs])
    answer = [shapes.agent(one, bound[one.name]) for one in listed_briefs]
    return shapes.paged(answer, page, limit, "agents")


@blueprint.post("/agents")
@blueprint.arguments(shapes.NewAgent)
@blueprint.response(201, shapes.Secret)
@admins
def add_agent(new: Json) -> Json:
    """Add an agent, with a token that is for it alone"""
    terms = Terms(new["expiresInDays"], new["cache"], new["description"])
    with current_workspace().database.write() as connection:
        labels = " ".join(new["labels"])
        enrolled = enrolment.add_one(connection, new["name"], terms, by(), labels)
        agent = agents.find(connection, new["name"])
    current_workspace().note_agents(agent.id)
    return {"id": enrolled.token_id, "kind": AGENT, "secret": enrolled.secret}


@blueprint.get("/agents/<name>")
@blueprint.response(200, shapes.AgentDetail)
@operators
def show_agent(name: str) -> Json:
    """Show an agent"""
    check_agents([name])
    with current_workspace().database.read() as connection:
        return _detail(connection, name)


@blueprint.patch("/agents/<name>")
@blueprint.arguments(shapes.AgentChange)
@blueprint.response(200, shapes.AgentDetail)
@operators
def change_agent(change: Json, name: str) -> Json:
    """Pause or resume an agent, label, describe or rename it"""
    check_agents([name])
    if "name" in change:
        check_admin()
    workspace = current_workspace()
    with workspace.database.write() as connection:
        [row] = agents.find_all(connection, [name])
        if "paused" in change:
            act = upkeep.pause if change["paused"] else upkeep.resume
            act(connection, [name], by())
        if "labels" in change:
            upkeep.set_labels(connection, [name], " ".join(change["labels"]), by())
        if "description" in change:
            upkeep.describe(connection, name, change["description"], by())
        if "name" in change:
            name = upkeep.rename(connection, name, change["name"], by()).name
        answer = _detail(connection, name)
    if "name" in change:
        workspace.dismiss(row.id)
    workspace.note_agents(row.id)
    return answer


@blueprint.post("/agents/<name>/move")
@blueprint.response(200, shapes.AgentDetail)
@admins
def move_agent(name: str) -> Json:
    """Let another machine have the name of an agent"""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        if not upkeep.move(connection, name, by()):
            text = f"{name} is not bound to a machine: any that has a token for it can connect"
            raise Refusal(409, text)
        row = agents.find(connection, name)
        answer = _detail(connection, name)
    workspace.dismiss(row.id)
    return answer


@blueprint.delete("/agents/<name>")
@blueprint.response(204)
@admins
def remove_agent(name: str) -> None:
    """Forget an agent with its deployments and logs"""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        row = upkeep.remove(connection, name, by())
    workspace.dismiss(row.id)


# --- deployments ----------------------------------------------------------------------------------


def _shown(name: str, row: DeploymentRow) -> Json:
    workspace = current_workspace()
    lost = workspace.signs.lost_since(row, workspace.settings.lost_after)
    return shapes.deployment(name, row, lost is not None)


@blueprint.get("/deployments")
@blueprint.arguments(shapes.DeploymentQuery, location="query")
@blueprint.response(200, shapes.Deployments)
@operators
def list_deployments(query: Json) -> Json:
    """List deployments, the newest first"""
    page, limit = query["page"], query["limit"]
    with current_workspace().database.read() as connection:
        rows = deployments.list_some(
            connection,
            limit + 1,
            query["agent"],
            query["status"],
            query["outcome"],
            shapes.offset(query),
            own_agents(connection),
        )
        names = agents.names_of(connection, {row.agent_id for row in rows})
    answer = [_shown(names[row.agent_id], row) for row in rows]
    return shapes.paged(answer, page, limit, "deployments")


@blueprint.post("/deployments")
@blueprint.arguments(shapes.Order)
@blueprint.response(201, shapes.RunDetail)
@operators
def start_deployments(order: Json) -> Json:
    """Deploy one path to some agents"""
    names = list(dict.fromkeys(order["agents"]))
    check_agents(names)
    if not is_store_path(order["storePath"]):
        raise Refusal(400, "`storePath` must be a store path such as /nix/store/HASH-NAME")
    wanted = {name: order[name] for name in WISHES}
    wish = Wish.from_json(wanted, "the order", PLAIN)
    with current_workspace().database.write() as connection:
        agents.find_all(connection, names)
        placement = orders.deploy_path(connection, names, order["storePath"], by(), wish=wish)
        answer = _run(connection, placement.run_id)
    current_workspace().note_order(placement)
    return answer


def _find(connection: Connection, name: str, index: int) -> DeploymentRow:
    check_agents([name])
    return deployments.find_by_index(connection, name, index)


@blueprint.get("/agents/<name>/deployments/<int:index>")
@blueprint.response(200, shapes.Deployment)
@operators
def show_deployment(name: str, index: int) -> Json:
    """Show a deployment"""
    with current_workspace().database.read() as connection:
        return _shown(name, _find(connection, name, index))


@blueprint.get("/agents/<name>/deployments/<int:index>/log")
@blueprint.response(200, {"type": "string"}, content_type="text/plain")
@operators
def show_log(name: str, index: int) -> Response:
    """Show the log of a deployment as text"""
    workspace = current_workspace()
    with workspace.database.read() as connection:
        row = _find(connection, name, index)
    return Response(logs.stream(workspace.database, row.id), mimetype="text/plain")


@blueprint.post("/agents/<name>/deployments/<int:index>/retry")
@blueprint.response(201, shapes.Deployment)
@operators
def retry_deployment(name: str, index: int) -> Json:
    """Order a deployment that has ended once more"""
    with current_workspace().database.write() as connection:
        order = orders.retry(connection, {name: _find(connection, name, index)}, by())
        answer = _shown(name, order.rows[name])
    current_workspace().note_order(order)
    return answer


@blueprint.post("/agents/<name>/deployments/<int:index>/cancel")
@blueprint.response(200, shapes.Deployment)
@operators
def cancel_deployment(name: str, index: int) -> Json:
    """Cancel a deployment, or ask its agent to"""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        row, is_cancelled = upkeep.cancel(connection, _find(connection, name, index).id, by())
    if not is_cancelled:
        raise Refusal(409, f"deployment {index} of {name} has ended already: it is {row.status}")
    workspace.note_cancel(row)
    return _shown(name, row)


# --- runs -----------------------------------------------------------------------------------------


def _counts(counts: Counter[tuple[str, str]]) -> dict[str, int]:
    counter: Counter[str] = Counter()
    for (status, outcome), count in counts.items():
        counter[states.of_deployment(status, outcome).key] += count
    return dict(counter)


def _run(connection: Connection, run_id: int) -> Json:
    """A run with those of its deployments that the token is for. Raises Refusal (404)."""
    row = runs.get(connection, run_id)
    members = [
        shapes.deployment(one.name, one.row)
        for one in runs.members(connection, run_id)
        if allows(one.name)
    ]
    if not members and own_agents(connection) is not None:
        raise Refusal(404, f"there is no run {run_id}")
    return shapes.run(row, dict(Counter(one["state"] for one in members)), members)


@blueprint.get("/runs")
@blueprint.arguments(shapes.Paging, location="query")
@blueprint.response(200, shapes.Runs)
@operators
def list_runs(query: Json) -> Json:
    """List runs, the newest first"""
    page, limit = query["page"], query["limit"]
    with current_workspace().database.read() as connection:
        mine = own_agents(connection)
        rows = runs.list_some(connection, limit + 1, offset=shapes.offset(query), agent_ids=mine)
        counts = runs.counts(connection, [row.id for row in rows], mine)
    answer = [shapes.run(row, _counts(counts[row.id])) for row in rows]
    return shapes.paged(answer, page, limit, "runs")


@blueprint.get("/runs/<int:run_id>")
@blueprint.response(200, shapes.RunDetail)
@operators
def show_run(run_id: int) -> Json:
    """Show a run with its deployments"""
    with current_workspace().database.read() as connection:
        return _run(connection, run_id)


def _rows(connection: Connection, run_id: int, names: Any = None) -> dict[str, DeploymentRow]:
    """The deployments of a run that the token is for, perhaps of some agents. Raises Refusal."""
    run_id = runs.get(connection, run_id).id
    members = runs.members(connection, run_id)
    rows = {one.name: one.row for one in members if allows(one.name)}
    if members and not rows:
        raise Refusal(404, f"there is no run {run_id}")
    unknown = sorted(set(names or ()) - set(rows))
    if unknown:
        raise Refusal(404, f"run {run_id} has no deployment for {', '.join(unknown)[:300]}")
    return {name: row for name, row in rows.items() if names is None or name in names}


@blueprint.post("/runs/<int:run_id>/retry")
@blueprint.arguments(shapes.Names)
@blueprint.response(201, shapes.RunDetail)
@operators
def retry_run(chosen: Json, run_id: int) -> Json:
    """Order what failed in a run once more"""
    with current_workspace().database.write() as connection:
        rows = _rows(connection, run_id, chosen["agents"])
        failed = {name: row for name, row in rows.items() if row.status == FAILED}
        again = orders.retryable(connection, failed)
        order = orders.retry(connection, again, by(), run_id)
        answer = _run(connection, order.run_id)
    current_workspace().note_order(order)
    return answer


@blueprint.get("/runs/<int:run_id>/roll-back")
@blueprint.response(200, shapes.Plan)
@operators
def plan_roll_back(run_id: int) -> Json:
    """Show what a roll-back of a run would do"""
    with current_workspace().database.read() as connection:
        plan = orders.plan_back(connection, _rows(connection, run_id))
    return {
        "agents": [
            {"agent": one.name, "now": one.now, "then": one.then, "reason": one.reason}
            for one in plan
        ]
    }


@blueprint.post("/runs/<int:run_id>/roll-back")
@blueprint.arguments(shapes.Names)
@blueprint.response(201, shapes.RunDetail)
@operators
def roll_back_run(chosen: Json, run_id: int) -> Json:
    """Order what ran before a run"""
    with current_workspace().database.write() as connection:
        rows = _rows(connection, run_id, chosen["agents"])
        if chosen["agents"] is None and len(rows) < len(runs.members(connection, run_id)):
            how = "name those of its agents that it is for"
            raise Refusal(403, f"this token is not for all agents of run {run_id}: {how}")
        order = orders.roll_back(connection, rows, by(), run_id)
        answer = _run(connection, order.run_id)
    current_workspace().note_order(order)
    return answer
