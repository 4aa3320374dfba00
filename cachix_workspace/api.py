"""The HTTP face: routes, tokens, JSON answers. Decisions are in deployments, logs and cache."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, Callable

import simple_websocket  # type: ignore[import-untyped]
from flask import Flask, Response, request, send_file
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from cachix_protocol import (
    FAILED,
    IN_PROGRESS,
    SUCCEEDED,
    Spec,
    Undecodable,
    dumps,
    is_agent_name,
    loads,
)
from cachix_workspace import Error, Refusal, Settings, cache, deployments, logs, tokens
from cachix_workspace.sockets import (
    INTERNAL_ERROR,
    MAX_LINE,
    MAX_MESSAGE,
    Handlers,
    Hub,
    Socket,
    mark_all_disconnected,
)
from cachix_workspace.tables import Database, open_database, put_meta
from cachix_workspace.tokens import ANY, CI, MACHINE, Token

logger = logging.getLogger("workspace")

MAX_JSON = 4 << 20  # bytes of a deploy.json or a status
MAX_LOG = 16 << 20  # bytes of log lines in one request


@dataclass(frozen=True)
class Workspace:
    """What the routes share."""

    settings: Settings
    database: Database
    hub: Hub


def create_app(settings: Settings) -> Flask:
    """The application of `settings`; cachix_workspace.create_app is its front door."""
    database = open_database(settings, create=True)
    with database.write() as connection:
        put_meta(connection, "public_url", settings.public_url)
        mark_all_disconnected(connection)
    cache.remove_leftovers(settings)
    app = Flask("workspace", static_folder=None)
    workspace = Workspace(settings, database, Hub(settings.max_connections * 3 // 4))
    app.extensions["workspace"] = workspace
    app.add_url_rule(
        "/",
        view_func=lambda: _json({"service": "cachix-deploy workspace", "url": settings.public_url}),
    )
    _add_error_handlers(app)
    _add_deployments(app, workspace)
    _add_logs(app, workspace)
    _add_cache(app, workspace)
    _add_sockets(app, workspace)
    app.wsgi_app = cache.ByHost(app.wsgi_app, settings)  # type: ignore[method-assign]
    threading.Thread(
        target=_watch_tokens, args=(workspace,), name="revocations", daemon=True
    ).start()
    return app


def _watch_tokens(workspace: Workspace) -> None:
    """Close the sockets of tokens that were revoked, by whatever process, or have expired."""
    pause = threading.Event()
    while not pause.wait(workspace.settings.revocation_interval):
        try:
            held = workspace.hub.token_ids()
            if held:
                with workspace.database.read() as connection:
                    ended = tokens.invalid_ids(connection)
                workspace.hub.revoke(held & ended)
        except Exception as error:  # this thread is the only one that closes them: it must go on
            logger.warning("revoked tokens could not be looked up: %s", error)


# --- requests and answers --------------------------------------------------------------------------------------------


def _json(value: Any, status: int = 200) -> Response:
    return Response(dumps(value) + "\n", status, mimetype="application/json")


def _add_error_handlers(app: Flask) -> None:
    @app.errorhandler(Refusal)
    def refused(error: Refusal) -> Response:
        answer = _json({"error": str(error)}, error.code)
        if error.code == 401:
            answer.headers["WWW-Authenticate"] = 'Basic realm="workspace", charset="UTF-8"'
        if error.code == 503:
            answer.headers["Retry-After"] = "5"
        return answer

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        reason = "there is nothing of this name" if error.code == 404 else error.description
        answer = _json({"error": f"{request.method} {request.path}: {reason}"}, error.code or 500)
        for name, value in error.get_headers(request.environ):
            if name in ("Allow", "Content-Range"):
                answer.headers[name] = value
        return answer

    @app.errorhandler(Undecodable)
    def undecodable(error: Undecodable) -> Response:
        return _json({"error": str(error)}, 400)

    @app.errorhandler(SQLAlchemyError)
    @app.errorhandler(Error)
    def busy(error: Exception) -> Response:
        reason = getattr(error, "orig", None) or error
        logger.error("%s %s failed: %s", request.method, request.path, reason)
        return refused(Refusal(503, f"the workspace can't use its database: {reason}"))

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.path, exc_info=error)
        return _json({"error": "internal error, see the server's messages"}, 500)


def _authenticate(workspace: Workspace, kinds: frozenset[str]) -> Token:
    with workspace.database.read() as connection:
        return tokens.authenticate(connection, request.headers.get("Authorization"), kinds)


class _Stream:
    """The body of this request."""

    def read(self, size: int, /) -> bytes:
        """Raises Refusal where the peer leaves, stalls, or sends what is no HTTP."""
        try:
            return request.stream.read(size)
        except Exception as error:  # the server's own classes, of no common kind
            raise Refusal(400, f"the request broke off: {error}") from None


def _body(limit: int) -> bytes:
    """The whole body. Raises Refusal where it is longer than `limit` bytes, or broke off."""
    if (request.content_length or 0) > limit:
        raise Refusal(413, f"at most {limit} bytes are taken in one request")
    body = _Stream().read(limit + 1)
    if len(body) > limit:
        raise Refusal(413, f"at most {limit} bytes are taken in one request")
    if request.content_length is not None and len(body) < request.content_length:
        raise Refusal(400, "the request broke off")
    return body


def _offset() -> int:
    text = request.args.get("offset", "0")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Refusal(400, "`offset` is the index of a log line: a number from 0 on")
    return int(text)


# --- deployments -----------------------------------------------------------------------------------------------------


def _add_deployments(app: Flask, workspace: Workspace) -> None:
    database, hub = workspace.database, workspace.hub

    def activate() -> dict[str, deployments.Record]:
        token = _authenticate(workspace, CI)
        spec = Spec.from_json(loads(_body(MAX_JSON)))
        with database.write() as connection:
            made = deployments.activate(connection, spec)
        names = ", ".join(made.records) if len(made.records) <= 5 else f"{len(made.records)} agents"
        logger.info("token %d deploys to %s", token.id, names)
        for record in made.records.values():
            hub.wake_agent(record.agent_id)
        hub.wake_viewers(*made.replaced)
        return made.records

    def url(name: str, record: deployments.Record) -> str:
        return f"{workspace.settings.public_url}/agents/{name}/deployments/{record.index}"

    @app.post("/api/v1/deploy/activate")
    def activate_v1() -> Response:
        return _json({"agents": {name: url(name, record) for name, record in activate().items()}})

    @app.post("/api/v2/deploy/activate")
    def activate_v2() -> Response:
        made = activate()
        return _json(
            {
                "agents": {
                    name: {"id": record.id, "url": url(name, record)}
                    for name, record in made.items()
                }
            }
        )

    @app.get("/api/v1/deploy/deployment/<deployment_id>")
    def deployment(deployment_id: str) -> Response:
        _authenticate(workspace, CI)
        with database.read() as connection:
            return _json(deployments.find(connection, deployment_id).to_json())

    @app.get("/agents/<name>/deployments/<int:index>")
    def deployment_page(name: str, index: int) -> Response:
        _authenticate(workspace, CI)
        with database.read() as connection:
            return _json(deployments.find_by_index(connection, name, index).to_json())

    @app.post("/api/v1/deploy/deployment/<deployment_id>/cancel")
    def cancel(deployment_id: str) -> Response:
        _authenticate(workspace, CI)
        with database.write() as connection:
            record, done = deployments.cancel(connection, deployment_id)
        hub.wake_agent(record.agent_id)
        hub.wake_viewers(record.id)
        return _json(record.to_json(), 200 if done else 409)

    @app.put("/api/v1/deploy/deployment/<deployment_id>/status")
    def status(deployment_id: str) -> Response:
        _authenticate(workspace, MACHINE)
        told = _report(loads(_body(MAX_JSON)))
        with database.write() as connection:
            found = deployments.find_own(connection, request.headers.get("name"), deployment_id)
            record, accepted = deployments.report(connection, found, told)
        if record != found:
            hub.wake_agent(record.agent_id)
            hub.wake_viewers(record.id)
        return _json(record.to_json(), 200 if accepted else 409)


def _report(record: Any) -> deployments.Report:
    """An agent's report. Raises Undecodable."""
    if not isinstance(record, dict) or record.get("status") not in (IN_PROGRESS, SUCCEEDED, FAILED):
        raise Undecodable(f"`status` must be {IN_PROGRESS}, {SUCCEEDED} or {FAILED}")
    size, reason, time = record.get("closureSize"), record.get("reason"), record.get("time")
    if size is not None and (type(size) is not int or not 0 <= size < 1 << 63):
        raise Undecodable("`closureSize` must be a number of bytes or null")
    if not isinstance(reason, (str, type(None))) or not isinstance(time, str):
        raise Undecodable("`reason` must be a text or null, `time` a text")
    clean = None if reason is None else reason.replace("\0", "\N{REPLACEMENT CHARACTER}")
    return deployments.Report(
        record["status"], time, size, clean and clean.encode("utf-8", "replace").decode()
    )


