"""Plain requests about deployments and their logs."""

from __future__ import annotations

import logging
from typing import Any

from flask import Blueprint, Response, request
from sqlalchemy import Connection

from cachix_protocol import IN_PROGRESS, PENDING, TERMINAL, Spec, checked_field, listed, loads
from cachix_workspace import agents, deployments, logs, machine_state, orders, tokens, upkeep
from cachix_workspace.admission import (
    authenticate,
    authenticate_agent,
    authenticate_report,
    log_offset,
    query_number,
    query_word,
    read_body,
)
from cachix_workspace.answers import json_answer
from cachix_workspace.browsers import json_wanted
from cachix_workspace.context import current_workspace
from cachix_workspace.database import Lock
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.machine_state import MachineState
from cachix_workspace.orders import Actor, Order
from cachix_workspace.refusal import Refusal
from cachix_workspace.reports import SHOWN_OUTCOMES, Report, check_signatures
from cachix_workspace.runs import Source
from cachix_workspace.tokens import CI, Token

logger = logging.getLogger(__name__)

MAX_JSON = 4 << 20  # bytes of a deploy.json or a status
MANY, MOST = 100, 1000  # deployments in one answer
STATUSES = (PENDING, IN_PROGRESS, *sorted(TERMINAL))
MAX_LOG = 16 << 20  # bytes of log lines in one request
MAX_STATE = 16 << 10  # bytes of what an agent says of its machine

deployment_routes = Blueprint("deployments", __name__)
log_routes = Blueprint("logs", __name__)


# --- deployments ----------------------------------------------------------------------------------


@deployment_routes.post("/api/v1/deploy/activate")
def order_v1() -> Response:
    """Order the deployments of a deploy.json; the answer has their URLs."""
    order, _ = _order()
    links = {name: _page_url(name, row) for name, row in order.rows.items()}
    return json_answer({"agents": links, **_run(order)})


@deployment_routes.post("/api/v3/deploy/activate", endpoint="order_v3")
@deployment_routes.post("/api/v2/deploy/activate")
def order_v2() -> Response:
    """Order the deployments of a deploy.json; the answer has their ids and URLs.

    v3 is asked by whoever must know that `options` are understood.
    """
    order, token = _order()
    links = {name: {"id": row.id, "url": _page_url(name, row)} for name, row in order.rows.items()}
    expires = token.expires_on if tokens.days_left(token) <= max(tokens.WARN) else None
    more = {"tokenExpires": expires} if expires else {}
    return json_answer({"agents": links, **_run(order), **more})


def _run(order: Order) -> dict[str, Any]:
    """The run of an order, which later orders may go on with."""
    url = f"{current_workspace().settings.link_by(request.host)}/runs/{order.run_id}"
    return {"run": order.run_id, "runUrl": url}


def _order() -> tuple[Order, Token]:
    """Order the deployments of the request's deploy.json; the order, and the token."""
    token = authenticate(CI)
    json_wanted()
    record = loads(read_body(MAX_JSON))
    spec = Spec.from_json(record)
    check_signatures(spec)
    source = Source.from_json(record.get("source"))
    run_id = checked_field(record, "run", int, optional=True)
    others = [name for name in spec.agents if not token.allows(name)]
    if others:
        raise Refusal(403, f"this token is for agents {token.agents}, not for {listed(others)}")
    workspace = current_workspace()
    by = Actor(_ci_name(token, source), request.remote_addr or "")
    with workspace.database.write(Lock.SHARED) as connection:
        order = orders.order(connection, spec, by, source, run_id)
    names = ", ".join(order.rows) if len(order.rows) <= 5 else f"{len(order.rows)} agents"
    logger.info("token %d deploys to %s", token.id, names)
    workspace.note_order(order)
    return order, token


def _ci_name(token: Token, source: Source | None) -> str:
    """The actor of an order, for people: a token, with the commit that CI names."""
    short = "" if source is None else source.short
    return f"CI (token {token.id}, {short})" if short else token.label


def _page_url(name: str, row: DeploymentRow) -> str:
    url = current_workspace().settings.link_by(request.host)
    return f"{url}/agents/{name}/deployments/{row.index}"


def deployment_json(name: str, index: int) -> Response:
    """A deployment by its agent and number, for whoever has a token for CI."""
    token = authenticate(CI)
    with current_workspace().database.read() as connection:
        row = deployments.find_by_index(connection, name, index)
        row = deployments.find_allowed(connection, token, row.id)
        return json_answer(_describe(connection, row))


@deployment_routes.get("/api/v1/deploy/deployment/<deployment_id>")
def get_deployment(deployment_id: str) -> Response:
    """A deployment by its id."""
    token = authenticate(CI)
    with current_workspace().database.read() as connection:
        row = deployments.find_allowed(connection, token, deployment_id)
        return json_answer(_describe(connection, row))


