"""Adding an agent, and the program that it runs."""

from __future__ import annotations

import subprocess

from flask import Blueprint, Response, request

from cachix_workspace import agents, blocks, cache, enrolment, program
from cachix_workspace.admission import query_number
from cachix_workspace.blocks import Facts, Way
from cachix_workspace.context import current_workspace
from cachix_workspace.enrolment import Enrolled, Terms
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, page
from cachix_workspace.people import ADMINISTRATOR
from cachix_workspace.refusal import Refusal

enrol_pages = Blueprint("enrol_pages", __name__)


def url() -> str:
    """The URL of this workspace by which the browser has come."""
    return current_workspace().settings.url_by(request.host)


def ways_for(name: str, token: str = "") -> list[Way]:
    """The blocks for an agent. Raises Refusal (503) if the program can't be built."""
    return blocks.ways(Facts(name, url(), program_hash(), token))


def program_hash() -> str:
    """The SHA-256 of the program. Raises Refusal (503) if it can't be built."""
    return _program().sha256


def _program() -> program.Program:
    try:
        return program.program()
    except (OSError, subprocess.SubprocessError) as error:
        text = f"this workspace can't build the agent's program: {error}"
        raise Refusal(503, text) from None


@page(enrol_pages, "/get/cachix-deploy.pyz", role=None)
def get_program() -> Response:
    """The agent and the command for CI in one file, of this workspace's version."""
    answer = Response(_program().content, mimetype="application/octet-stream")
    answer.headers["Content-Disposition"] = 'attachment; filename="cachix-deploy.pyz"'
    return answer


@page(enrol_pages, "/get/cachix-deploy.pyz.sha256", role=None)
def get_hash() -> Response:
    """The SHA-256 of the program, as sha256sum writes it."""
    return Response(f"{_program().sha256}  cachix-deploy.pyz\n", mimetype="text/plain")


@page(enrol_pages, "/add", role=ADMINISTRATOR)
def get_add() -> Response:
    """The forms for one agent and for many."""
    return _forms()


def _forms(problem: str = "", status: int = 200) -> Response:
    with current_workspace().database.read() as connection:
        caches = cache.list_all(connection)
    return show.page(
        "add.html", status, caches=caches, problem=problem, form=request.form, opened=request.path
    )


@page(enrol_pages, "/add/one", role=ADMINISTRATOR, methods=("POST",))
def post_one() -> Response:
    """Add one agent, and show its token."""
    workspace, name = current_workspace(), request.form.get("name", "").strip()
    try:
        with workspace.database.write() as connection:
            labels = request.form.get("labels", "")
            enrolled = enrolment.add_one(connection, name, _terms(), actor(), labels)
            agent = agents.find(connection, name)
    except Refusal as refusal:
        return _forms(str(refusal), refusal.code)
    workspace.note_agents(agent.id)
    return _enrolled(enrolled, agent)


@page(enrol_pages, "/agents/<name>/token", role=ADMINISTRATOR, methods=("POST",))
def post_token(name: str) -> Response:
    """Make a further token for an agent."""
    with current_workspace().database.write() as connection:
        enrolled = enrolment.new_token(connection, name, actor())
        agent = agents.find(connection, name)
    return _enrolled(enrolled, agent)


@page(enrol_pages, "/add/many", role=ADMINISTRATOR, methods=("POST",))
def post_many() -> Response:
    """Make an enrolment token, and show it."""
    try:
        with current_workspace().database.write() as connection:
            count = _number("count")
            whole = None if count is None else int(count)
            names = request.form.get("names", "")
            enrolled = enrolment.add_many(connection, names, whole, _terms(), actor())
    except Refusal as refusal:
        return _forms(str(refusal), refusal.code)
    return _enrolled(enrolled, None)


def _enrolled(enrolled: Enrolled, agent: agents.AgentRow | None) -> Response:
    name = enrolled.agents if agent is not None else "$(hostname)"
    what = f"name={name}" if agent is not None else f"token={enrolled.token_id}"
    return show.page(
        "enrolled.html",
        topics="agents",
        live=f"/add/arrived?{what}",
        enrolled=enrolled,
        agent=agent,
        arrived=[],
        ways=ways_for(name, enrolled.secret),
    )


@page(enrol_pages, "/add/arrived", role=ADMINISTRATOR)
def get_arrived() -> Response:
    """Whether an agent has come, or which ones an enrolment token has brought so far."""
    name, number = request.args.get("name", ""), query_number("token", 0, 10**9 - 1)
    with current_workspace().database.read() as connection:
        agent = agents.find(connection, name) if name else None
        arrived = enrolment.arrived(connection, number)
    return show.page("arrived.html", topics="agents", agent=agent, arrived=arrived)


def _terms() -> Terms:
    form = request.form
    return Terms(_number("days"), form.get("cache", ""), form.get("description", "").strip()[:300])


def _number(field: str) -> float | None:
    """A positive number in the form, None for an empty field. Raises Refusal (400)."""
    text = request.form.get(field, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 7 or int(text) == 0:
        raise Refusal(400, f"{text[:40]!r} is no number above 0")
    return float(text)