# --- logs ------------------------------------------------------------------------------------------------------------


def _add_logs(app: Flask, workspace: Workspace) -> None:
    rule = "/api/v1/deploy/log/<deployment_id>"

    @app.put(rule)
    def put_log(deployment_id: str) -> Response:
        _authenticate(workspace, MACHINE)
        offset, lines = _offset(), logs.decode_many(_body(MAX_LOG))
        with workspace.database.write() as connection:
            record = deployments.find_own(connection, request.headers.get("name"), deployment_id)
            try:
                following = logs.append(connection, record, offset, lines)
            except logs.Gap as gap:
                return _json({"next": gap.next}, 416)
        if following != record.log_next:
            workspace.hub.wake_viewers(record.id)
        return _json({"next": following})

    @app.get(rule)
    def get_log(deployment_id: str) -> Response:
        _authenticate(workspace, CI)
        offset = _offset()
        with workspace.database.read() as connection:
            record = deployments.find(connection, deployment_id)
            lines = logs.read(connection, record.id, offset)
        # the lines are JSON already: there may be a million characters of it
        body = f'{{"next":{offset + len(lines)},"lines":[{",".join(lines)}]}}\n'
        return Response(body, mimetype="application/json")


# --- binary cache ----------------------------------------------------------------------------------------------------


