"""The rules for browsers: uses of a workspace's answers, or send here for another site.

Agents and CI send neither `Origin` nor `Sec-Fetch-Site`, so that nothing changes for them.
"""

from __future__ import annotations

import urllib.parse

from flask import Flask, Response, request

from cachix_workspace.context import current_workspace
from cachix_workspace.refusal import Refusal

SAFE = ("GET", "HEAD")
CACHE = "/cache/"
STATIC = "/static/"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
OWN_SITE = ("same-origin", "none")  # `none`: typed by hand, or from a bookmark


def protect(app: Flask) -> None:
    """Refuse what other sites send, and set the headers that browsers heed."""
    app.before_request(_refuse_other_sites)
    app.after_request(_set_headers)


def _refuse_other_sites() -> None:
    """Raises Refusal (403) for a request that a page of another site has made.

    A link from another site to a page of ours is no such request.
    """
    site = request.headers.get("Sec-Fetch-Site")
    mode = request.headers.get("Sec-Fetch-Mode")
    is_link = request.method in SAFE and mode == "navigate"
    if site is not None and site not in OWN_SITE and not is_link:
        raise Refusal(403, "a page of another site has made this request: it is not answered")
    origin = request.headers.get("Origin")
    if origin is not None and not _is_own(origin):
        raise Refusal(403, f"{origin[:200]} is another site: its requests are not answered")


def _is_own(origin: str) -> bool:
    """Whether an origin is that of this workspace, as it was reached or as it is named."""
    settings = current_workspace().settings
    try:
        theirs = urllib.parse.urlsplit(origin)
        ours = urllib.parse.urlsplit(settings.public_url)
    except ValueError:
        return False
    named = (theirs.scheme, theirs.netloc) == (ours.scheme, ours.netloc)
    return named or (theirs.scheme in ("http", "https") and theirs.netloc == request.host)


def _set_headers(answer: Response) -> Response:
    """Let no browser guess types, and let nobody keep what needs a token."""
    answer.headers["X-Content-Type-Options"] = "nosniff"
    if answer.mimetype == "text/html":
        for name, value in PAGE_HEADERS.items():
            answer.headers[name] = value
    if request.path.startswith(STATIC) and answer.status_code == 200:
        return answer
    if not request.path.startswith(CACHE):
        answer.headers["Cache-Control"] = "no-store"
    elif "Authorization" in request.headers or answer.status_code == 401:
        answer.headers["Cache-Control"] = "private"
    return answer


def json_wanted() -> None:
    """Raises Refusal (415) for a body that a form of another site could send."""
    if request.mimetype not in ("", "application/json"):
        raise Refusal(415, "the body must be JSON, with `Content-Type: application/json`")
