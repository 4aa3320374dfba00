"""The application: settings, database, hub, routes and the thread that watches revoked tokens."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

from cachix_protocol import listed
from cachix_workspace import agents, browsers, cache, delivery, health, owners, tokens
from cachix_workspace.answers import register_error_handlers
from cachix_workspace.api import deployment_routes, log_routes
from cachix_workspace.cache_api import ByHost, cache_routes
from cachix_workspace.context import KEY, Workspace, workspace_of
from cachix_workspace.database import CHANGED, get_meta, open_database, put_meta, secret_key
from cachix_workspace.feed import ALL
from cachix_workspace.health import health_routes
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.management import document
from cachix_workspace.pages import forms, show
from cachix_workspace.pages.agents import agent_pages
from cachix_workspace.pages.caches import cache_pages
from cachix_workspace.pages.deployments import deployment_pages
from cachix_workspace.pages.enrol import enrol_pages
from cachix_workspace.pages.errors import error_page
from cachix_workspace.pages.events import events_pages
from cachix_workspace.pages.overview import overview_pages
from cachix_workspace.pages.runs import run_pages
from cachix_workspace.pages.settings import settings_pages
from cachix_workspace.pages.sign_in import sign_in_pages
from cachix_workspace.pages.start import start_pages
from cachix_workspace.pages.tokens import token_pages
from cachix_workspace.pages.welcome import welcome_pages
from cachix_workspace.settings import Settings
from cachix_workspace.sockets import socket_routes

logger = logging.getLogger(__name__)

EXPIRY_INTERVAL = 600.0  # seconds between two looks for tokens that expire soon
USED_INTERVAL = 60.0  # seconds between two notes of when tokens were used
ROUTES = (health_routes, deployment_routes, log_routes, cache_routes, socket_routes)
PAGES = (
    events_pages,
    overview_pages,
    sign_in_pages,
    deployment_pages,
    enrol_pages,
    agent_pages,
    token_pages,
    cache_pages,
    welcome_pages,
    settings_pages,
    run_pages,
    start_pages,
)  # fmt: skip


def create_app(settings: Settings) -> Flask:
    """The WSGI application, with its database open. Its threads are started by themselves."""
    database = open_database(settings, create=True)
    with database.write() as connection:
        put_meta(connection, "public_url", settings.public_url)
        agents.mark_disconnected(connection)
    cache.remove_leftovers(settings)
    hub = Hub(settings.max_connections * 3 // 4)
    workspace = Workspace(settings, database, hub, Signs())
    app = Flask("cachix_workspace", static_folder=None)
    app.extensions[KEY] = workspace
    register_error_handlers(app, error_page)
    health.watch(app)
    browsers.protect(app)
    with database.write() as connection:
        forms.protect(app, secret_key(connection), (*ROUTES, *document.BLUEPRINTS))
    show.prepare(app)
    document.add_to(app)
    for routes in (*ROUTES, *PAGES):
        app.register_blueprint(routes)
    inner = ByHost(app.wsgi_app, settings)
    app.wsgi_app = outermost(inner, settings)  # type: ignore[method-assign]
    return app


def start_threads(app: Flask) -> None:
    """Start what runs beside the requests."""
    for name, target in THREADS:
        arguments = (workspace_of(app),)
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()


def outermost(app: Any, settings: Settings) -> Any:
    """The WSGI application that sees the client's address, scheme and host first of all.

    They are the connection's own, unless proxies of ours stand in front: each adds to the right
    what it has seen, and what stands further to the left is the client's own invention.
    """
    trusted = settings.behind_proxy
    return ProxyFix(app, x_for=trusted, x_proto=trusted, x_host=trusted) if trusted else app


def _watch_tokens(workspace: Workspace) -> None:
    """End the sockets and uploads of tokens that any process has revoked, or that have expired.

    Also write when each token was used last, now and then.
    """
    pause, written = threading.Event(), time.monotonic()
    looked, warned, changed = -EXPIRY_INTERVAL, set[tuple[int, int]](), ""
    while not pause.wait(workspace.settings.revocation_interval):
        try:
            used = workspace.hub.token_ids() | workspace.uploads.token_ids()
            if used:
                with workspace.database.read() as connection:
                    invalid = tokens.invalid_ids(connection)
                workspace.hub.revoke(used & invalid)
                workspace.uploads.revoke(used & invalid)
            changed = _hear_of_changes(workspace, changed)
            if workspace.used and time.monotonic() > written + USED_INTERVAL:
                written = time.monotonic()
                _write_used(workspace)
            if time.monotonic() > looked + EXPIRY_INTERVAL:
                looked = time.monotonic()
                _warn_of_expiry(workspace, warned)
        except Exception as error:  # this thread is the only one that closes them: it must go on
            logger.warning("revoked tokens could not be looked up: %s", error)


def _hear_of_changes(workspace: Workspace, heard: str) -> str:
    """Let agents and pages look if a command beside the server has changed anything."""
    with workspace.database.read() as connection:
        changed = get_meta(connection, CHANGED) or ""
    if changed != heard:
        workspace.hub.wake_agents()
        workspace.feed.publish(ALL)
    return changed


def _warn_of_expiry(workspace: Workspace, warned: set[tuple[int, int]]) -> None:
    """Log which tokens expire soon, once for each of the days in `tokens.WARN`."""
    with workspace.database.read() as connection:
        found = [(token, tokens.days_left(token)) for token in tokens.expiring(connection)]
        users = {token.id: owners.users(connection, token.id) for token, _ in found}
    for token, left in found:
        due = {(token.id, days) for days in tokens.WARN if left <= days}
        if due - warned:
            who = f"; used by {listed(users[token.id])}" if users[token.id] else ""
            hint = f"`cachix-workspace token rotate {token.id}` makes its successor"
            logger.warning("%s expires in %.1f days%s: %s", token.label, left, who, hint)
        warned |= due


def _write_used(workspace: Workspace) -> None:
    """Write when each token was used last."""
    used = dict(workspace.used)
    with workspace.database.write() as connection:
        tokens.note_used(connection, used)
    for token_id, moment in used.items():
        if workspace.used.get(token_id) == moment:
            del workspace.used[token_id]


THREADS = (("revocations", _watch_tokens), ("webhooks", delivery.deliver_all))