@deployment_routes.get("/api/v1/deploy/deployments")
def get_deployments() -> Response:
    """The newest deployments, by `agent`, `status` and `outcome`; `limit` of them."""
    token = authenticate(CI)
    agent = request.args.get("agent")
    status, outcome = query_word("status", STATUSES), query_word("outcome", SHOWN_OUTCOMES)
    limit = query_number("limit", MANY, MOST)
    with current_workspace().database.read() as connection:
        rows = deployments.list_some(connection, limit, agent, status, outcome)
        described = [_describe(connection, row) for row in rows]
    mine = [each for each in described if token.allows(each["agent"])]
    return json_answer({"deployments": mine})


def _describe(connection: Connection, row: DeploymentRow) -> dict[str, Any]:
    """A deployment, and what is known of its agent."""
    workspace, agent = current_workspace(), agents.get(connection, row.agent_id)
    return {
        **row.to_json(),
        "lostSince": workspace.signs.lost_since(row, workspace.settings.lost_after),
        "agent": agent.name,
        "agentOnline": agent.connected,
        "agentOfflineSince": None if agent.connected else agent.seen_on or None,
        "agentVersion": agent.client,
        "agentPausedSince": agent.paused_on,
    }


@deployment_routes.post("/api/v1/deploy/deployment/<deployment_id>/cancel")
def cancel(deployment_id: str) -> Response:
    """Cancel a deployment, or ask its agent to; 409 if it is too late."""
    token = authenticate(CI)
    workspace = current_workspace()
    with workspace.database.write() as connection:
        deployments.find_allowed(connection, token, deployment_id)
        by = Actor(token.label, request.remote_addr or "")
        row, is_cancelled = upkeep.cancel(connection, deployment_id, by)
    workspace.note_cancel(row)
    return json_answer(row.to_json(), 200 if is_cancelled else 409)


@deployment_routes.put("/api/v1/deploy/deployment/<deployment_id>/status")
def put_status(deployment_id: str) -> Response:
    """An agent's report; 409 if the deployment had ended differently before."""
    _, name = authenticate_report(deployment_id)
    json_wanted()
    report = Report.from_json(loads(read_body(MAX_JSON)))
    workspace = current_workspace()

    def write(connection: Connection) -> tuple[DeploymentRow, DeploymentRow, bool]:
        before = deployments.find_own(connection, name, deployment_id)
        row, accepted = deployments.apply_report(connection, before, report)
        if row != before and row.status in TERMINAL:
            logs.finish(connection, row)
        return before, row, accepted

    before, row, accepted = workspace.grouped.run(workspace.database, write)
    if row != before:
        workspace.note_report(row)
        if row.log_dropped is not None:
            workspace.note_log(row.id)
    elif row.status not in TERMINAL:
        workspace.signs.note(row.id)
    return json_answer(row.to_json(), 200 if accepted else 409)


@deployment_routes.put("/api/v1/deploy/agent/<agent_id>/state")
def put_state(agent_id: str) -> Response:
    """Take an agent's report on its machine."""
    _, name = authenticate_agent()
    json_wanted()
    state = MachineState.from_json(loads(read_body(MAX_STATE)))
    workspace = current_workspace()
    with workspace.database.write(Lock.ROWS) as connection:
        agent = agents.find(connection, name, lock=True)
        if agent.id != agent_id.lower():
            raise Refusal(
                403, f"this is not the id of agent {name}: an agent speaks for itself only"
            )
        is_new = machine_state.note(connection, agent, state)
    if is_new:
        workspace.note_agents(agent.id)
    return json_answer({})


# --- logs -----------------------------------------------------------------------------------------


@log_routes.put("/api/v1/deploy/log/<deployment_id>")
def put_log(deployment_id: str) -> Response:
    """Append an agent's log lines; 416 if some were left out before them, 409 if it is closed."""
    _, name = authenticate_report(deployment_id)
    offset, lines = log_offset(), logs.decode_many(read_body(MAX_LOG))
    workspace = current_workspace()

    def write(connection: Connection) -> tuple[DeploymentRow, int]:
        row = deployments.find_own(connection, name, deployment_id)
        return row, logs.append(connection, row, offset, lines, workspace.settings.max_log)

    try:
        row, following = workspace.grouped.run(workspace.database, write)
    except logs.Gap as gap:
        return json_answer({"next": gap.next}, 416)
    except logs.Closed as closed:
        return json_answer({"next": closed.next}, 409)
    workspace.signs.note(row.id)
    if following != logs.taken(row):
        workspace.note_log(row.id)
    return json_answer({"next": following})


@log_routes.get("/api/v1/deploy/log/<deployment_id>")
def get_log(deployment_id: str) -> Response:
    """Some of the log lines from `offset` on."""
    token, offset = authenticate(CI), log_offset()
    with current_workspace().database.read() as connection:
        row = deployments.find_allowed(connection, token, deployment_id)
        lines = logs.read(connection, row.id, offset)
    # the lines are JSON already, about a million characters of it
    body = f'{{"next":{offset + len(lines)},"lines":[{",".join(lines)}]}}\n'
    return Response(body, mimetype="application/json")
