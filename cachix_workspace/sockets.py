"""The websockets: their routes, and how a request becomes one."""

from __future__ import annotations

import re
from typing import Any, Callable

from flask import Blueprint, Response, request
from wsproto.utilities import ProtocolError

from cachix_workspace import agents, deployments
from cachix_workspace.admission import authenticate, authenticate_agent, authenticate_report
from cachix_workspace.agent_sockets import AgentHandler, Arrival
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.handlers import Handler
from cachix_workspace.refusal import Refusal
from cachix_workspace.report_sockets import LogHandler, ReportHandler
from cachix_workspace.tokens import CI, Token
from cachix_workspace.viewers import ViewHandler
from cachix_workspace.websocket import MAX_MESSAGE, Handshake, Socket

MAX_LINE = 32 << 20  # bytes of a log message: Cachix's agent sends a line of any length in one
KEY = re.compile(r"[0-9A-Za-z+/]{22}==")  # 16 bytes

socket_routes = Blueprint("sockets", __name__)

Maker = Callable[[Workspace, Socket], Handler]


@socket_routes.route("/ws", websocket=True)
def agent_socket() -> Response:
    """The socket on which an agent gets its deployments."""
    token, name = authenticate_agent()
    system, version, host = (request.headers.get(key, "") for key in ("system", "version", "Host"))
    user_agent, address = request.headers.get("User-Agent", ""), request.remote_addr or ""
    arrival = Arrival(token, name, system, version, user_agent, host, address)
    return park(token, lambda workspace, sock: AgentHandler(workspace, sock, arrival))


@socket_routes.route("/ws-deployment", websocket=True)
def report_socket() -> Response:
    """The socket on which Cachix's agent reports."""
    token, name = authenticate_report()
    with current_workspace().database.read() as connection:
        agent_id = agents.find_id(connection, name)
    return park(token, lambda workspace, sock: ReportHandler(workspace, sock, name, agent_id))


@socket_routes.route("/api/v1/deploy/log/<deployment_id>", websocket=True)
def log_socket(deployment_id: str) -> Response:
    """The socket of a viewer (`view=true`), or of Cachix's agent that writes a log."""
    if request.args.get("view") == "true":
        return _view_socket(deployment_id)
    token, name = authenticate_report(deployment_id)
    with current_workspace().database.read() as connection:
        log_id = deployments.find_own(connection, name, deployment_id, lock=False).id
    return park(
        token,
        lambda workspace, sock: LogHandler(workspace, sock, name, log_id),
        log_id=log_id,
        max_message=MAX_LINE,
    )


def _view_socket(deployment_id: str) -> Response:
    token = authenticate(CI)
    with current_workspace().database.read() as connection:
        log_id = deployments.find_allowed(connection, token, deployment_id).id
    return park(token, lambda workspace, sock: ViewHandler(workspace, sock, log_id), log_id=log_id)


class _Parked(Response):
    """The answer on a connection that becomes a websocket: the lot has it when this has ended."""

    def __call__(self, *_arguments: Any) -> Any:
        raise StopIteration  # to gunicorn this means that nothing is to be sent


def park(
    token: Token, make: Maker, log_id: str | None = None, max_message: int = MAX_MESSAGE
) -> Response:
    """Make this request a websocket, which is handled without a thread of its own."""
    if not KEY.fullmatch(request.headers.get("Sec-WebSocket-Key", "")):
        raise Refusal(400, "this is no websocket handshake: Sec-WebSocket-Key is missing or wrong")
    try:
        handshake = Handshake(request.headers)
    except (ProtocolError, UnicodeError) as error:
        raise Refusal(400, f"this is no websocket handshake: {error}") from None
    workspace = current_workspace()
    settings = workspace.settings
    workspace.hub.enter(token.id, settings.most_sockets(token.is_for_one))
    sock = Socket(handshake, workspace.turns, token.id, settings, max_message, log_id)
    make(workspace, sock)
    workspace.hub.add(sock)
    workspace.lot.claim(request.environ["gunicorn.socket"], sock)
    return _Parked()
