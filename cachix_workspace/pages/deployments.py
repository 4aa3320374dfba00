"""One deployment: how it stands, its steps, its log; and all deployments, newest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, request
from sqlalchemy import Connection

from cachix_protocol import FAILED, PENDING, loads
from cachix_workspace import (
    agents,
    cache,
    deployments,
    difference,
    fetched,
    logs,
    logtext,
    orders,
    recent,
    sentences,
    states,
    upkeep,
)
from cachix_workspace.admission import query_number
from cachix_workspace.agents import AgentRow
from cachix_workspace.api import STATUSES, deployment_json
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, page, to, to_sign_in, viewer
from cachix_workspace.pages.errors import is_for_people
from cachix_workspace.people import OPERATOR
from cachix_workspace.refusal import Refusal
from cachix_workspace.states import State

deployment_pages = Blueprint("deployment_pages", __name__)

DOWNLOADING = "downloading"  # the step of which the log tells the progress
RULE = "/agents/<name>/deployments/<int:index>"
MOST_LINES = 10**9 - 1
LISTED = 50  # deployments on a page


@dataclass(frozen=True)
class Seen:
    """A deployment, its agent, and how it stands now."""

    row: DeploymentRow
    agent: AgentRow
    state: State
    telling: sentences.Telling
    is_newest: bool
    can_cancel: bool

    @property
    def url(self) -> str:
        """Its page."""
        return url_of(self.agent.name, self.row.index)


def url_of(name: str, index: int) -> str:
    """The page of a deployment."""
    return f"/agents/{name}/deployments/{index}"


def see(workspace: Workspace, connection: Connection, row: DeploymentRow) -> Seen:
    """Look at a deployment."""
    agent = agents.get(connection, row.agent_id)
    lost_since = workspace.signs.lost_since(row, workspace.settings.lost_after)
    is_behind, progress = False, None
    if row.status == PENDING:
        is_behind = deployments.find_open(connection, [agent.id])[agent.id].running is not None
    if row.step == DOWNLOADING:
        rows = cache.list_all(connection)
        progress = fetched.of_deployment(connection, workspace.settings, rows, row.id)
    return Seen(
        row,
        agent,
        states.of_deployment(row.status, row.outcome, lost_since is not None),
        sentences.tell(row, agent, lost_since, is_behind, progress),
        agent.last_index == row.index,
        deployments.can_cancel(row),
    )


def find(connection: Connection, name: str, index: int) -> DeploymentRow:
    """The deployment of a page. Raises Refusal (404)."""
    return deployments.find_by_index(connection, name, index)


@page(deployment_pages, RULE, role=None)
def get_deployment(name: str, index: int) -> Response:
    """A deployment by its agent and number: a page for people, JSON for whoever has a token."""
    if not is_for_people():
        return deployment_json(name, index)
    if viewer() is None:
        return to_sign_in()
    workspace = current_workspace()
    with workspace.database.read() as connection:
        row = find(connection, name, index)
        seen = see(workspace, connection, row)
        log = _log_page(connection, row)
        signed = bool(orders.signed_only(connection, [name]))
        changes, info = _about_paths(workspace, connection, row)
    topics = f"deployment:{row.id} agent:{row.agent_id}"
    return show.page(
        "deployment.html",
        topics=topics,
        seen=seen,
        marks=sentences.marks(row, loads(row.steps or "[]")),
        took=sentences.seconds_between(row.started_on, row.finished_on),
        log=log,
        signed=signed,
        changes=changes,
        info=info,
        url=workspace.settings.link_by(request.host),
    )


def _about_paths(
    workspace: Workspace, connection: Connection, row: DeploymentRow
) -> tuple[difference.Difference | None, Any]:
    """The difference in packages, and a cache's entry of the new path."""
    rows = cache.list_all(connection)
    changes = difference.between(workspace.settings, rows, row.before, row.store_path)
    return changes, recent.find(workspace.settings, rows, row.store_path)


@dataclass(frozen=True)
class LogPage:
    """A page of a log: lines counted from 0; `matches` are of a search."""

    lines: list[logtext.Line]
    start: int
    total: int
    first_error: int | None
    wanted: str
    matches: list[logtext.Match]
    at: int  # the number of the line that was asked for, 0 for none

    @property
    def end(self) -> int:
        """The index after the last line."""
        return self.start + len(self.lines)

    @property
    def is_at_end(self) -> bool:
        """Whether this is the last page."""
        return self.end >= self.total


