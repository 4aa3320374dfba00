"""JSON answers, and the answers to errors."""

from __future__ import annotations

import errno
import logging
from typing import Any, Callable

from flask import Flask, Response, current_app, request
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException
from werkzeug.routing import WebsocketMismatch

from cachix_protocol import Error, Undecodable, dumps
from cachix_workspace.database import reason_of
from cachix_workspace.files import StoreError
from cachix_workspace.refusal import Refusal

logger = logging.getLogger(__name__)
database_logger = logging.getLogger(f"{__name__}.database")

PAGE = "error page"  # in the application's extensions


def json_answer(value: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(dumps(value) + "\n", status, mimetype="application/json")


def register_error_handlers(
    app: Flask, page: Callable[[int, str], Response | None] = lambda _code, _sentence: None
) -> None:
    """Answer every error with JSON that has a sentence in `error`, or with what `page` makes."""
    app.extensions[PAGE] = page
    app.register_error_handler(Refusal, _refused)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(WebsocketMismatch, _wrong_protocol)
    app.register_error_handler(Undecodable, _undecodable)
    app.register_error_handler(SQLAlchemyError, _database_failed)
    app.register_error_handler(Error, _database_failed)
    app.register_error_handler(OSError, _file_failed)
    app.register_error_handler(Exception, _unexpected)


def error_answer(code: int, sentence: str) -> Response:
    """The answer to an error: JSON, or a page where a browser asked for one."""
    page: Callable[[int, str], Response | None] = current_app.extensions[PAGE]
    try:
        html = page(code, sentence)
    except (Error, SQLAlchemyError):  # a page needs the database, which may be what fails
        html = None
    return html or json_answer({"error": sentence}, code)


def _refused(error: Refusal) -> Response:
    answer = error_answer(error.code, str(error))
    if error.code == 401:
        # a browser that is asked for a password would send it along with every request from then on
        basic, bearer = 'Basic realm="workspace", charset="UTF-8"', 'Bearer realm="workspace"'
        answer.headers["WWW-Authenticate"] = basic if request.path.startswith("/cache/") else bearer
    if error.code in (429, 503):
        answer.headers["Retry-After"] = "5"
    return answer


def _http_error(error: HTTPException) -> Response:
    reason = "not found" if error.code == 404 else error.description
    answer = error_answer(error.code or 500, f"{request.method} {request.path}: {reason}")
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
    reason = reason_of(error)
    database_logger.error("%s %s failed: %s", request.method, request.path, reason)
    return _refused(Refusal(503, f"the workspace can't use its database: {reason}"))


def _file_failed(error: OSError) -> Response:
    """A file that can't be written, most of the time, as the disk is full."""
    if isinstance(error, StoreError):
        logger.error("%s %s failed: %s", request.method, request.path, error.strerror)
        return _refused(Refusal(503, str(error.strerror)))
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return _unexpected(error)
    logger.error("%s %s failed: %s", request.method, request.path, error)
    return _refused(Refusal(507, f"the workspace can't write its files: {error.strerror}"))


def _unexpected(error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return error_answer(500, "internal error, see the server's messages")
