"""Whether the workspace works, for whoever watches it: `/healthz` and `/metrics`."""

from __future__ import annotations

from flask import Blueprint, Flask, Response, current_app
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from cachix_workspace import metrics
from cachix_workspace.admission import authenticate
from cachix_workspace.answers import json_answer
from cachix_workspace.context import current_workspace
from cachix_workspace.tokens import ADMIN, METRICS

health_routes = Blueprint("health", __name__)

REQUESTS = "requests"  # in the application's extensions
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def watch(app: Flask) -> None:
    """Measure the requests of an application, for its metrics."""
    app.extensions[REQUESTS] = metrics.Requests()
    app.extensions[REQUESTS].watch(app)


@health_routes.get("/healthz")
def get_health() -> Response:
    """200 if the database can be read, 503 otherwise. This needs no token."""
    try:
        with current_workspace().database.read() as connection:
            connection.execute(text("SELECT count(*) FROM meta"))
    except SQLAlchemyError:
        return json_answer({"ok": False}, 503)
    return json_answer({"ok": True})


@health_routes.get("/metrics")
def get_metrics() -> Response:
    """The metrics, for a token of their own kind, or an admin's."""
    authenticate(frozenset({METRICS, ADMIN}))
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    return Response(metrics.text(app, app.extensions[REQUESTS]), content_type=CONTENT_TYPE)
