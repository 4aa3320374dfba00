"""The websockets: their routes, and the handler of each kind of socket."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from typing import Any, Callable

import simple_websocket  # type: ignore[import-untyped]
from flask import Blueprint, Response, request
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from cachix_protocol import (
    FAILED,
    IN_PROGRESS,
    SUCCEEDED,
    TERMINAL,
    AgentRegistered,
    DeploymentStarted,
    FromAgent,
    Undecodable,
    decode_from_agent,
    encode_to_agent,
)
from cachix_workspace import agents, audit, cache, deployments, life, logs, orders, owners, tokens
from cachix_workspace.admission import authenticate, authenticate_agent, authenticate_report
from cachix_workspace.agents import AgentRow
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.life import Decision, Sent
from cachix_workspace.refusal import Refusal
from cachix_workspace.reports import Report
from cachix_workspace.tokens import CI, Token
from cachix_workspace.websocket import (
    COMPLETE,
    INTERNAL_ERROR,
    MAX_MESSAGE,
    RESTART,
    REVOKED,
    Socket,
)

logger = logging.getLogger(__name__)

MAX_LINE = 32 << 20  # bytes of a log message: Cachix's agent sends a line of any length in one
IDLE = 60.0  # seconds after which a sleeping thread looks around without being woken
KEY = re.compile(r"[0-9A-Za-z+/]{22}==")  # 16 bytes
LOG_GRACE = 3.0  # seconds that a viewer waits for the last lines of a deployment that has ended

socket_routes = Blueprint("sockets", __name__)

Handler = Callable[[Workspace, Socket], None]


# --- routes ---------------------------------------------------------------------------------------


@socket_routes.route("/ws", websocket=True)
def agent_socket() -> Response:
    """The socket on which an agent gets its deployments."""
    token, name = authenticate_agent()
    return serve(token, lambda workspace, sock: serve_agent(workspace, sock, token, name))


@socket_routes.route("/ws-deployment", websocket=True)
def report_socket() -> Response:
    """The socket on which Cachix's agent reports."""
    token, name = authenticate_report()
    return serve(token, lambda workspace, sock: receive_reports(workspace, sock, name))


@socket_routes.route("/api/v1/deploy/log/<deployment_id>", websocket=True)
def log_socket(deployment_id: str) -> Response:
    """The socket of a viewer (`view=true`), or of Cachix's agent that writes a log."""
    if request.args.get("view") == "true":
        return _view_socket(deployment_id)
    token, name = authenticate_report(deployment_id)
    with current_workspace().database.read() as connection:
        log_id = deployments.find_own(connection, name, deployment_id).id
    return serve(
        token,
        lambda workspace, sock: receive_log(workspace, sock, name, log_id),
        log_id=log_id,
        max_message=MAX_LINE,
    )


def _view_socket(deployment_id: str) -> Response:
    token = authenticate(CI)
    with current_workspace().database.read() as connection:
        log_id = deployments.find_allowed(connection, token, deployment_id).id
    return serve(token, lambda workspace, sock: send_log(workspace, sock, log_id), log_id=log_id)


class _Handled(Response):
    """The answer on a connection that was a websocket: there is nothing more to send."""

    def __call__(self, *_arguments: Any) -> Any:
        raise StopIteration  # to gunicorn this means: close the connection


def serve(
    token: Token, handle: Handler, log_id: str | None = None, max_message: int = MAX_MESSAGE
) -> Response:
    """Make this request a websocket, handle it until it ends, and close it.

    After the handshake nothing may raise: gunicorn would write an HTTP answer into the websocket.
    """
    if not KEY.fullmatch(request.headers.get("Sec-WebSocket-Key", "")):
        raise Refusal(400, "this is no websocket handshake: Sec-WebSocket-Key is missing or wrong")
    workspace = current_workspace()
    with workspace.hub.slot(token.id, workspace.settings.most_sockets(token.is_for_one)):
        try:
            sock = Socket(request.environ, token.id, workspace.settings, max_message)
        except (RemoteProtocolError, simple_websocket.ConnectionError, UnicodeError) as error:
            raise Refusal(400, f"this is no websocket handshake: {error}") from None
        except OSError:
            return _Handled()
        with workspace.hub.track(sock, log_id):
            try:
                handle(workspace, sock)
            except Refusal as refusal:  # another agent was faster after the handshake
                sock.end(REVOKED[0], str(refusal))
            except (OSError, LocalProtocolError) as error:
                logger.debug("a websocket ended: %s", error)  # the peer is gone, or is closing
            except Exception:
                logger.exception("the handler of %s failed", request.path)
                sock.end(*INTERNAL_ERROR)
            finally:
                sock.finish()
    return _Handled()


# --- /ws ------------------------------------------------------------------------------------------


def serve_agent(workspace: Workspace, sock: Socket, token: Token, name: str) -> None:
    """Register the agent, then send each deployment when it is due."""
    system, version, host = (request.headers.get(key, "") for key in ("system", "version", "Host"))
    client = agents.client_of(request.headers.get("User-Agent", ""))
    with workspace.database.write() as connection:
        known = agents.find_known(connection, name)
        is_new = known is None or not known.has_connected
        agent = agents.register(connection, name, system, version, client)
        address = request.remote_addr or ""
        if is_new:
            audit.record(connection, token.label, "agent", f"{name} connected first", address)
        secret = owners.admit(connection, token, agent)
        if token.issued_by is not None and agent.owner_id is None:
            audit.record(connection, token.label, "agent", f"{name} is bound to it", address)
        orders.choose_scripts(connection, agent)
        place = (token.cache_id, workspace.settings, host, agent.is_ours)
        its_cache = cache.find_for_agent(connection, *place)
    workspace.hub.register(agent.id, sock)
    workspace.note_agents(agent.id)
    workspace.signs.note(agent.id)
    expires = token.expires_on if tokens.days_left(token) <= max(tokens.WARN) else None
    try:
        hello = AgentRegistered(agent.id, its_cache, "http", secret, expires)
        sock.send_texts([encode_to_agent(hello)])
        with workspace.signs.open(agent.id) if agent.is_ours else contextlib.nullcontext():
            _send_all(workspace, sock, agent)
    finally:
        if workspace.hub.unregister(agent.id, sock):
            with workspace.database.write() as connection:
                agents.mark_disconnected(connection, agent.id)
            workspace.note_agents(agent.id)


