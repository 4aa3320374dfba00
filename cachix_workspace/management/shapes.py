"""The API's schemas of agents, deployments and runs.

Schemas are for the document, and functions fill them.
"""

from __future__ import annotations

from typing import Any

from marshmallow import Schema, fields, validate

from cachix_protocol import PLAIN, WISHES
from cachix_workspace import states
from cachix_workspace.agents import MAX_DESCRIPTION, AgentRow
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.fleet import Brief
from cachix_workspace.owners import Binding
from cachix_workspace.reports import SHOWN_OUTCOMES
from cachix_workspace.runs import RunRow

MOST = 1000  # things on a page
NAME = validate.Regexp(r"^[0-9A-Za-z][0-9A-Za-z._-]{0,127}$")
TEXT = validate.Length(max=MAX_DESCRIPTION)
LARGEST = (1 << 31) - 1  # a database's integers hold no more
Json = dict[str, Any]


class Problem(Schema):
    """An error: one sentence that says what was wrong, and what to do."""

    error = fields.String(required=True)


class Paging(Schema):
    """Select a page, from 1, and its length."""

    page = fields.Integer(load_default=1, validate=validate.Range(1, 1_000_000))
    limit = fields.Integer(load_default=100, validate=validate.Range(1, MOST))


def offset(query: Json) -> int:
    """How many things stand before a page."""
    return min((int(query["page"]) - 1) * int(query["limit"]), LARGEST)


def small(number: int) -> int:
    """A number that a database takes: larger ones are no number of anything."""
    return min(number, LARGEST)


def paged(things: list[Any], page: int, limit: int, key: str) -> Json:
    """A page of things, of which one more than `limit` was looked for."""
    return {key: things[:limit], "next": page + 1 if len(things) > limit else None}


class Secret(Schema):
    """A token with its secret, which is shown this once."""

    id = fields.Integer(required=True)
    kind = fields.String(required=True)
    secret = fields.String(required=True)


# --- agents ---------------------------------------------------------------------------------------


class AgentQuery(Paging):
    """Select agents by words in name, system or labels; by a label; by the key of a state."""

    text = fields.String(load_default="", validate=validate.Length(max=200))
    label = fields.String(load_default="", validate=validate.Length(max=40))
    state = fields.String(
        load_default="",
        validate=validate.OneOf(["", "paused", *(one.key for one in states.AGENT_STATES)]),
    )


class Agent(Schema):
    """An agent."""

    id = fields.String(required=True)
    name = fields.String(required=True)
    createdOn = fields.String(required=True)
    state = fields.String(required=True)
    connected = fields.Boolean(required=True)
    seenOn = fields.String(allow_none=True)
    system = fields.String(required=True)
    kind = fields.String(allow_none=True)
    version = fields.String(required=True)
    client = fields.String(allow_none=True)
    labels = fields.List(fields.String())
    pausedSince = fields.String(allow_none=True)
    running = fields.String(allow_none=True)
    runningIsReported = fields.Boolean()
    deployment = fields.Integer(allow_none=True)
    lastDeployment = fields.Integer(allow_none=True)
    lastState = fields.String(allow_none=True)
    lastStorePath = fields.String(allow_none=True)
    lastEndedOn = fields.String(allow_none=True)
    bound = fields.Boolean(required=True)
    hasOwnToken = fields.Boolean(required=True)
    token = fields.Integer(allow_none=True)


class AgentDetail(Agent):
    """An agent with all that is known of it."""

    description = fields.String(allow_none=True)
    pausedBy = fields.String(allow_none=True)
    runningSince = fields.String(allow_none=True)
    profile = fields.String(allow_none=True)
    rebootNeededSince = fields.String(allow_none=True)
    byHand = fields.String(allow_none=True)
    deployed = fields.String(allow_none=True)
    deployedOn = fields.String(allow_none=True)
    formerPaths = fields.List(fields.String(), required=True)


class Agents(Schema):
    """A page of agents."""

    agents = fields.List(fields.Nested(Agent), required=True)
    next = fields.Integer(allow_none=True)


class NewAgent(Schema):
    """An agent that is added, with a token of its own."""

    name = fields.String(required=True, validate=NAME)
    description = fields.String(load_default="", validate=TEXT)
    labels = fields.List(fields.String(), load_default=list)
    expiresInDays = fields.Float(load_default=None, allow_none=True)
    cache = fields.String(load_default="")


class AgentChange(Schema):
    """A change of an agent."""

    name = fields.String(validate=NAME)
    description = fields.String(validate=TEXT)
    labels = fields.List(fields.String())
    paused = fields.Boolean()


def agent(brief: Brief, binding: Binding) -> Json:
    """An agent as the API shows it."""
    return {
        "id": brief.id,
        "name": brief.name,
        "createdOn": brief.created_on,
        "state": brief.state.key,
        "connected": brief.connected,
        "seenOn": brief.seen_on or None,
        "system": brief.system,
        "kind": brief.kind,
        "version": brief.version,
        "client": brief.client,
        "labels": list(brief.labels),
        "pausedSince": brief.paused_on,
        "running": brief.running,
        "runningIsReported": brief.is_reported,
        "deployment": None if brief.open is None else brief.open.index,
        "lastDeployment": None if brief.ended is None else brief.ended.index,
        "lastState": None if brief.ended is None else brief.ended.state.key,
        "lastStorePath": None if brief.ended is None else brief.ended.store_path,
        "lastEndedOn": None if brief.ended is None else brief.ended.time,
        "bound": binding.is_bound,
        "hasOwnToken": binding.has_own_token,
        "token": binding.token_id,
    }


