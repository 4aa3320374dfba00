"""Signing in by a link or with a token, and out."""

from __future__ import annotations

import threading
import time
from collections import Counter

from flask import Blueprint, Response, request
from sqlalchemy import Connection

from cachix_protocol import utc_now
from cachix_workspace import audit, people, tokens
from cachix_workspace.context import current_workspace
from cachix_workspace.pages import show
from cachix_workspace.pages.access import COOKIE, own_path, page, to, viewer
from cachix_workspace.refusal import Refusal

sign_in_pages = Blueprint("sign_in", __name__)

NEXT_LINK = "run `cachix-workspace login-link` where the workspace runs, or ask an admin for one"
MOST_TRIES = 10  # wrong ones of an address within WINDOW
WINDOW = 300.0  # seconds


class Tries:
    """Wrong tries to sign in, by address. Nobody guesses a secret; it is for the log's sake."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._since = time.monotonic()

    def check(self, address: str) -> None:
        """Raises Refusal (429) if this address has tried too often."""
        with self._lock:
            if time.monotonic() > self._since + WINDOW:
                self._since = time.monotonic()
                self._counts.clear()
            if self._counts[address] >= MOST_TRIES:
                raise Refusal(429, "too many wrong tries from your address: wait five minutes")

    def note(self, address: str) -> None:
        """Count a wrong try."""
        with self._lock:
            self._counts[address] += 1


tries = Tries()


@page(sign_in_pages, "/sign-in", role=None)
def get_sign_in() -> Response:
    """The form for a token, and how to get a link."""
    target = own_path(request.args.get("next", "/"))
    if viewer() is not None:
        return to(target)
    return show.page("sign_in.html", target=target)


@page(sign_in_pages, "/sign-in", role=None, methods=("POST",))
def post_sign_in() -> Response:
    """Sign in with a token."""
    target = own_path(request.form.get("next", "/"))
    address = request.remote_addr or ""
    tries.check(address)
    secret = request.form.get("token", "").strip()
    try:
        with current_workspace().database.write() as connection:
            token_id = _token_of(connection, secret)
            cookie = _begin(connection, address, f"token {token_id}", token_id=token_id)
    except Refusal as refusal:
        tries.note(address)
        time.sleep(0.5)
        return show.page("sign_in.html", 403, target=target, problem=str(refusal))
    return _with_cookie(to(target), cookie)


def _token_of(connection: Connection, secret: str) -> int:
    """The number of the token that somebody signs in with. Raises Refusal."""
    token = tokens.find_by_secret(connection, secret)
    if token is None:
        raise Refusal(403, "this is no token of this workspace")
    if people.role_of(token) is None:
        state = token.state(utc_now())
        reason = f"it is {state}" if state != "valid" else "take an admin token"
        raise Refusal(403, f"nobody can sign in with {token.label}: {reason}")
    return token.id


@page(sign_in_pages, "/sign-in/<secret>", role=None)
def get_link(secret: str) -> Response:
    """A link that signs somebody in. Looking at it changes nothing: previews of chats do so."""
    with current_workspace().database.read() as connection:
        link = people.find_link(connection, secret)
    if link is None or link.state != "valid":
        state = "unknown" if link is None else link.state
        return show.page("link.html", 403, link=None, state=state, hint=NEXT_LINK)
    return show.page("link.html", link=link)


@page(sign_in_pages, "/sign-in/<secret>", role=None, methods=("POST",))
def post_link(secret: str) -> Response:
    """Sign in by a link, which is then used up."""
    address = request.remote_addr or ""
    tries.check(address)
    with current_workspace().database.write() as connection:
        is_first = not people.has_signed_in(connection)
        link = people.use_link(connection, secret)
        cookie = ""
        if link is not None and link.state == "valid":
            cookie = _begin(connection, address, link.person.name, person_id=link.person.id)
    if not cookie:
        tries.note(address)
        state = "unknown" if link is None else link.state
        return show.page("link.html", 403, link=None, state=state, hint=NEXT_LINK)
    return _with_cookie(to("/welcome" if is_first else "/"), cookie)


def _begin(
    connection: Connection,
    address: str,
    who: str,
    person_id: int | None = None,
    token_id: int | None = None,
) -> str:
    browser = request.headers.get("User-Agent", "")
    audit.record(connection, who, "sign in", browser[:200], address)
    return people.begin(connection, address, browser, person_id, token_id)


def _with_cookie(answer: Response, cookie: str) -> Response:
    seconds = int(people.SESSION_LASTS.total_seconds())
    is_secure = request.is_secure
    answer.set_cookie(
        COOKIE, cookie, max_age=seconds, secure=is_secure, httponly=True, samesite="Lax"
    )
    return answer


@page(sign_in_pages, "/sign-out", role=None, methods=("POST",))
def post_sign_out() -> Response:
    """End this session."""
    one = viewer()
    if one is not None and one.session_id:
        with current_workspace().database.write() as connection:
            people.end(connection, one.session_id)
            audit.record(connection, one.name, "sign out", "", request.remote_addr or "")
    answer = to("/sign-in")
    answer.delete_cookie(COOKIE, path="/")
    return answer
