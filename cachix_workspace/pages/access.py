"""Access to pages: sessions by cookie, or a proxy's header, and roles."""

from __future__ import annotations

import contextlib
import functools
import urllib.parse
from typing import Any, Callable, TypeVar

from flask import Blueprint, Response, g, request
from sqlalchemy.exc import SQLAlchemyError

from cachix_protocol import Error
from cachix_workspace import people
from cachix_workspace.context import current_workspace
from cachix_workspace.orders import Actor
from cachix_workspace.people import VIEWER, Viewer
from cachix_workspace.refusal import Refusal

COOKIE = "workspace_session"
ROLES: dict[str, str | None] = {}  # what each page takes, by endpoint; None for anybody

View = TypeVar("View", bound=Callable[..., Any])


def page(
    blueprint: Blueprint, rule: str, role: str | None = VIEWER, methods: tuple[str, ...] = ("GET",)
) -> Callable[[View], View]:
    """Make a function the page at `rule`, for viewers of at least this role; None: for anybody."""

    def decorate(view: View) -> View:
        @functools.wraps(view)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if role is not None:
                one = viewer()
                if one is None:
                    return to_sign_in()
                if not one.may(role):
                    article = "an" if role[0] in "ao" else "a"
                    raise Refusal(403, f"this takes {article} {role}, and you are a {one.role}")
            return view(*args, **kwargs)

        ROLES[f"{blueprint.name}.{view.__name__}"] = role
        blueprint.add_url_rule(rule, view.__name__, checked, methods=list(methods))
        return view

    return decorate


def viewer() -> Viewer | None:
    """The viewer of this request; None if he is not signed in."""
    if "viewer" not in g:
        g.viewer = _by_header() or _by_cookie()
    person: Viewer | None = g.viewer
    return person


def current() -> Viewer:
    """The viewer of this request, where `page` has seen to it that he is signed in."""
    one = viewer()
    if one is None:
        raise Refusal(401, "you are not signed in")
    return one


def actor() -> Actor:
    """The actor of this request, for the audit."""
    return Actor(current().name, request.remote_addr or "")


def _by_cookie() -> Viewer | None:
    cookie = request.cookies.get(COOKIE, "")
    if not cookie:
        return None
    database = current_workspace().database
    with database.read() as connection:
        person = people.viewer(connection, cookie)
        is_due = person is not None and people.is_seen_long_ago(connection, person.session_id)
    if person is not None and is_due:
        failures = contextlib.suppress(Error, SQLAlchemyError)  # on a full disk pages can be read
        with failures, database.write() as connection:
            people.note_seen(connection, person.session_id)
    return person


def _by_header() -> Viewer | None:
    """The person that a proxy in front names, if the workspace was told to believe it."""
    settings = current_workspace().settings
    name = request.headers.get(settings.auth_header, "") if settings.auth_header else ""
    if not name:
        return None
    with current_workspace().database.read() as connection:
        person = people.find(connection, name)
    if person is None:
        how = f"an admin adds you by `cachix-workspace person add {name[:64]} --role=viewer`"
        raise Refusal(403, f"{name[:64]} is not known here: {how}")
    return Viewer(person.name, person.role, person_id=person.id)


def to(target: str) -> Response:
    """Send a browser to a page, by GET."""
    return Response(status=303, headers={"Location": target})


def to_sign_in() -> Response:
    """Send a browser to the sign-in page, and from there back to this one."""
    if request.method != "GET":
        return to("/sign-in")
    here = request.full_path.rstrip("?")
    return to(f"/sign-in?{urllib.parse.urlencode({'next': here})}")


def own_path(text: str) -> str:
    """A path of this workspace that was given as text; `/` for anything else."""
    parts = urllib.parse.urlsplit(text)
    is_own = text.startswith("/") and not text.startswith(("//", "/\\")) and not parts.netloc
    return text if is_own and "\\" not in text and text.isprintable() else "/"
