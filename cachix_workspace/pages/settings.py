"""Settings, people, the audit, and the freeze."""

from __future__ import annotations

from flask import Blueprint, Response, request

from cachix_workspace import audit, people, upkeep, webhooks
from cachix_workspace.admission import query_number
from cachix_workspace.context import current_workspace
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, current, page, to
from cachix_workspace.people import ADMINISTRATOR, LINK_LASTS, OPERATOR, ROLES
from cachix_workspace.webhooks import EVENTS, FORMATS

settings_pages = Blueprint("settings_pages", __name__)

LISTED = 100  # entries of the audit on a page


# --- settings -------------------------------------------------------------------------------------


@page(settings_pages, "/settings", ADMINISTRATOR)
def get_settings() -> Response:
    """The workspace's name, who is signed in, webhooks."""
    workspace = current_workspace()
    with workspace.database.read() as connection:
        sessions = people.list_sessions(connection)
        hooks = webhooks.list_all(connection)
        last = webhooks.last_messages(connection)
    return show.page(
        "settings.html",
        settings=workspace.settings,
        sessions=sessions,
        mine=current().session_id,
        hooks=hooks,
        last=last,
        formats=FORMATS,
        events=EVENTS,
    )


@page(settings_pages, "/settings/sessions/<int:number>/end", ADMINISTRATOR, methods=("POST",))
def post_end(number: int) -> Response:
    """End a session."""
    with current_workspace().database.write() as connection:
        upkeep.end_session(connection, number, actor())
    return to("/settings")


@page(settings_pages, "/settings/webhooks", ADMINISTRATOR, methods=("POST",))
def post_webhook() -> Response:
    """Make a webhook, and show its key."""
    form = request.form
    with current_workspace().database.write() as connection:
        hook = upkeep.create_webhook(
            connection,
            form.get("url", "").strip(),
            form.get("format", ""),
            form.getlist("event"),
            form.get("label", "").strip(),
            actor(),
        )
    return show.page("webhook.html", hook=hook, signature=webhooks.SIGNATURE)


@page(settings_pages, "/settings/webhooks/<int:number>/test", ADMINISTRATOR, methods=("POST",))
def post_test(number: int) -> Response:
    """Send a test."""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        webhooks.test(connection, number, workspace.settings.public_url)
    return to("/settings#webhooks")


@page(settings_pages, "/settings/webhooks/<int:number>/remove", ADMINISTRATOR, methods=("POST",))
def post_remove_webhook(number: int) -> Response:
    """Remove a webhook."""
    with current_workspace().database.write() as connection:
        upkeep.remove_webhook(connection, number, actor())
    return to("/settings#webhooks")


# --- people ---------------------------------------------------------------------------------------


@page(settings_pages, "/people", ADMINISTRATOR)
def get_people() -> Response:
    """The page of people and sessions."""
    with current_workspace().database.read() as connection:
        rows = people.list_all(connection)
    return show.page("people.html", people=rows, roles=ROLES)


@page(settings_pages, "/people", ADMINISTRATOR, methods=("POST",))
def post_person() -> Response:
    """Add a person, and show the invitation."""
    name, role = request.form.get("name", "").strip(), request.form.get("role", "")
    with current_workspace().database.write() as connection:
        person, secret = upkeep.add_person(connection, name, role, actor())
    return _link(person.name, secret, "7 days")


@page(settings_pages, "/people/<name>/link", ADMINISTRATOR, methods=("POST",))
def post_link(name: str) -> Response:
    """Make a new link for a person."""
    with current_workspace().database.write() as connection:
        _, secret = upkeep.make_link(connection, name, actor())
    return _link(name, secret, f"{LINK_LASTS.total_seconds() / 60:.0f} minutes")


def _link(name: str, secret: str, lasts: str) -> Response:
    link = f"{current_workspace().settings.url_by(request.host)}/sign-in/{secret}"
    return show.page("invitation.html", person=name, link_url=link, lasts=lasts)


@page(settings_pages, "/people/<name>/role", ADMINISTRATOR, methods=("POST",))
def post_role(name: str) -> Response:
    """Change a role."""
    with current_workspace().database.write() as connection:
        upkeep.change_role(connection, name, request.form.get("role", ""), actor())
    return to("/people")


@page(settings_pages, "/people/<name>/remove", ADMINISTRATOR, methods=("POST",))
def post_remove(name: str) -> Response:
    """Remove a person, who is signed out by that."""
    with current_workspace().database.write() as connection:
        upkeep.remove_person(connection, name, actor())
    return to("/people")


# --- audit and freeze -----------------------------------------------------------------------------


@page(settings_pages, "/audit")
def get_audit() -> Response:
    """The page of the audit."""
    text = request.args.get("q", "").strip()[:200]
    number = max(1, query_number("page", 1, 10_000))
    with current_workspace().database.read() as connection:
        entries = audit.list_page(connection, text, LISTED + 1, (number - 1) * LISTED)
    pages = number + (1 if len(entries) > LISTED else 0)
    return show.page("audit.html", entries=entries[:LISTED], text=text, number=number, pages=pages)


@page(settings_pages, "/freeze", OPERATOR)
def get_freeze() -> Response:
    """The page that asks before a freeze."""
    return show.page("freeze.html")


@page(settings_pages, "/freeze", OPERATOR, methods=("POST",))
def post_freeze() -> Response:
    """Take no more orders."""
    with current_workspace().database.write() as connection:
        upkeep.stop_orders(connection, request.form.get("reason", ""), actor())
    current_workspace().publish("all")
    return to("/")


@page(settings_pages, "/thaw", OPERATOR, methods=("POST",))
def post_thaw() -> Response:
    """Take orders again."""
    with current_workspace().database.write() as connection:
        upkeep.take_orders(connection, actor())
    current_workspace().publish("all")
    return to("/")