def _send_all(workspace: Workspace, sock: Socket, agent: AgentRow) -> None:
    """Send the agent's deployments, each when it is due, until the socket ends."""
    sent = Sent()
    while sock.open:
        if _is_another(workspace, agent):  # a command beside the server can't close sockets
            sock.end(*RESTART)
            return
        decision = _decide(workspace, agent, sent)
        if decision.end is not None and decision.send is not None:
            _give_up(workspace, decision.end, decision.send)
        if decision.send is not None:
            sock.send_texts([encode_to_agent(deployments.to_wire(decision.send))])
            workspace.signs.note(decision.send.id)
        sent = life.after(sent, decision)
        sock.take(IDLE if decision.pause is None else min(IDLE, decision.pause))


def _is_another(workspace: Workspace, agent: AgentRow) -> bool:
    """Whether the agent was renamed or removed since it registered."""
    with workspace.database.read() as connection:
        return agents.find_id(connection, agent.name) != agent.id


def _decide(workspace: Workspace, agent: AgentRow, sent: Sent) -> Decision:
    """What to send the agent now."""
    with workspace.database.read() as connection:
        now = deployments.find_open(connection, agent.id)
    silence = workspace.signs.silence(now.running.id, agent.id) if now.running else 0.0
    return life.decide(now, agent.is_ours, sent, silence, workspace.settings.patience)


def _give_up(workspace: Workspace, running: DeploymentRow, waiting: DeploymentRow) -> None:
    """End a deployment whose process has died unreported."""
    with workspace.database.write() as connection:
        deployments.give_up(connection, running, waiting)
    workspace.signs.forget(running.id)
    workspace.note_deployments(running)


# --- /ws-deployment -------------------------------------------------------------------------------


def receive_reports(workspace: Workspace, sock: Socket, name: str) -> None:
    """Apply the reports of Cachix's agent. Ours sends none: it checks whether it gets through."""
    with workspace.database.read() as connection:
        agent_id = agents.find_id(connection, name)
    with workspace.signs.open(agent_id):
        while True:
            messages = sock.take(IDLE)
            for message in messages:
                try:
                    _apply(workspace, name, decode_from_agent(message))
                except (Undecodable, Refusal) as error:
                    text = "skipped a message of agent %s on /ws-deployment: %s"
                    logger.warning(text, name, error)
            if not messages and not sock.open:
                return


def _apply(workspace: Workspace, name: str, command: FromAgent) -> None:
    facts: dict[str, Any] = {"time": command.time}
    if isinstance(command, DeploymentStarted):
        facts.update(status=IN_PROGRESS, closureSize=command.closure_size)
    else:
        facts.update(status=SUCCEEDED if command.has_succeeded else FAILED)
    report = Report.from_json(facts)
    with workspace.database.write() as connection:
        row = deployments.find_own(connection, name, command.id)
        row, accepted = deployments.apply_report(connection, row, report)
    if not accepted:
        reported = f"{report.status} for a deployment that is {row.status}"
        logger.warning("agent %s reports %s", name, reported)
    workspace.note_report(row)


# --- logs -----------------------------------------------------------------------------------------


def receive_log(workspace: Workspace, sock: Socket, name: str, deployment_id: str) -> None:
    """Append the lines of Cachix's agent, which sends a message for each."""
    with workspace.signs.open(deployment_id):
        while True:
            messages = sock.take(IDLE)
            lines = []
            for message in messages:
                try:
                    lines.append(logs.decode(message))
                except Undecodable as error:
                    logger.warning("skipped a line of deployment %s: %s", deployment_id, error)
            if lines:
                with workspace.database.write() as connection, contextlib.suppress(logs.Closed):
                    row = deployments.find_own(connection, name, deployment_id)
                    logs.append(connection, row, None, lines, workspace.settings.max_log)
                workspace.note_log(deployment_id)
            if not messages and not sock.open:
                return


def send_log(workspace: Workspace, sock: Socket, deployment_id: str) -> None:
    """Send a viewer all lines from the first on, and close when no more are to come."""
    offset, last, quiet_since = 0, "", 0.0
    while sock.open:
        with workspace.database.read() as connection:
            row = deployments.find(connection, deployment_id)
            lines = logs.read(connection, row.id, offset)
        if lines:
            sock.send_texts(lines)
            offset, last, quiet_since = offset + len(lines), lines[-1], time.monotonic()
            continue
        wait = IDLE
        if row.status in TERMINAL:
            quiet_since = quiet_since or time.monotonic()
            wait = quiet_since + LOG_GRACE - time.monotonic()
            if wait <= 0 or _is_complete(row, last):
                sock.end(*COMPLETE)
                return
        sock.take(wait)


def _is_complete(row: DeploymentRow, last: str) -> bool:
    """Whether no more lines are to come to a log that has ended with the line `last`.

    It has no lines if the deployment never started, else a closing line.
    """
    if row.started_on is None and row.log_next == 0:
        return True
    return bool(last) and logs.is_closing(last)
