"""The client's address and the workspace's name: trusted proxies, and --also-known-as."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workspace_support import STORE_PATHS, Peer, command, running

from cachix_cache import offer
from cachix_workspace.app import outermost
from cachix_workspace.settings import Settings

PUBLIC = "https://deploy.example.org/ws"
INSIDE = "http://deploy.lan:8080"
FORGED = {
    "X-Forwarded-For": "6.6.6.6",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Proto": "https",
    "Forwarded": "for=6.6.6.6;host=evil.example;proto=https",
    "X-Forwarded-Port": "1",
    "X-Forwarded-Prefix": "/evil",
    "X-Real-IP": "6.6.6.6",
}


def addresses(peer: Peer) -> set[str]:
    """The addresses that the audit has of orders."""
    entries = json.loads(peer.server.command("audit", "--limit=1000", "--json"))
    return {entry["address"] for entry in entries if entry["action"] == "deploy"}


def uri(peer: Peer, name: str, **headers: str) -> str:
    """The URL of the cache that an agent is told."""
    contents = peer.agent(name, **headers).expect_text()["command"]["contents"]
    return str(contents["cache"]["uri"])


@pytest.mark.parametrize(
    ("proxies", "seen", "address", "host"),
    [
        (0, FORGED, "127.0.0.1", "deploy.lan:8080"),
        (1, {}, "127.0.0.1", "deploy.lan:8080"),
        (1, {"X-Forwarded-For": "10.0.0.1"}, "10.0.0.1", "deploy.lan:8080"),
        (
            1,
            {"X-Forwarded-For": "6.6.6.6, 10.0.0.1", "X-Forwarded-Host": "evil, deploy.lan:8080"},
            "10.0.0.1",
            "other",
        ),
        (2, {"X-Forwarded-For": "6.6.6.6"}, "127.0.0.1", "deploy.lan:8080"),  # came by one only
        (
            2,
            {
                "X-Forwarded-For": "6.6.6.6, 10.0.0.1, 10.0.0.2",
                "X-Forwarded-Host": "evil.example, deploy.lan:8080, proxy.lan",
            },
            "10.0.0.1",
            "other",
        ),
    ],
)
def test_forwarded_headers(proxies: int, seen: dict[str, str], address: str, host: str) -> None:
    """Each proxy adds to the right. Whatever stands further to the left, a client has invented."""
    names = [f"--public-url={PUBLIC}", f"--also-known-as={INSIDE}"]
    with running(f"--behind-proxy={proxies}", *names) as server:
        server.command("cache", "create", "main")
        peer = Peer(server)
        assert uri(peer, "web", **{"Host": host, **seen}) == f"{INSIDE}/cache/main"
        body = {"agents": {"web": STORE_PATHS[0]}}
        headers = {**seen, "Host": host}
        answer = peer.http("POST", "/api/v2/deploy/activate", json=body, headers=headers)
        assert answer.status_code == 200
        assert answer.json()["agents"]["web"]["url"].startswith(PUBLIC)
        assert addresses(peer) == {address}


def test_headers_that_only_look_like_forwarded_ones() -> None:
    """To WSGI `_` and `-` are the same; proxies pass such a header on."""
    with running("--behind-proxy=1") as server:
        peer = Peer(server)
        peer.registered("web").close()
        body = {"agents": {"web": STORE_PATHS[0]}}
        forged = {"X_Forwarded_For": "6.6.6.6", "X-Forwarded_For": "6.6.6.7"}
        answer = peer.http("POST", "/api/v2/deploy/activate", json=body, headers=forged)
        assert answer.status_code == 200 and addresses(peer) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("proxies", "header", "scheme"),
    [
        *[(0, "https", "http"), (1, "https", "https"), (1, "http, https", "https")],
        *[(2, "https", "http"), (2, "ftp, https, http", "https"), (1, None, "http")],
    ],
)
def test_the_forwarded_scheme(proxies: int, header: str | None, scheme: str) -> None:
    def app(environ: dict[str, Any], _start: Any) -> list[bytes]:
        return [environ["wsgi.url_scheme"].encode()]

    environ = {"wsgi.url_scheme": "http", "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "x"}
    if header is not None:
        environ["HTTP_X_FORWARDED_PROTO"] = header
    wrapped = outermost(app, Settings(Path("x"), behind_proxy=proxies))
    assert wrapped(environ, None) == [scheme.encode()]


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    names = [INSIDE, "https://[fd00::1]:8443", "https://deploy.lan"]
    options = [f"--also-known-as={name}" for name in names]
    with running(f"--public-url={PUBLIC}", *options) as server:
        server.command("cache", "create", "main")
        yield Peer(server)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("deploy.example.org", PUBLIC),
        ("deploy.example.org:443", PUBLIC),
        ("DEPLOY.EXAMPLE.ORG", PUBLIC),
        ("deploy.lan:8080", INSIDE),
        ("deploy.lan", "https://deploy.lan"),
        ("deploy.lan:1", INSIDE),
        ("[fd00::1]:8443", "https://[fd00::1]:8443"),
        *[(host, PUBLIC) for host in ("evil.example", "127.0.0.1", "deploy.lan.", "xdeploy.lan")],
        *[(host, PUBLIC) for host in ("", "[", "u@deploy.lan:x", "deploy.lan.evil.example")],
    ],
)
def test_the_cache_has_the_host_that_the_agent_came_by_if_it_is_ours(
    peer: Peer, host: str, url: str
) -> None:
    assert uri(peer, "web", Host=host) == f"{url}/cache/main"
    assert PUBLIC in peer.server.command("cache", "show", "main")


def test_the_agent_takes_that_cache_for_near(peer: Peer) -> None:
    from cachix_protocol import Cache

    for host, came in (("deploy.lan:8080", INSIDE), ("10.1.1.1", "https://10.1.1.1")):
        contents = peer.agent("web", Host=host).expect_text()["command"]["contents"]
        facts = offer(came, Cache.from_json(contents["cache"]))
        assert facts.is_near == (came == INSIDE)


def test_caches_below_each_of_our_hosts(peer: Peer) -> None:
    for host, status in (
        ("main.deploy.lan", 200),
        ("main.deploy.example.org", 200),
        ("main.evil.example", 404),
        ("main.x.deploy.lan", 404),
    ):
        assert peer.http("GET", "/nix-cache-info", headers={"Host": host}).status_code == status


@pytest.mark.sqlite  # the tests make the directory where it names another database
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        *[(f"--behind-proxy={x}", "from 0 to 9") for x in ("-1", "10", "x", "")],
        *[(f"--also-known-as={x}", "must be a URL") for x in ("x", "ftp://x", "http://u@x", "")],
    ],
)
def test_wrong_options(tmp_path: Path, option: str, sentence: str) -> None:
    refused = command("serve", option, f"--data={tmp_path}/data", status=64)
    assert sentence in refused.stderr and not (tmp_path / "data").exists()
