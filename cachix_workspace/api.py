"""Plain requests about deployments and their logs."""

from __future__ import annotations

import logging
from typing import Any

from flask import Blueprint, Response, request
from sqlalchemy import Connection

from cachix_protocol import IN_PROGRESS, PENDING, TERMINAL, Spec, listed, loads
from cachix_workspace import agents, audit, deployments, logs, machine_state, orders, tokens
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
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.machine_state import MachineState
from cachix_workspace.orders import Actor
from cachix_workspace.refusal import Refusal
from cachix_workspace.reports import OUTCOMES, Report, check_signatures
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
    rows, _ = _order()
    return json_answer({"agents": {name: _page_url(name, row) for name, row in rows.items()}})


@deployment_routes.post("/api/v2/deploy/activate")
def order_v2() -> Response:
    """Order the deployments of a deploy.json; the answer has their ids and URLs."""
    rows, token = _order()
    links = {name: {"id": row.id, "url": _page_url(name, row)} for name, row in rows.items()}
    expires = token.expires_on if tokens.days_left(token) <= max(tokens.WARN) else None
    return json_answer({"agents": links, **({"tokenExpires": expires} if expires else {})})


def _order() -> tuple[dict[str, DeploymentRow], Token]:
    """Order the deployments of the request's deploy.json; the new ones by agent, and the token."""
    token = authenticate(CI)
    json_wanted()
    record = loads(read_body(MAX_JSON))
    spec = Spec.from_json(record)
    check_signatures(spec)
    source = Source.from_json(record.get("source"))
    others = [name for name in spec.agents if not token.allows(name)]
    if others:
        raise Refusal(403, f"this token is for agents {token.agents}, not for {listed(others)}")
    workspace = current_workspace()
    by = Actor(_ci_name(token, source), request.remote_addr or "")
    with workspace.database.write() as connection:
        order = orders.order(connection, spec, by, source)
    names = ", ".join(order.rows) if len(order.rows) <= 5 else f"{len(order.rows)} agents"
    logger.info("token %d deploys to %s", token.id, names)
    workspace.note_order(order)
    return order.rows, token


def _ci_name(token: Token, source: Source | None) -> str:
    """Who orders, for people: a token, and what CI said about itself."""
    short = "" if source is None else source.short
    return f"CI (token {token.id}, {short})" if short else token.label


def _page_url(name: str, row: DeploymentRow) -> str:
    return f"{current_workspace().settings.public_url}/agents/{name}/deployments/{row.index}"


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
    status, outcome = query_word("status", STATUSES), query_word("outcome", OUTCOMES)
    limit = query_number("limit", MANY, MOST)
    with current_workspace().database.read() as connection:
        found = deployments.list_some(connection, limit, agent, status, outcome)
        described = [_describe(connection, row) for row in found]
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
        row, cancelled = deployments.cancel(connection, deployment_id)
        name = agents.get(connection, row.agent_id).name
        detail = f"{name}, deployment {row.index}: now {row.status}"
        audit.record(connection, token.label, "cancel", detail, request.remote_addr or "")
    workspace.hub.wake_agent(row.agent_id)
    workspace.note_deployments(row)
    return json_answer(row.to_json(), 200 if cancelled else 409)


@deployment_routes.put("/api/v1/deploy/deployment/<deployment_id>/status")
def put_status(deployment_id: str) -> Response:
    """An agent's report; 409 if the deployment had ended differently before."""
    _, name = authenticate_report(deployment_id)
    json_wanted()
    report = Report.from_json(loads(read_body(MAX_JSON)))
    workspace = current_workspace()
    with workspace.database.write() as connection:
        before = deployments.find_own(connection, name, deployment_id)
        row, accepted = deployments.apply_report(connection, before, report)
    if row != before:
        workspace.note_report(row)
    elif row.status not in TERMINAL:
        workspace.signs.note(row.id)
    return json_answer(row.to_json(), 200 if accepted else 409)


@deployment_routes.put("/api/v1/deploy/agent/<agent_id>/state")
def put_state(agent_id: str) -> Response:
    """What an agent says of its machine."""
    _, name = authenticate_agent()
    json_wanted()
    state = MachineState.from_json(loads(read_body(MAX_STATE)))
    workspace = current_workspace()
    with workspace.database.write() as connection:
        agent = agents.find(connection, name)
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
    with workspace.database.write() as connection:
        row = deployments.find_own(connection, name, deployment_id)
        try:
            following = logs.append(connection, row, offset, lines, workspace.settings.max_log)
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
