"""Requests that other sites make a browser send, and answers that browsers may keep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from workspace_support import DEADLINE, STORE_PATHS, Connection, Peer, handshake, running

SPEC = {"agents": {"web": STORE_PATHS[0]}}


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running("--public-url=https://deploy.example.org") as server:
        for arguments in (["open"], ["closed", "--private"]):
            server.command("cache", "create", *arguments)
        peer = Peer(server)
        peer.registered("web").close()
        yield peer


def activate(peer: Peer, **headers: str) -> requests.Response:
    return peer.http("POST", "/api/v2/deploy/activate", json=SPEC, headers=headers)


@pytest.mark.parametrize(
    "origin",
    [
        *["https://evil.example", "null", "", "https://deploy.example.org.evil.example"],
        *["http://deploy.example.org", "https://deploy.example.org:8443", "https://[", "x"],
    ],
)
def test_another_origin_is_refused(peer: Peer, origin: str) -> None:
    assert activate(peer, Origin=origin).status_code == 403
    refused = peer.http("GET", "/", headers={"Origin": origin})
    assert refused.status_code == 403 and refused.json()["error"]


def test_our_own_origins(peer: Peer) -> None:
    assert activate(peer, Origin="https://deploy.example.org").status_code == 200
    assert activate(peer, Origin=peer.server.url).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "other"])
def test_a_page_of_another_site_is_refused(peer: Peer, site: str) -> None:
    fetch = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors"}
    assert activate(peer, **fetch).status_code == 403
    assert peer.http("GET", "/", headers=fetch).status_code == 403
    form = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    assert activate(peer, **form).status_code == 403
    assert peer.http("GET", "/", headers=form).status_code == 200  # a link


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_our_own_pages(peer: Peer, site: str) -> None:
    assert activate(peer, **{"Sec-Fetch-Site": site}).status_code == 200


def test_no_websocket_for_a_page_of_another_site(peer: Peer) -> None:
    headers = {"Origin": "https://evil.example", "name": "web"}
    connection = Connection(peer.server.port)
    connection.send(handshake("/ws", peer.agent_token, **headers))
    assert connection.read_head().startswith("HTTP/1.1 403")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_the_body_of_a_form_is_refused(peer: Peer, kind: str) -> None:
    refused = activate(peer, **{"Content-Type": kind})
    assert refused.status_code == 415 and "application/json" in refused.json()["error"]
    path = "/api/v1/deploy/deployment/11111111-2222-4333-8444-555555555555/status"
    headers = {"Content-Type": kind, "name": "web"}
    assert peer.http("PUT", path, peer.agent_token, data=b"{}", headers=headers).status_code == 415
    json_type = {"Content-Type": "application/json;charset=utf-8"}
    assert activate(peer, **json_type).status_code == 200


@pytest.mark.parametrize("path", ["/", "/nowhere", "/cache/open/nix-cache-info", "/ws"])
def test_every_answer_is_what_it_says_and_not_who(peer: Peer, path: str) -> None:
    answer = peer.http("GET", path)
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and "Server" not in answer.headers


def test_nobody_keeps_what_needs_a_token(peer: Peer) -> None:
    assert peer.http("GET", "/api/v1/deploy/deployments").headers["Cache-Control"] == "no-store"
    kept = requests.get(f"{peer.server.url}/cache/open/nix-cache-info", timeout=DEADLINE)
    assert "no-store" not in kept.headers.get("Cache-Control", "")
    narinfo = f"/cache/closed/{'a' * 32}.narinfo"
    assert peer.http("GET", narinfo).headers["Cache-Control"] == "private"


def test_only_nix_is_asked_for_a_password(peer: Peer) -> None:
    for path, scheme in (
        ("/api/v1/deploy/deployments", "Bearer"),
        (f"/cache/closed/{'a' * 32}.narinfo", "Basic"),
    ):
        answer = requests.get(peer.server.url + path, timeout=DEADLINE)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith(f"{scheme} ")


@pytest.mark.parametrize("header", ["PATH_INFO", "SCRIPT_NAME"])
def test_no_header_changes_the_path(peer: Peer, header: str) -> None:
    answer = peer.http("GET", "/cache/open/nix-cache-info", headers={header: "/api/v1"})
    assert answer.status_code in (200, 400)
    assert answer.status_code == 400 or answer.text.startswith("StoreDir")
