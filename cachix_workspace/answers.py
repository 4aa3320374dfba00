"""JSON answers, and the answers to errors."""

from __future__ import annotations

import logging
from typing import Any

from flask import Flask, Response, request
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException
from werkzeug.routing import WebsocketMismatch

from cachix_protocol import Error, Undecodable, dumps
from cachix_workspace.refusal import Refusal

logger = logging.getLogger(__name__)


def json_answer(value: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(dumps(value) + "\n", status, mimetype="application/json")


def register_error_handlers(app: Flask) -> None:
    """Answer every error with JSON that has a sentence in `error`."""
    app.register_error_handler(Refusal, _refused)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(WebsocketMismatch, _wrong_protocol)
    app.register_error_handler(Undecodable, _undecodable)
    app.register_error_handler(SQLAlchemyError, _database_failed)
    app.register_error_handler(Error, _database_failed)
    app.register_error_handler(Exception, _unexpected)


def _refused(error: Refusal) -> Response:
    answer = json_answer({"error": str(error)}, error.code)
    if error.code == 401:
        # a browser that is asked for a password would send it along with every request from then on
        basic, bearer = 'Basic realm="workspace", charset="UTF-8"', 'Bearer realm="workspace"'
        answer.headers["WWW-Authenticate"] = basic if request.path.startswith("/cache/") else bearer
    if error.code in (429, 503):
        answer.headers["Retry-After"] = "5"
    return answer


def _http_error(error: HTTPException) -> Response:
    reason = "not found" if error.code == 404 else error.description
    answer = json_answer({"error": f"{request.method} {request.path}: {reason}"}, error.code or 500)
    for name, value in error.get_headers(request.environ):
        if name in ("Allow", "Content-Range"):
            answer.headers[name] = value
    return answer


def _wrong_protocol(_error: WebsocketMismatch) -> Response:
    """A plain request for a websocket, or the reverse."""
    if "Upgrade" in request.headers and "upgrade" in request.headers.get("Connection", "").lower():
        return json_answer({"error": f"there is no websocket at {request.path}"}, 400)
    hint = "does a proxy in front of the workspace not pass the Upgrade headers?"
    return json_answer({"error": f"this is no websocket handshake: {hint}"}, 400)


def _undecodable(error: Undecodable) -> Response:
    return json_answer({"error": str(error)}, 400)


def _database_failed(error: Exception) -> Response:
    reason = getattr(error, "orig", None) or error
    logger.error("%s %s failed: %s", request.method, request.path, reason)
    return _refused(Refusal(503, f"the workspace can't use its database: {reason}"))


def _unexpected(error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return json_answer({"error": "internal error, see the server's messages"}, 500)