def _log_page(connection: Connection, row: DeploymentRow) -> LogPage:
    """The page that the query asks for; else the end, or the first error of a failed one."""
    total, wanted = row.log_next, request.args.get("find", "").strip()[:200]
    at = query_number("line", 0, MOST_LINES)
    error = None
    if row.status == FAILED:
        error = logtext.first_error(connection, row.id, total)
    start = max(0, total - logtext.PAGE)
    if at:
        start = max(0, min(at - 1 - logtext.PAGE // 2, start))
    elif "from" in request.args:
        start = max(0, min(query_number("from", 0, MOST_LINES), max(0, total - 1)))
    elif error is not None:
        start = max(0, min(error - 20, start))
    lines = logtext.page(connection, row.id, start)
    matches = logtext.search(connection, row.id, wanted) if wanted else []
    return LogPage(lines, start, total, error, wanted, matches, at)


@page(deployment_pages, f"{RULE}/lines")
def get_lines(name: str, index: int) -> Response:
    """The lines from `from` on, as a part of the page: what the script appends."""
    start = query_number("from", 0, MOST_LINES)
    with current_workspace().database.read() as connection:
        row = find(connection, name, index)
        lines = logtext.page(connection, row.id, min(start, row.log_next))
    return show.page("lines.html", lines=lines, url=url_of(name, index))


@page(deployment_pages, f"{RULE}/log.txt")
def get_text(name: str, index: int) -> Response:
    """The whole log as text, each line as the agent sent it."""
    workspace = current_workspace()
    with workspace.database.read() as connection:
        row = find(connection, name, index)
    answer = Response(logs.stream(workspace.database, row.id), mimetype="text/plain")
    answer.headers["Content-Disposition"] = f'attachment; filename="{name}-{index}.log"'
    return answer


# --- retry and cancel -----------------------------------------------------------------------------


@page(deployment_pages, f"{RULE}/retry", role=OPERATOR)
def get_retry(name: str, index: int) -> Response:
    """The page that asks before a retry, where a newer deployment exists."""
    with current_workspace().database.read() as connection:
        row = find(connection, name, index)
        agent = agents.get(connection, row.agent_id)
    return show.page("retry.html", row=row, agent=agent, url=url_of(name, index))


@page(deployment_pages, f"{RULE}/retry", role=OPERATOR, methods=("POST",))
def post_retry(name: str, index: int) -> Response:
    """Order this deployment once more; asks first where a newer one exists."""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        row = find(connection, name, index)
        agent = agents.get(connection, row.agent_id)
        if agent.last_index != row.index and not request.form.get("sure"):
            return to(f"{url_of(name, index)}/retry")
        order = orders.retry(connection, {name: row}, actor())
    workspace.note_order(order)
    return to(url_of(name, order.rows[name].index))


@page(deployment_pages, f"{RULE}/cancel", role=OPERATOR, methods=("POST",))
def post_cancel(name: str, index: int) -> Response:
    """Cancel this deployment, or ask its agent to."""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        row, is_cancelled = upkeep.cancel(connection, find(connection, name, index).id, actor())
    if not is_cancelled:
        raise Refusal(409, f"deployment {index} of {name} has ended already: it is {row.status}")
    workspace.note_cancel(row)
    return to(url_of(name, index))


# --- all deployments ------------------------------------------------------------------------------


@page(deployment_pages, "/deployments")
def get_deployments() -> Response:
    """All deployments, newest first."""
    workspace, number = current_workspace(), max(1, query_number("page", 1, 10_000))
    agent = request.args.get("agent", "").strip()[:128]
    status = request.args.get("status", "")
    with workspace.database.read() as connection:
        rows = deployments.list_some(
            connection,
            LISTED + 1,
            agent or None,
            status if status in STATUSES else None,
            offset=(number - 1) * LISTED,
        )
        sights = [see(workspace, connection, row) for row in rows[:LISTED]]
    pages = number + (1 if len(rows) > LISTED else 0)
    return show.page(
        "deployments.html",
        topics="runs",
        rows=sights,
        agent=agent,
        wanted=status,
        statuses=STATUSES,
        number=number,
        pages=pages,
    )