def _add_cache(app: Flask, workspace: Workspace) -> None:
    settings = workspace.settings

    def find(name: str) -> cache.Cache:
        with workspace.database.read() as connection:
            found = cache.find(connection, name)
        if found is None:
            raise Refusal(404, f"there is no cache {name[:64]!r}")
        return found

    @app.get("/cache/<name>/nix-cache-info")
    def info(name: str) -> Response:
        find(name)
        return Response(cache.INFO, mimetype="text/x-nix-cache-info")

    @app.get("/cache/<name>/<path:file_name>")
    def get(name: str, file_name: str) -> Response:
        found = find(name)
        if not found.public:
            _authenticate(workspace, ANY)
        path = cache.path_of(settings, found.name, file_name)
        if not cache.is_file_name(file_name) or not path.is_file():
            raise Refusal(404, f"there is no {file_name[:300]!r} in the cache {name}")
        return send_file(path, mimetype=cache.media_type(file_name), conditional=True)

    @app.put("/cache/<name>/<path:file_name>")
    def put(name: str, file_name: str) -> Response:
        _authenticate(workspace, CI)
        found = find(name)
        if not cache.is_file_name(file_name):
            raise Refusal(405, "a cache takes HASH.narinfo and nar/HASH.nar, compressed or not")
        cache.store(
            cache.path_of(settings, found.name, file_name), _Stream(), request.content_length
        )
        return _json({}, 201)


# --- websockets ------------------------------------------------------------------------------------------------------


class _Handled(Response):
    """The answer to a request whose connection was a websocket: there is nothing more to send on it."""

    def __call__(self, *_arguments: Any) -> Any:
        raise StopIteration  # what gunicorn takes as: close this connection


def _add_sockets(app: Flask, workspace: Workspace) -> None:
    handlers = Handlers(workspace.database, workspace.hub, workspace.settings)
    log_rule = "/api/v1/deploy/log/<deployment_id>"

    @app.route("/ws", websocket=True)
    def agent_socket() -> Response:
        token, name = _authenticate(workspace, MACHINE), _agent_name()
        system, version, host = (
            request.headers.get(header, "") for header in ("system", "version", "Host")
        )
        return _serve(
            workspace,
            token,
            lambda opened: handlers.agent(opened, token, name, system, version, host),
        )

    @app.route("/ws-deployment", websocket=True)
    def deployment_socket() -> Response:
        token, name = _authenticate(workspace, MACHINE), _agent_name()
        return _serve(workspace, token, lambda opened: handlers.deployment(opened, name))

    @app.route(log_rule, websocket=True)
    def log_socket(deployment_id: str) -> Response:
        if request.args.get("view") == "true":
            token = _authenticate(workspace, CI)
            with workspace.database.read() as connection:
                known = deployments.find(connection, deployment_id).id
            return _serve(workspace, token, lambda opened: handlers.view_log(opened, known), known)
        token, name = _authenticate(workspace, MACHINE), _agent_name()
        with workspace.database.read() as connection:
            known = deployments.find_own(connection, name, deployment_id).id
        return _serve(
            workspace,
            token,
            lambda opened: handlers.write_log(opened, name, known),
            known,
            MAX_LINE,
        )


def _agent_name() -> str:
    name = request.headers.get("name", "")
    if not is_agent_name(name):
        raise Refusal(
            400,
            "the header `name` must be the agent's name: letters, digits, `.`, `_`, `-`, at most 128",
        )
    return name


def _serve(
    workspace: Workspace,
    token: Token,
    handle: Callable[[Socket], None],
    log_id: str | None = None,
    max_message: int = MAX_MESSAGE,
) -> Response:
    """Make this request a websocket and handle it to its end.

    From the handshake on nothing may raise: that would write an HTTP answer into it.
    """
    with workspace.hub.slot():
        try:
            opened = Socket(request.environ, token.id, workspace.settings, max_message)
        except (RemoteProtocolError, simple_websocket.ConnectionError) as error:
            raise Refusal(400, f"this is no websocket handshake: {error}") from None
        except OSError:
            return _Handled()
        with workspace.hub.holding(opened, log_id):
            try:
                handle(opened)
            except (OSError, LocalProtocolError) as error:
                logger.debug("a websocket ended: %s", error)  # the peer is gone, or is closing
            except Exception:
                logger.exception("the handler of %s failed", request.path)
                opened.end(*INTERNAL_ERROR)
            finally:
                opened.finish()
    return _Handled()
