"""The first steps with a new workspace: name, address, cache, agent, CI."""

from __future__ import annotations

from flask import Blueprint, Response, request

from cachix_workspace import agents, cache, tokens, upkeep
from cachix_workspace.context import current_workspace
from cachix_workspace.database import get_meta
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, page, to
from cachix_workspace.people import ADMINISTRATOR
from cachix_workspace.tokens import ACTIVATE, ADMIN

welcome_pages = Blueprint("welcome_pages", __name__)


@page(welcome_pages, "/welcome", ADMINISTRATOR)
def get_welcome() -> Response:
    """The steps of a new workspace, done and to do."""
    workspace = current_workspace()
    with workspace.database.read() as connection:
        own_name = get_meta(connection, "name")
        caches = cache.list_all(connection)
        rows = agents.list_all(connection)
        keys = [token for token in tokens.list_all(connection) if token.kind in (ACTIVATE, ADMIN)]
    settings = workspace.settings
    return show.page(
        "welcome.html",
        topics="agents",
        own_name=own_name,
        url=settings.public_url,
        came_by=request.host_url.rstrip("/"),
        caches=caches,
        agents=rows,
        keys=keys,
    )


@page(welcome_pages, "/welcome/name", ADMINISTRATOR, methods=("POST",))
def post_name() -> Response:
    """Name the workspace."""
    with current_workspace().database.write() as connection:
        upkeep.name_workspace(connection, request.form.get("name", ""), actor())
    back = request.form.get("back", "")
    return to(back if back in ("/settings", "/welcome") else "/welcome")
