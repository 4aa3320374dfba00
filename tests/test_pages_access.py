"""Every page, signed out and in each role; its headers; and a form of another site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from flask import Flask
from pages_support import Browser
from workspace_support import DEADLINE, Server

from cachix_workspace.app import PAGES, create_app
from cachix_workspace.pages.access import ROLES
from cachix_workspace.people import ROLES as ALL_ROLES
from cachix_workspace.settings import Settings


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Flask:
    data: Path = tmp_path_factory.mktemp("data") / "data"
    return create_app(Settings(data))


@pytest.fixture(scope="module")
def browsers(server: Server) -> dict[str, Browser]:
    return {role: Browser(server, f"p-{role}", role) for role in ALL_ROLES}


def rules(app: Flask) -> list[tuple[str, str, str]]:
    """Endpoint, method and path of each page."""
    names = {blueprint.name for blueprint in PAGES}
    pairs = []
    for rule in app.url_map.iter_rules():
        if rule.endpoint.partition(".")[0] in names:
            words = re.search(r"<any\(\"?([a-z-]+)", rule.rule)
            path = re.sub(r"<any[^>]*>", words[1] if words else "", rule.rule)
            path = re.sub(r"<(int:)?[a-z_]+>", "1", re.sub("<path:[a-z]+>", "x", path))
            methods = sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
            pairs += [(rule.endpoint, method, path) for method in methods]
    return pairs


def test_each_page_says_whom_it_is_for(app: Flask) -> None:
    endpoints = {endpoint for endpoint, _, _ in rules(app)}
    assert endpoints == set(ROLES) and len(endpoints) > 50


def test_nobody_sees_a_page_without_signing_in(app: Flask, server: Server) -> None:
    visitor = Browser(server, "")
    token = visitor.token()
    for endpoint, method, path in rules(app):
        if ROLES[endpoint] is None:
            continue
        answer = visitor.session.request(
            method,
            server.url + path,
            data={"csrf_token": token} if method == "POST" else None,
            allow_redirects=False,
            timeout=DEADLINE,
        )
        assert answer.status_code == 303, (method, path, answer.status_code)
        assert answer.headers["Location"].startswith("/sign-in"), path


@pytest.mark.parametrize("role", ALL_ROLES)
def test_who_may_less_is_refused(
    app: Flask, server: Server, browsers: dict[str, Browser], role: str
) -> None:
    browser = browsers[role]
    token = browser.token("/freeze" if role != "viewer" else "/")
    for endpoint, method, path in rules(app):
        needed = ROLES[endpoint]
        if needed is None or "sign-out" in path or path == "/events":
            continue
        is_allowed = ALL_ROLES.index(role) >= ALL_ROLES.index(needed)
        if is_allowed and method == "POST":
            continue  # what it does is tried elsewhere
        answer = browser.session.request(
            method,
            server.url + path,
            data={"csrf_token": token} if method == "POST" else None,
            timeout=DEADLINE,
        )
        assert (answer.status_code == 403) == (not is_allowed), (method, path, answer.status_code)
        assert answer.status_code < 500, path


def test_each_page_has_the_headers_that_keep_it_safe(
    app: Flask, server: Server, browsers: dict[str, Browser]
) -> None:
    for _, method, path in rules(app):
        if method != "GET" or path in ("/events", "/favicon.ico") or path.startswith("/get/"):
            continue
        answer = browsers["admin"].session.get(server.url + path, timeout=DEADLINE)
        if answer.headers["Content-Type"].startswith("text/html"):
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy, path
            assert answer.headers["Cache-Control"] == "no-store", path
            assert not re.search(r"<script(?! src=)|<style| style=| on[a-z]+=", answer.text), path
        assert answer.headers["X-Content-Type-Options"] == "nosniff", path


def test_each_form_needs_a_token_of_its_session(
    app: Flask, server: Server, browsers: dict[str, Browser]
) -> None:
    for _, method, path in rules(app):
        if method == "POST":
            answer = browsers["admin"].session.post(server.url + path, timeout=DEADLINE)
            assert answer.status_code == 400, path
