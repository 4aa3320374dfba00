"""One agent: how it is, what runs, its deployments, and what an operator may do with it."""

from __future__ import annotations

from flask import Blueprint, Response, request

from cachix_protocol import PENDING
from cachix_workspace import agents, deployments, fleet, orders, past, tokens, upkeep
from cachix_workspace.admission import query_number
from cachix_workspace.context import current_workspace
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, current, page, to
from cachix_workspace.pages.deployments import see
from cachix_workspace.pages.enrol import ways_for
from cachix_workspace.people import ADMINISTRATOR, OPERATOR
from cachix_workspace.refusal import Refusal
from cachix_workspace.runs import ROLL_BACK

agent_pages = Blueprint("agent_pages", __name__)

LISTED = 20  # deployments on a page
KEEPS = (
    "The machine keeps a secret of its own for the former name: start its agent by the new name "
    "with the enrolment token."
)


@page(agent_pages, "/agents/<name>")
def get_agent(name: str) -> Response:
    """An agent. Raises Refusal (404)."""
    workspace, number = current_workspace(), max(1, query_number("page", 1, 10_000))
    lost_after = workspace.settings.lost_after
    with workspace.database.read() as connection:
        agent = agents.find_all(connection, [name])[0]
        brief = fleet.brief_of_all(connection, workspace.signs, lost_after, [name])[0]
        start = (number - 1) * LISTED
        rows = deployments.list_some(connection, LISTED + 1, name, offset=start)
        sights = [see(workspace, connection, row) for row in rows[:LISTED]]
        signed = bool(orders.signed_only(connection, [name]))
        former = past.succeeded_paths(connection, agent.id)
        token = tokens.get(connection, agent.token_id) if agent.token_id else None
    is_new = not agent.has_connected and current().may(ADMINISTRATOR)
    return show.page(
        "agent.html",
        topics=f"agent:{agent.id}",
        agent=agent,
        brief=brief,
        sights=sights,
        signed=signed,
        former=[path for path in former if path != agent.runs],
        token=token,
        number=number,
        pages=number + (1 if len(rows) > LISTED else 0),
        ways=ways_for(name) if is_new else [],
        url=workspace.settings.link_by(request.host),
        waiting=sum(one.row.status == PENDING for one in sights),
    )


@page(agent_pages, "/agents/<name>/<any(pause,resume):what>", OPERATOR, methods=("POST",))
def post_pause(name: str, what: str) -> Response:
    """Let what is deployed to an agent wait, or come."""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        change = upkeep.pause if what == "pause" else upkeep.resume
        rows = change(connection, [name], actor())
    workspace.note_agents(*(row.id for row in rows))
    return to(f"/agents/{name}")


@page(agent_pages, "/agents/<name>/describe", OPERATOR, methods=("POST",))
def post_describe(name: str) -> Response:
    """Change labels and description."""
    workspace, by = current_workspace(), actor()
    with workspace.database.write() as connection:
        upkeep.set_labels(connection, [name], request.form.get("labels", ""), by)
        row = upkeep.describe(connection, name, request.form.get("description", ""), by)
    workspace.note_agents(row.id)
    return to(f"/agents/{name}")


@page(agent_pages, "/agents/<name>/deploy", OPERATOR, methods=("POST",))
def post_deploy(name: str) -> Response:
    """Deploy a path that the agent has had: again, or back to it."""
    workspace, path = current_workspace(), request.form.get("path", "")
    with workspace.database.write() as connection:
        agent = agents.find_all(connection, [name])[0]
        if path not in past.succeeded_paths(connection, agent.id):
            raise Refusal(409, f"{name} has not succeeded with {path[:200]}: see the page Deploy")
        order = orders.deploy_path(connection, [name], path, actor(), ROLL_BACK)
    workspace.note_order(order)
    return to(f"/agents/{name}/deployments/{order.rows[name].index}")


# --- rename, move, remove -------------------------------------------------------------------------


@page(agent_pages, "/agents/<name>/<any(rename,move,remove):what>", ADMINISTRATOR)
def get_change(name: str, what: str) -> Response:
    """The page that asks before a rename, a move or a removal."""
    with current_workspace().database.read() as connection:
        agent = agents.find_all(connection, [name])[0]
    return show.page("change_agent.html", agent=agent, what=what, keeps=KEEPS)


@page(agent_pages, "/agents/<name>/rename", ADMINISTRATOR, methods=("POST",))
def post_rename(name: str) -> Response:
    """Give an agent another name."""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        row = upkeep.rename(connection, name, request.form.get("new", "").strip(), actor())
    workspace.dismiss(row.id)
    return to(f"/agents/{row.name}")


@page(agent_pages, "/agents/<name>/move", ADMINISTRATOR, methods=("POST",))
def post_move(name: str) -> Response:
    """Let another machine have this name."""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        if not upkeep.move(connection, name, actor()):
            text = f"{name} is not bound to a machine: any that has a token for it can connect"
            raise Refusal(409, text)
        row = agents.find(connection, name)
    workspace.dismiss(row.id)
    return to(f"/agents/{name}")


@page(agent_pages, "/agents/<name>/remove", ADMINISTRATOR, methods=("POST",))
def post_remove(name: str) -> Response:
    """Forget an agent."""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        row = upkeep.remove(connection, name, actor())
    workspace.dismiss(row.id)
    return to("/")


# --- several at once ------------------------------------------------------------------------------


@page(agent_pages, "/selected", OPERATOR, methods=("POST",))
def post_selected() -> Response:
    """Do something with the agents that are selected on the overview."""
    workspace, names = current_workspace(), request.form.getlist("name")
    what = request.form.get("do", "")
    if not names:
        raise Refusal(400, "select the agents first")
    if what in ("pause", "resume"):
        with workspace.database.write() as connection:
            change = upkeep.pause if what == "pause" else upkeep.resume
            rows = change(connection, names, actor())
        workspace.note_agents(*(row.id for row in rows))
        return to("/")
    with workspace.database.read() as connection:
        rows = agents.find_all(connection, names)
        newest = past.newest(connection, names)
        plan = orders.plan_back(connection, newest)
        signed = orders.signed_only(connection, names)
    titles = {"retry": "Retry", "roll-back": "Roll back", "label": "Labels of"}
    if what not in titles:
        raise Refusal(400, "choose what to do with the selected agents")
    return show.page(
        "selected.html",
        rows=rows,
        newest=newest,
        plan=plan,
        signed=signed,
        what=what,
        title=titles[what],
    )


@page(agent_pages, '/selected/<any(retry,"roll-back",label):what>', OPERATOR, ("POST",))
def post_sure(what: str) -> Response:
    """Do it."""
    workspace, names, by = current_workspace(), request.form.getlist("name"), actor()
    if not names:
        raise Refusal(400, "select the agents first")
    with workspace.database.write() as connection:
        if what == "label":
            rows = upkeep.set_labels(connection, names, request.form.get("labels", ""), by)
        else:
            agents.find_all(connection, names)
            newest = past.newest(connection, names)
            act = orders.retry if what == "retry" else orders.roll_back
            order = act(connection, newest, by)
    if what == "label":
        workspace.note_agents(*(row.id for row in rows))
        return to("/")
    workspace.note_order(order)
    return to(f"/runs/{order.run_id}")
