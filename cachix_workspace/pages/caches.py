"""Binary caches: keys, what to paste, what was pushed of late. And what CI needs."""

from __future__ import annotations

from flask import Blueprint, Response, request

from cachix_workspace import blocks, cache, recent, upkeep
from cachix_workspace.blocks import CiFacts
from cachix_workspace.context import current_workspace
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, page, to
from cachix_workspace.pages.enrol import program_hash, url
from cachix_workspace.people import ADMINISTRATOR

cache_pages = Blueprint("cache_pages", __name__)


@page(cache_pages, "/caches")
def get_caches() -> Response:
    """All caches."""
    settings = current_workspace().settings
    with current_workspace().database.read() as connection:
        rows = cache.list_all(connection)
    urls = {row.name: cache.url(settings, row.name) for row in rows}
    return show.page("caches.html", rows=rows, urls=urls)


@page(cache_pages, "/caches", ADMINISTRATOR, methods=("POST",))
def post_cache() -> Response:
    """Make a cache, and show its secret key."""
    workspace = current_workspace()
    is_public = request.form.get("access") != "private"
    with workspace.database.write() as connection:
        name = request.form.get("name", "").strip()
        row, secret = upkeep.create_cache(connection, name, is_public, workspace.settings, actor())
    workspace.publish("all")
    return show.page("cache_key.html", row=row, secret=secret, is_new=True)


@page(cache_pages, "/caches/<name>")
def get_cache(name: str) -> Response:
    """A cache."""
    settings = current_workspace().settings
    with current_workspace().database.read() as connection:
        row = cache.find_named(connection, name)
    return show.page(
        "cache.html",
        row=row,
        cache_url=cache.url(settings, row.name),
        push=blocks.push_line(url(), "./result", row.name),
        offers=recent.recent(settings, row),
    )


@page(cache_pages, "/caches/<name>/rotate", ADMINISTRATOR, methods=("POST",))
def post_rotate(name: str) -> Response:
    """Make a new key for a cache, and show the secret one."""
    with current_workspace().database.write() as connection:
        row, secret = upkeep.rotate_cache(connection, name, actor())
    return show.page("cache_key.html", row=row, secret=secret, is_new=False)


@page(cache_pages, "/caches/<name>/retire", ADMINISTRATOR, methods=("POST",))
def post_retire(name: str) -> Response:
    """Drop the old key of a cache."""
    with current_workspace().database.write() as connection:
        upkeep.retire_cache(connection, name, actor())
    return to(f"/caches/{name}")


@page(cache_pages, "/ci")
def get_ci() -> Response:
    """The page of all that CI needs."""
    with current_workspace().database.read() as connection:
        rows = cache.list_all(connection)
    facts = CiFacts(url(), program_hash())
    return show.page(
        "ci.html",
        rows=rows,
        github=blocks.github(facts),
        gitlab=blocks.gitlab(facts),
        flake=blocks.FLAKE,
    )
