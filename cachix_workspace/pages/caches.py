"""Binary caches: keys, what to paste, what was pushed of late. And what CI needs."""

from __future__ import annotations

from flask import Blueprint, Response, request

from cachix_workspace import audit, blocks, cache, recent
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
    workspace, by = current_workspace(), actor()
    is_public = request.form.get("access") != "private"
    with workspace.database.write() as connection:
        name = request.form.get("name", "").strip()
        row, secret = cache.create(connection, name, is_public, workspace.settings)
        detail = f"{row.name} ({'public' if is_public else 'private'})"
        audit.record(connection, by.name, "cache create", detail, by.address)
    workspace.feed.publish("all")
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
        push=blocks.push_line(cache.url(settings, row.name), "./result"),
        host=url().partition("://")[2].partition("/")[0].partition(":")[0],
        offers=recent.recent(settings, row),
    )


@page(cache_pages, "/caches/<name>/rotate", ADMINISTRATOR, methods=("POST",))
def post_rotate(name: str) -> Response:
    """Make a new key for a cache, and show the secret one."""
    by = actor()
    with current_workspace().database.write() as connection:
        row, secret = cache.rotate(connection, name)
        detail = f"{row.name}, now {row.key}"
        audit.record(connection, by.name, "cache key rotate", detail, by.address)
    return show.page("cache_key.html", row=row, secret=secret, is_new=False)


@page(cache_pages, "/caches/<name>/retire", ADMINISTRATOR, methods=("POST",))
def post_retire(name: str) -> Response:
    """Drop the old key of a cache."""
    by = actor()
    with current_workspace().database.write() as connection:
        row = cache.retire(connection, name)
        detail = f"{row.name}, left {row.key}"
        audit.record(connection, by.name, "cache key retire", detail, by.address)
    return to(f"/caches/{name}")


@page(cache_pages, "/ci")
def get_ci() -> Response:
    """What CI needs to build, push and deploy."""
    settings = current_workspace().settings
    with current_workspace().database.read() as connection:
        rows = cache.list_all(connection)
    where = cache.url(settings, rows[0].name) if rows else ""
    facts = CiFacts(url(), program_hash(), where)
    return show.page(
        "ci.html",
        rows=rows,
        github=blocks.github(facts),
        gitlab=blocks.gitlab(facts),
        flake=blocks.FLAKE,
    )
