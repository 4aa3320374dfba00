"""Errors for people: the page that a browser gets where others get JSON."""

from __future__ import annotations

from flask import Response, request

from cachix_workspace.pages import show
from cachix_workspace.pages.access import viewer
from cachix_workspace.refusal import Refusal

OTHERS = ("/api/", "/cache/", "/ws", "/healthz", "/metrics", "/get/")
TITLES = {
    400: "This can't be done",
    403: "Not allowed",
    404: "Not found",
    409: "Not now",
    423: "Frozen",
    429: "Too many tries",
    500: "The workspace failed",
    503: "Not at the moment",
}


def is_for_people() -> bool:
    """Whether a browser asks for a page."""
    is_browser = "text/html" in request.headers.get("Accept", "")  # no program of ours says so
    has_header = "Authorization" in request.headers
    return is_browser and not has_header and not request.path.startswith(OTHERS)


def error_page(code: int, sentence: str) -> Response | None:
    """The page that says what went wrong, and where to go on; None for whoever is no browser."""
    if not is_for_people():
        return None
    try:
        known = viewer() is not None
    except Refusal:
        known = False
    title = TITLES.get(code, "This can't be done")
    return show.page("error.html", code, title=title, sentence=sentence, known=known)