def agent_detail(brief: Brief, binding: Binding, row: AgentRow, former: list[str]) -> Json:
    """An agent with all that is known of it, and the paths that it has succeeded with."""
    return {
        **agent(brief, binding),
        "description": row.description,
        "pausedBy": row.paused_by,
        "runningSince": row.running_since,
        "profile": row.profile,
        "rebootNeededSince": row.reboot_since,
        "byHand": row.by_hand,
        "deployed": row.deployed,
        "deployedOn": row.deployed_on,
        "formerPaths": former,
    }


# --- deployments and runs -------------------------------------------------------------------------


class DeploymentQuery(Paging):
    """Select deployments."""

    agent = fields.String(load_default=None, validate=validate.Length(max=128))
    status = fields.String(
        load_default=None,
        validate=validate.OneOf(["Pending", "InProgress", "Succeeded", "Failed", "Cancelled"]),
    )
    outcome = fields.String(load_default=None, validate=validate.OneOf(sorted(SHOWN_OUTCOMES)))


class Deployment(Schema):
    """A deployment; docs/protocol.rst says what the fields mean."""

    id = fields.String(required=True)
    agent = fields.String(required=True)
    index = fields.Integer(required=True)
    state = fields.String(required=True)
    status = fields.String(required=True)
    outcome = fields.String(allow_none=True)
    step = fields.String(allow_none=True)
    reason = fields.String(allow_none=True)
    storePath = fields.String(required=True)
    before = fields.String(allow_none=True)
    closureSize = fields.Integer(allow_none=True)
    createdOn = fields.String(required=True)
    startedOn = fields.String(allow_none=True)
    finishedOn = fields.String(allow_none=True)
    cancelRequested = fields.String(allow_none=True)
    startedBy = fields.String(allow_none=True)
    retryOf = fields.Integer(allow_none=True)
    run = fields.Integer(allow_none=True)
    operation = fields.String(required=True)
    reboot = fields.String(required=True)


class Deployments(Schema):
    """A page of deployments."""

    deployments = fields.List(fields.Nested(Deployment), required=True)
    next = fields.Integer(allow_none=True)


def deployment(name: str, row: DeploymentRow, is_lost: bool = False) -> Json:
    """A deployment as the API shows it."""
    known = row.to_json()
    facts = {key: known[key] for key in Deployment._declared_fields if key in known}
    return {
        **facts,
        "agent": name,
        "state": states.of_deployment(row.status, row.outcome, is_lost).key,
    }


class Run(Schema):
    """A run: what one order did."""

    id = fields.Integer(required=True)
    createdOn = fields.String(required=True)
    startedBy = fields.String(required=True)
    action = fields.String(required=True)
    ofRun = fields.Integer(allow_none=True)
    source = fields.Dict(keys=fields.String(), values=fields.String(), required=True)
    counts = fields.Dict(keys=fields.String(), values=fields.Integer(), required=True)


class RunDetail(Run):
    """A run with its deployments."""

    deployments = fields.List(fields.Nested(Deployment), required=True)


class Runs(Schema):
    """A page of runs."""

    runs = fields.List(fields.Nested(Run), required=True)
    next = fields.Integer(allow_none=True)


class Names(Schema):
    """Some agents of a run; all of them if it is left out."""

    agents = fields.List(fields.String(validate=NAME), load_default=None, allow_none=True)


class Back(Schema):
    """The path that an agent would go back to; null with a reason if it can't."""

    agent = fields.String(required=True)
    now = fields.String(allow_none=True)
    then = fields.String(allow_none=True)
    reason = fields.String()


class Plan(Schema):
    """The plan of a roll-back."""

    agents = fields.List(fields.Nested(Back), required=True)


class Order(Schema):
    """An order: one path, to some agents."""

    agents = fields.List(fields.String(validate=NAME), required=True, validate=validate.Length(1))
    storePath = fields.String(required=True, validate=validate.Length(max=400))
    operation = fields.String(
        load_default=PLAIN.operation, validate=validate.OneOf(WISHES["operation"])
    )
    reboot = fields.String(load_default=PLAIN.reboot, validate=validate.OneOf(WISHES["reboot"]))


def run(row: RunRow, counts: dict[str, int], members: list[Json] | None = None) -> Json:
    """A run as the API shows it."""
    source = {key: value for key, value in vars(row.origin).items() if value}
    facts = {
        "id": row.id,
        "createdOn": row.created_on,
        "startedBy": row.actor,
        "action": row.action,
        "ofRun": row.of_run,
        "source": source,
        "counts": counts,
    }
    return facts if members is None else {**facts, "deployments": members}
