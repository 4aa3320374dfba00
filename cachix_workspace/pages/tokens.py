"""All tokens: what they are for, when they were used, and their ends."""

from __future__ import annotations

from flask import Blueprint, Response, request

from cachix_protocol import utc_now
from cachix_workspace import audit, cache, owners, tokens, upkeep
from cachix_workspace.context import current_workspace
from cachix_workspace.enrolment import MAX_DAYS
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, page, to
from cachix_workspace.people import ADMINISTRATOR
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import AGENT, KINDS

token_pages = Blueprint("token_pages", __name__)


@page(token_pages, "/tokens", ADMINISTRATOR)
def get_tokens() -> Response:
    """All tokens; those that agents keep themselves come last."""
    with current_workspace().database.read() as connection:
        rows = tokens.list_all(connection)
        users = {row.id: owners.users(connection, row.id) for row in rows}
        caches = {row.id: row.name for row in cache.list_all(connection)}
    now = utc_now()
    rows.sort(key=lambda row: (row.state(now) != "valid", row.issued_by is not None, -row.id))
    kinds = [kind for kind in KINDS if kind != AGENT]
    return show.page(
        "tokens.html",
        noted=current_workspace().used,
        topics="agents",
        rows=rows,
        users=users,
        caches=caches,
        now=now,
        kinds=kinds,
    )


@page(token_pages, "/tokens", ADMINISTRATOR, methods=("POST",))
def post_token() -> Response:
    """Make a token that is no agent's."""
    form, by = request.form, actor()
    kind, days = form.get("kind", ""), form.get("days", "").strip()
    if kind not in KINDS or kind == AGENT:
        raise Refusal(400, "choose what the token is for")
    if days and not (days.isascii() and days.isdigit() and 0 < int(days[:9]) <= MAX_DAYS):
        raise Refusal(400, f"a token is valid for 1 to {MAX_DAYS} days, not {days[:20]!r}")
    patterns = form.get("agents", "").strip()
    with current_workspace().database.write() as connection:
        cache_id = cache.find_named(connection, form["cache"]).id if form.get("cache") else None
        number, secret = tokens.create(
            connection,
            kind,
            form.get("description", "").strip()[:300],
            float(days) if days else None,
            cache_id,
            agents=tokens.checked_patterns(patterns, "the agents") if patterns else None,
        )
        audit.record(connection, by.name, "token create", f"{number} ({kind})", by.address)
    return show.page("token.html", number=number, kind=kind, secret=secret, former=None)


@page(token_pages, "/tokens/<int:number>/rotate", ADMINISTRATOR, methods=("POST",))
def post_rotate(number: int) -> Response:
    """Make a token's successor."""
    with current_workspace().database.write() as connection:
        former, successor, secret = upkeep.rotate_token(connection, number, actor())
    overlap = f"{tokens.OVERLAP:.0f}"
    return show.page(
        "token.html",
        number=successor,
        kind=former.kind,
        secret=secret,
        former=former,
        overlap=overlap,
    )


@page(token_pages, "/tokens/<int:number>/revoke", ADMINISTRATOR)
def get_revoke(number: int) -> Response:
    """The page that asks before a token is revoked."""
    with current_workspace().database.read() as connection:
        token = tokens.get(connection, number)
        users = owners.users(connection, number)
    if token is None:
        raise Refusal(404, f"there is no token {number}")
    return show.page("revoke.html", token=token, users=users)


@page(token_pages, "/tokens/<int:number>/revoke", ADMINISTRATOR, methods=("POST",))
def post_revoke(number: int) -> Response:
    """End a token."""
    and_agents = bool(request.form.get("and_agents"))
    workspace = current_workspace()
    with workspace.database.write() as connection:
        issued = upkeep.revoke_token(connection, number, and_agents, actor())
    workspace.note_revoked([number, *issued])
    return to("/tokens")
