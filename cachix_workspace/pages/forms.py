"""Forms: no other site can send one, as each has a token of the session that it was drawn for."""

from __future__ import annotations

from collections.abc import Iterable

from flask import Blueprint, Flask, Response, request
from flask.sessions import SecureCookieSessionInterface
from flask_wtf.csrf import CSRFError, CSRFProtect  # type: ignore[import-untyped]

from cachix_workspace.answers import error_answer


class Sessions(SecureCookieSessionInterface):
    """Flask's session, which holds the forms' token alone. Its cookie is Secure behind TLS."""

    def get_cookie_secure(self, app: Flask) -> bool:
        return request.is_secure


def protect(app: Flask, secret_key: str, programs: Iterable[Blueprint]) -> None:
    """Refuse forms without their token, but for what `programs` answer: those send no cookies."""
    app.config.update(
        SECRET_KEY=secret_key,
        SESSION_COOKIE_NAME="workspace_forms",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        WTF_CSRF_TIME_LIMIT=None,  # a page that was left open for a day still works
    )
    app.session_interface = Sessions()
    guard = CSRFProtect(app)
    for blueprint in programs:
        guard.exempt(blueprint)
    app.register_error_handler(CSRFError, _refuse)


def _refuse(_error: Exception) -> Response:
    return error_answer(400, "this form is of another session: reload the page and try again")
