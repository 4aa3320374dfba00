"""People, sessions, the audit, the freeze, and signing in and out."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
import requests
from pages_support import Browser, words
from workspace_support import OURS, STORE_PATHS, Peer, Server, running

from cachix_workspace import people
from cachix_workspace.database import open_database
from cachix_workspace.pages.access import COOKIE, own_path
from cachix_workspace.people import OPERATOR, VIEWER
from cachix_workspace.settings import Settings
from cachix_workspace.tables import links


@pytest.fixture(scope="module")
def peer(server: Server) -> Peer:
    return Peer(server)


def invite(browser: Browser, name: str, role: str) -> str:
    """The path of the link by which a person signs in."""
    page = browser.post("/people", name=name, role=role)
    match = re.search(r'<pre id="link"[^>]*>(.*?)</pre>', page)
    assert match, words(page)
    return html.unescape(match[1]).removeprefix(browser.server.url)


def signed_in(browser: Browser) -> bool:
    return not browser.session.get(browser.server.url, timeout=10).url.endswith("sign-in?next=%2F")


# --- signing in -----------------------------------------------------------------------------------


def test_an_invitation_signs_in_once_and_looking_uses_nothing(
    server: Server, browser: Browser
) -> None:
    path = invite(browser, "vera", VIEWER)
    vera = Browser(server, "")
    for _ in range(3):  # as previews of chats do
        assert "as vera" in words(vera.get(path))
    assert not signed_in(vera)
    vera.post(path, page=path)
    assert signed_in(vera) and "vera, viewer" in vera.get("/runs")
    vera.get("/tokens", 403)
    again = Browser(server, "")
    assert "was used already" in words(again.get(path, 403))
    again.post(path, 403)
    assert not signed_in(again)
    vera.post("/sign-out")
    assert not signed_in(vera)


def test_an_expired_link_says_how_to_get_the_next(server: Server, browser: Browser) -> None:
    path = invite(browser, "late", VIEWER)
    database = open_database(Settings(server.data))
    with database.write() as connection:
        connection.execute(links.update().values(expires_on="2020-01-01T00:00:00Z"))
    database.close()
    page = words(Browser(server, "").get(path, 403))
    assert "has expired" in page and "cachix-workspace login-link" in page
    assert "is none of this workspace" in words(Browser(server, "").get("/sign-in/x", 403))


def test_who_signs_in_comes_back_to_where_he_was(server: Server) -> None:
    visitor = Browser(server, "")
    answer = visitor.session.get(f"{server.url}/audit?q=x&page=2", timeout=10)
    assert 'name="next" value="/audit?q=x&amp;page=2"' in answer.text
    token = server.token("admin")
    visitor.post("/sign-in", page="/sign-in?next=/audit", token=token, next="/audit?q=x")
    assert visitor.last.url == f"{server.url}/audit?q=x"
    visitor.post("/sign-out")


@pytest.mark.parametrize(
    "target",
    ["//elsewhere.example", "https://elsewhere.example", "/\\elsewhere.example", "", "/a\nb"],
)
def test_signing_in_never_leads_elsewhere(target: str) -> None:
    assert own_path(target) == "/"


def test_cookies_are_kept_from_scripts_and_other_sites(server: Server) -> None:
    visitor = Browser(server, "")
    token = visitor.token()
    form = {"csrf_token": token, "token": server.token("admin")}
    answer = visitor.session.post(
        f"{server.url}/sign-in", data=form, timeout=10, allow_redirects=False
    )
    cookies = answer.headers["Set-Cookie"]
    assert COOKIE in cookies and "HttpOnly" in cookies and "SameSite=Lax" in cookies
    assert "Secure" not in cookies  # it is plain http


@pytest.mark.long
def test_tries_to_guess_a_token_are_slowed_and_stopped() -> None:
    with running() as server:
        visitor = Browser(server, "")
        assert "no token of this workspace" in words(visitor.post("/sign-in", 403, token="x"))
        assert "take an admin token" in words(
            visitor.post("/sign-in", 403, token=server.token("agent"))
        )
        for _ in range(8):
            visitor.post("/sign-in", 403, token="x")
        assert "too many wrong tries" in words(visitor.post("/sign-in", 429, token="x"))


@pytest.mark.parametrize("path", ["/people", "/freeze", "/sign-in", "/welcome/name"])
def test_a_form_of_no_page_of_ours_is_refused(browser: Browser, path: str) -> None:
    answer = browser.session.post(f"{browser.server.url}{path}", data={"name": "x"}, timeout=10)
    assert answer.status_code == 400 and "reload the page" in words(answer.text)


# --- people ---------------------------------------------------------------------------------------


def test_removing_a_person_ends_his_sessions(server: Server, browser: Browser) -> None:
    path = invite(browser, "otto", OPERATOR)
    otto = Browser(server, "")
    otto.post(path, page=path)
    assert "otto, operator" in otto.get("/")
    browser.post("/people/otto/role", role=VIEWER)
    assert "otto, viewer" in otto.get("/")
    browser.post("/people/otto/remove")
    assert not signed_in(otto)


def test_the_last_admin_stays(server: Server) -> None:
    with running() as fresh:
        anna = Browser(fresh)
        assert "the only admin" in words(anna.post("/people/anna/remove", 409))
        assert "the only admin" in words(anna.post("/people/anna/role", 409, role=VIEWER))


def test_a_session_is_ended_from_the_settings(server: Server, browser: Browser) -> None:
    path = invite(browser, "sam", VIEWER)
    sam = Browser(server, "")
    sam.post(path, page=path)
    page = browser.get("/settings")
    row = next(row for row in re.findall("<tr>.*?</tr>", page, re.S) if ">sam" in row)
    number = re.findall(r"sessions/(\d+)/end", row)[0]
    browser.post(f"/settings/sessions/{number}/end")
    assert not signed_in(sam)


@pytest.mark.parametrize("form", [{"name": "a b"}, {"name": "x", "role": "root"}, {"name": ""}])
def test_a_person_that_can_not_be_added(browser: Browser, form: dict[str, Any]) -> None:
    browser.post("/people", 400, **{"role": VIEWER, **form})


# --- audit and freeze -----------------------------------------------------------------------------


def test_the_audit_names_who_did_it_and_no_secret(browser: Browser) -> None:
    page = browser.post("/tokens", kind="activate")
    secret = html.unescape(re.findall(r'<pre id="token"[^>]*>(.*?)</pre>', page)[0])
    listed = browser.get("/audit?q=token create")
    assert "anna" in words(listed) and secret not in browser.get("/audit")
    assert "No entry has this." in words(browser.get("/audit?q=%25nothing%25"))


def test_a_frozen_workspace_takes_no_orders(server: Server, peer: Peer, browser: Browser) -> None:
    peer.registered("cold", **OURS)
    browser.post("/freeze", 400, reason=" ")
    browser.post("/freeze", reason="the <audit>")
    assert "Frozen" in browser.get("/")
    answer = peer.http("POST", "/api/v2/deploy/activate", json={"agents": {"cold": STORE_PATHS[0]}})
    assert answer.status_code == 423 and "by anna: the <audit>" in answer.json()["error"]
    assert "the &lt;audit&gt;" in browser.get("/runs")
    browser.post("/start", 423, name="cold", path=STORE_PATHS[0])
    browser.post("/thaw")
    assert peer.activate({"cold": STORE_PATHS[0]})


# --- a proxy that vouches -------------------------------------------------------------------------


def test_a_proxy_names_who_is_signed_in() -> None:
    with running(behind_proxy=1, auth_header="X-Forwarded-User") as server:
        database = open_database(Settings(server.data))
        with database.write() as connection:
            people.add(connection, "paul", VIEWER)
        database.close()
        page = {"Accept": "text/html"}
        known = requests.get(server.url, headers={**page, "X-Forwarded-User": "paul"}, timeout=10)
        assert "paul, viewer" in known.text and "Sign out" not in known.text
        other = requests.get(server.url, headers={**page, "X-Forwarded-User": "eve"}, timeout=10)
        assert other.status_code == 403 and "person add eve" in other.text


def test_without_a_proxy_nobody_vouches(server: Server) -> None:
    headers = {"Accept": "text/html", "X-Forwarded-User": "anna"}
    assert requests.get(server.url, headers=headers, timeout=10).url.endswith("sign-in?next=%2F")
