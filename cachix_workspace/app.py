"""The application: settings, database, hub, routes and the thread that watches revoked tokens."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import Any

from flask import Flask
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.middleware.proxy_fix import ProxyFix

from cachix_protocol import listed
from cachix_workspace import (
    agents,
    browsers,
    delivery,
    health,
    membership,
    nodes,
    owners,
    retention,
    stores,
    tokens,
)
from cachix_workspace.answers import register_error_handlers
from cachix_workspace.api import deployment_routes, log_routes
from cachix_workspace.cache_api import ByHost, cache_routes
from cachix_workspace.cache_reads import CacheReads
from cachix_workspace.cache_writes import CacheWrites
from cachix_workspace.context import KEY, Node, Workspace, workspace_of
from cachix_workspace.database import (
    CHANGED,
    Database,
    Lock,
    get_meta,
    open_database,
    put_meta,
    reason_of,
    secret_key,
)
from cachix_workspace.feed import ALL
from cachix_workspace.health import health_routes
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.management import document
from cachix_workspace.notify import InProcess
from cachix_workspace.pages import forms, show
from cachix_workspace.pages.agents import agent_pages
from cachix_workspace.pages.caches import cache_pages
from cachix_workspace.pages.deployments import deployment_pages
from cachix_workspace.pages.enrol import enrol_pages
from cachix_workspace.pages.errors import error_page
from cachix_workspace.pages.events import events_pages, wake_parked
from cachix_workspace.pages.overview import overview_pages
from cachix_workspace.pages.runs import run_pages
from cachix_workspace.pages.settings import settings_pages
from cachix_workspace.pages.sign_in import sign_in_pages
from cachix_workspace.pages.start import start_pages
from cachix_workspace.pages.tokens import token_pages
from cachix_workspace.pages.welcome import welcome_pages
from cachix_workspace.parking import Lot
from cachix_workspace.settings import Settings
from cachix_workspace.sockets import socket_routes

logger = logging.getLogger(__name__)

EXPIRY_INTERVAL = 600.0  # seconds between two looks for tokens that expire soon
PRESENCE_INTERVAL = 30.0  # seconds between two looks for agents that are gone
SETTLED = 60.0  # seconds after which an agent that has registered is known to the hub
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
    node = Node(nodes.id_of(settings.data))
    key = _note_start(database, settings, node)
    stores.remove_leftovers(settings)
    hub = Hub(settings.max_connections * 3 // 4)
    shared = not database.is_sqlite
    news = membership.notifier_of(database, node.id, settings) if shared else InProcess()
    lot = Lot(settings.send_timeout)
    workspace = Workspace(settings, database, hub, Signs(), lot=lot, node=node, news=news)
    app = Flask("cachix_workspace", static_folder=None)
    app.extensions[KEY] = workspace
    register_error_handlers(app, error_page)
    health.watch(app)
    membership.prepare(app)
    browsers.protect(app)
    forms.protect(app, key, (*ROUTES, *document.BLUEPRINTS))
    show.prepare(app)
    document.add_to(app)
    for routes in (*ROUTES, *PAGES):
        app.register_blueprint(routes)
    note = app.extensions[health.REQUESTS].note
    writes = CacheWrites(app.wsgi_app, workspace, note)
    reads = CacheReads(writes, settings, workspace.known, note)
    inner = ByHost(reads, settings)
    app.wsgi_app = outermost(inner, settings)  # type: ignore[method-assign]
    return app


def _note_start(database: Database, settings: Settings, node: Node) -> str:
    """Note the URL, and that no agent is connected here yet; the key that signs cookies.

    On a full disk what can be read is served all the same.
    """
    try:
        with database.write() as connection:
            put_meta(connection, "public_url", settings.public_url)
            node.start = nodes.enter(connection, settings, node.id)
            return secret_key(connection)
    except SQLAlchemyError as error:
        logger.error("the database can be read only: %s", reason_of(error))
        with database.read() as connection:
            return get_meta(connection, "secret_key") or secrets.token_hex(32)


def start_threads(app: Flask) -> None:
    """Start what runs beside the requests."""
    workspace = workspace_of(app)
    workspace.lot.start()
    workspace.turns.start()
    workspace.presence.start(workspace.database, workspace.node.id, workspace.note_agents)
    workspace.feed.listen(lambda: wake_parked(workspace))
    membership.start(workspace)
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

    Nodes tell each other of tokens; commands do not, and news may be lost.

    Also write when each token was used last, now and then.
    """
    last_write = time.monotonic()
    looked, warned, changed = -EXPIRY_INTERVAL, set[tuple[int, int]](), ""
    corrected = time.monotonic()
    while True:
        if workspace.revoked.wait(workspace.settings.revocation_interval):
            workspace.revoked.clear()
        try:
            used = workspace.hub.token_ids() | workspace.uploads.token_ids()
            if used:
                with workspace.database.read() as connection:
                    ended = used & tokens.invalid_ids(connection)
                if ended:  # nobody comes back by what is remembered
                    workspace.roster.forget()
                    workspace.known.tokens.clear()
                workspace.hub.revoke(ended)
                workspace.uploads.revoke(ended)
            changed = _hear_of_changes(workspace, changed)
            if time.monotonic() > corrected + PRESENCE_INTERVAL:
                corrected = time.monotonic()
                _correct_presence(workspace)
            if workspace.used and time.monotonic() > last_write + USED_INTERVAL:
                last_write = time.monotonic()
                _write_used(workspace)
            if time.monotonic() > looked + EXPIRY_INTERVAL:
                looked = time.monotonic()
                _warn_of_expiry(workspace, warned)
        except Exception as error:  # this thread is the only one that closes them: it must go on
            logger.warning("revoked tokens could not be looked up: %s", reason_of(error))


def _hear_of_changes(workspace: Workspace, heard: str) -> str:
    """Let agents and pages look if a command beside the server has changed anything."""
    with workspace.database.read() as connection:
        changed = get_meta(connection, CHANGED) or ""
    if changed != heard:
        workspace.hub.wake_agents()
        workspace.feed.publish(ALL)  # each node looks by itself
    return changed


def _correct_presence(workspace: Workspace) -> None:
    """Note which agents are gone whose end could not be written, as the disk was full."""
    with workspace.database.read() as connection:
        known = agents.connected_ids(connection, workspace.node.id, SETTLED)
    absent = known - workspace.hub.agent_ids()
    if absent:
        with workspace.database.write(Lock.ROWS) as connection:
            absent -= workspace.hub.agent_ids()
            ids = agents.mark_absent(connection, workspace.node.id, absent)
        workspace.note_agents(*ids)


def _warn_of_expiry(workspace: Workspace, warned: set[tuple[int, int]]) -> None:
    """Log which tokens expire soon, once for each of the days in `tokens.WARN`."""
    with workspace.database.read() as connection:
        expiring = [(token, tokens.days_left(token)) for token in tokens.expiring(connection)]
        users = {token.id: owners.users(connection, token.id) for token, _ in expiring}
    for token, left in expiring:
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


THREADS = (
    ("revocations", _watch_tokens),
    ("webhooks", delivery.deliver_all),
    ("retention", retention.prune_nightly),
)
