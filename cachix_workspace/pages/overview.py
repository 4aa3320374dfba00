"""All agents on one page, and the files that pages are drawn with."""

from __future__ import annotations

from flask import Blueprint, Response, request, send_from_directory

from cachix_protocol import __version__
from cachix_workspace import backup, fleet, people
from cachix_workspace.admission import query_number
from cachix_workspace.answers import json_answer
from cachix_workspace.context import current_workspace
from cachix_workspace.fleet import Filter
from cachix_workspace.pages import show
from cachix_workspace.pages.access import page, to_sign_in, viewer
from cachix_workspace.pages.errors import is_for_people
from cachix_workspace.states import AGENT_STATES

overview_pages = Blueprint("overview", __name__)

MOST_PAGES = 1000


@page(overview_pages, "/", role=None)
def get_overview() -> Response:
    """All agents; for programs, which service this is."""
    workspace = current_workspace()
    if not is_for_people():
        url = workspace.settings.public_url
        return json_answer({"service": "cachix-deploy workspace", "url": url})
    if viewer() is None:
        return to_sign_in()
    number = max(1, query_number("page", 1, MOST_PAGES))
    wanted = Filter(*(request.args.get(key, "").strip()[:200] for key in ("q", "label", "state")))
    overview = fleet.overview(workspace.briefs(), wanted, number)
    with workspace.database.read() as connection:
        restored = backup.restored(connection)
    return show.page(
        "overview.html",
        topics="agents",
        restored=restored,
        overview=overview,
        wanted=wanted,
        number=number,
        pages=-(-overview.matching // fleet.PAGE),
        states=AGENT_STATES,
        ours=__version__,
    )


@page(overview_pages, "/static/<hash>/<path:name>", role=None)
def get_static(hash: str, name: str) -> Response:
    """A style sheet, a script or an icon. Its address has a hash of its contents."""
    answer = send_from_directory(show.STATIC, name)
    answer.headers["Cache-Control"] = "public, max-age=31536000, immutable"
    return answer


@page(overview_pages, "/favicon.ico", role=None)
def get_icon() -> Response:
    """The icon that browsers ask for by themselves."""
    return send_from_directory(show.STATIC, "icon.svg", mimetype="image/svg+xml")


def nobody_yet() -> bool:
    """Whether nobody has signed in so far."""
    with current_workspace().database.read() as connection:
        return not people.has_signed_in(connection)
