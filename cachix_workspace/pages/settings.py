"""Settings, people, the audit, and the freeze."""

from __future__ import annotations

from flask import Blueprint, Response, request

from cachix_workspace import audit, freeze, people, webhooks
from cachix_workspace.admission import query_number
from cachix_workspace.context import current_workspace
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, current, page, to
from cachix_workspace.people import ADMINISTRATOR, INVITATION_LASTS, LINK_LASTS, OPERATOR, ROLES
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
    by = actor()
    with current_workspace().database.write() as connection:
        people.end(connection, number)
        audit.record(connection, by.name, "session end", str(number), by.address)
    return to("/settings")


@page(settings_pages, "/settings/webhooks", ADMINISTRATOR, methods=("POST",))
def post_webhook() -> Response:
    """Make a webhook, and show its key."""
    form, by = request.form, actor()
    with current_workspace().database.write() as connection:
        hook = webhooks.create(
            connection,
            form.get("url", "").strip(),
            form.get("format", ""),
            form.getlist("event"),
            form.get("label", "").strip() or None,
        )
        detail = f"{hook.id} ({hook.format}) {hook.shown_url}"
        audit.record(connection, by.name, "webhook create", detail, by.address)
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
    by = actor()
    with current_workspace().database.write() as connection:
        hook = webhooks.remove(connection, number)
        detail = f"{hook.id} {hook.shown_url}"
        audit.record(connection, by.name, "webhook remove", detail, by.address)
    return to("/settings#webhooks")


# --- people ---------------------------------------------------------------------------------------


@page(settings_pages, "/people", ADMINISTRATOR)
def get_people() -> Response:
    """Who may sign in."""
    with current_workspace().database.read() as connection:
        found = people.list_all(connection)
    return show.page("people.html", people=found, roles=ROLES)


@page(settings_pages, "/people", ADMINISTRATOR, methods=("POST",))
def post_person() -> Response:
    """Add a person, and show the invitation."""
    by = actor()
    with current_workspace().database.write() as connection:
        name, role = request.form.get("name", "").strip(), request.form.get("role", "")
        person = people.add(connection, name, role)
        audit.record(connection, by.name, "person add", f"{name} ({role})", by.address)
        secret = people.make_link(connection, person, INVITATION_LASTS)
    return _link(person.name, secret, "7 days")


@page(settings_pages, "/people/<name>/link", ADMINISTRATOR, methods=("POST",))
def post_link(name: str) -> Response:
    """Make a new link for a person."""
    by = actor()
    with current_workspace().database.write() as connection:
        secret = people.make_link(connection, people.get(connection, name))
        audit.record(connection, by.name, "login link", name, by.address)
    return _link(name, secret, f"{LINK_LASTS.total_seconds() / 60:.0f} minutes")


def _link(name: str, secret: str, lasts: str) -> Response:
    link = f"{current_workspace().settings.url_by(request.host)}/sign-in/{secret}"
    return show.page("invitation.html", person=name, link_url=link, lasts=lasts)


@page(settings_pages, "/people/<name>/role", ADMINISTRATOR, methods=("POST",))
def post_role(name: str) -> Response:
    """Change a role."""
    by = actor()
    with current_workspace().database.write() as connection:
        person = people.change_role(connection, name, request.form.get("role", ""))
        audit.record(connection, by.name, "person role", f"{name}: {person.role}", by.address)
    return to("/people")


@page(settings_pages, "/people/<name>/remove", ADMINISTRATOR, methods=("POST",))
def post_remove(name: str) -> Response:
    """Remove a person, who is signed out by that."""
    by = actor()
    with current_workspace().database.write() as connection:
        people.remove(connection, name)
        audit.record(connection, by.name, "person remove", name, by.address)
    return to("/people")


# --- audit and freeze -----------------------------------------------------------------------------


@page(settings_pages, "/audit")
def get_audit() -> Response:
    """Who did what when."""
    text = request.args.get("q", "").strip()[:200]
    number = max(1, query_number("page", 1, 10_000))
    with current_workspace().database.read() as connection:
        entries = audit.list_page(connection, text, LISTED + 1, (number - 1) * LISTED)
    pages = number + (1 if len(entries) > LISTED else 0)
    return show.page("audit.html", entries=entries[:LISTED], text=text, number=number, pages=pages)


@page(settings_pages, "/freeze", OPERATOR)
def get_freeze() -> Response:
    """What a freeze means, and the button."""
    return show.page("freeze.html")


@page(settings_pages, "/freeze", OPERATOR, methods=("POST",))
def post_freeze() -> Response:
    """Take no more orders."""
    by = actor()
    with current_workspace().database.write() as connection:
        frozen = freeze.freeze(connection, request.form.get("reason", ""), by.name)
        audit.record(connection, by.name, "freeze", frozen.reason, by.address)
    current_workspace().feed.publish("all")
    return to("/")


@page(settings_pages, "/thaw", OPERATOR, methods=("POST",))
def post_thaw() -> Response:
    """Take orders again."""
    by = actor()
    with current_workspace().database.write() as connection:
        if freeze.thaw(connection):
            audit.record(connection, by.name, "thaw", "", by.address)
    current_workspace().feed.publish("all")
    return to("/")
