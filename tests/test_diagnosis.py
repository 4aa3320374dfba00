"""Why a connection failed: messages that name the cause and the remedy."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import websocket
from closures import plain
from hosts import Host, Program, command
from live import Workspace as Live
from peer import Peer as Workspace
from servers import Certificate, answering, forward, listen, pump

import cachix_connection
import cachix_dial
from cachix_connection import Peer, connect
from cachix_diagnosis import sentence
from cachix_protocol import Refused, Unreachable

TOKEN = "peer-agent-token"
WAITS = json.dumps({"backoff": 0.02, "slowest": 0.05})
CALLS = {
    "websocket": lambda url: connect(Peer(url, TOKEN, "web"), "/ws", 5),
    "request": lambda url: cachix_connection.http(Peer(url, TOKEN, "web"), "GET", "/x", 5),
}


needs_bodies = pytest.mark.skipif(
    "resp_body" not in inspect.signature(websocket.WebSocketBadStatusException).parameters,
    reason="this websocket-client keeps no body of an answer: a newer one is needed",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies and no certificates from the environment of the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cachix_dial, "_latest", (None, None))


def start(host: Host, url: str, token: str = TOKEN, **env: str) -> Program:
    return host.agent("web", url, token, env={"CACHIX_DEPLOY_WAITS": WAITS, **env})


# --- the wrong scheme -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", CALLS)
def test_plain_http_instead_of_https(live: Live, how: str) -> None:
    address = live.url[7:]
    problem = f"https://{address}/.*: {address} speaks plain http: use http://{address}$"
    with pytest.raises(Unreachable, match=problem):
        CALLS[how](f"https://{address}")
    with pytest.raises(Unreachable, match=f"use http://{address}/path$"):
        CALLS[how](f"https://{address}/path")


@pytest.mark.parametrize("how", CALLS)
def test_a_server_that_speaks_neither_http_nor_tls(how: str) -> None:
    listener, url = listen(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"))
    for scheme in ("http", "https"):
        with pytest.raises(Unreachable) as error:
            CALLS[how](url.replace("http", scheme))
        assert "speaks" not in str(error.value)
        assert ("its answer is not HTTP" if scheme == "http" else "SSL") in str(error.value)
    listener.close()


def nginx(certificate: Certificate, port: int) -> Callable[[Any], None]:
    """Return a function that serves TLS, and explains that to whoever speaks plain http."""
    context, plain = certificate.context(), forward(port)
    page = b"<html>400 The plain HTTP request was sent to HTTPS port</html>"

    def serve(connection: socket.socket) -> None:
        if connection.recv(1, socket.MSG_PEEK) == b"\x16":
            plain(context.wrap_socket(connection, server_side=True))
        else:
            answering(400, ["Content-Type: text/html"], page)(connection)

    return serve


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("server", ["nginx", "openssl"])
def test_https_instead_of_plain_http(
    tmp_path: Path, peer: Workspace, how: str, server: str
) -> None:
    certificate = Certificate(tmp_path / "tls")
    if server == "nginx":
        listener, url = listen(nginx(certificate, peer.port))
    else:
        listener, url = certificate.serve(peer.port)  # it hangs up without a word
    address = url.rpartition("/")[2]
    with pytest.raises(Unreachable, match=f"{address} speaks https: use https://{address}"):
        CALLS[how](f"http://{address}")
    assert not peer.heads()
    listener.close()


# --- certificates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize(
    ("names", "days", "is_trusted", "problem"),
    [
        ((), {}, False, r"self.signed certificate.*; name a file .* by SSL_CERT_FILE"),
        ((), {"last": -10}, True, "has expired; renew it, or set the clock .* where it is 20"),
        ((), {"first": 36000}, True, "not yet valid; renew it, or set the clock"),
        (("127.0.0.9",), {}, True, "match.*; give a name as --host that the certificate has"),
    ],
)
def test_a_certificate_that_is_not_accepted(
    tmp_path: Path,
    peer: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    names: tuple[str, ...],
    days: dict[str, int],
    is_trusted: bool,
    problem: str,
) -> None:
    certificate = Certificate(tmp_path / "tls", *names, **days)
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    listener, url = certificate.serve(peer.port)
    with pytest.raises(Unreachable, match=f"certificate verify failed: .*{problem}"):
        CALLS[how](url)
    assert not peer.heads()
    listener.close()


def test_an_agent_that_does_not_trust_the_certificate(
    host: Host, tmp_path: Path, peer: Workspace
) -> None:
    listener, url = Certificate(tmp_path / "tls").serve(peer.port)
    agent = start(host, url)
    agent.wait_for(rf"no connection to {url}/ws: certificate verify failed: .*SSL_CERT_FILE")
    assert not peer.heads() and agent.process.poll() is None
    listener.close()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CALLS)
def test_a_name_that_nobody_knows(how: str) -> None:
    with pytest.raises(Unreachable, match="the host's name can't be looked up: "):
        CALLS[how]("http://workspace.invalid")


# --- tokens ---------------------------------------------------------------------------------------


@needs_bodies
def test_an_agent_with_a_token_of_ci(host: Host, live: Live) -> None:
    agent = start(host, live.url, live.token("activate"))
    assert agent.wait() == 77
    problem = "this needs an agent token, and yours is an activate token"
    assert f"error: {live.url} refused the token (HTTP 403): {problem}\n" in agent.text()


@needs_bodies
def test_an_agent_with_an_unknown_token(host: Host, live: Live) -> None:
    agent = start(host, live.url, "no-such-token")
    assert agent.wait() == 77
    assert "(HTTP 401): this token is unknown here: create an agent token" in agent.text()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":"that is \\u001b[31mred\\u001b[0m\\n\\u202e and on"}', "that is red and on"),
        (b'{"message":"of another server"}', "of another server"),
        (b'"a string"', "a string"),
        (b"plain\r\ntext", "plain text"),
        (b"<html>no</html>", ""),
        (b' \n<!DOCTYPE html><title>"error"</title>', ""),
        (b'{"error": {"deep": 1}}', '{"error": {"deep": 1}}'),
        (b"[1, 2]", "[1, 2]"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 5000, "x" * 300),
        (b"", ""),
    ],
)
def test_the_servers_own_words(body: bytes, text: str) -> None:
    assert sentence(body) == text


@needs_bodies
@pytest.mark.parametrize(
    ("body", "hint"), [(b"<html>", "check it, or create a new one"), (b'{"error":"x y"}', "x y")]
)
def test_a_token_that_is_refused(body: bytes, hint: str) -> None:
    listener, url = listen(answering(403, ["Content-Type: text/html"], body))
    with pytest.raises(Refused, match=rf"refused the token \(HTTP 403\): {hint}$"):
        CALLS["websocket"](url)
    listener.close()


# --- answers without a websocket ------------------------------------------------------------------


@contextlib.contextmanager
def stripping_proxy(port: int, drop: str) -> Iterator[str]:
    """A proxy that forgets headers, as nginx does by default; yields its URL."""

    def serve(connection: socket.socket) -> None:
        connection.settimeout(20)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        kept = [line for line in head.split(b"\r\n") if not re.match(drop.encode(), line, re.I)]
        with socket.create_connection(("127.0.0.1", port), 20) as upstream:
            upstream.sendall(b"\r\n".join([kept[0], b"Connection: close", *kept[1:]]))
            pump(connection, upstream)

    listener, url = listen(serve)
    yield url
    listener.close()


@needs_bodies
@pytest.mark.parametrize("drop", ["upgrade:|connection:", "connection:"])
def test_a_proxy_that_passes_no_upgrade_headers(host: Host, live: Live, drop: str) -> None:
    with stripping_proxy(int(live.url.rpartition(":")[2]), drop) as url:
        agent = start(host, url, live.token("agent"))
        problem = f"a proxy in front of {url} does not pass the Upgrade headers"
        agent.wait_for(rf"{problem} \(HTTP 400\): in nginx set .*proxy_set_header Upgrade")
        assert agent.process.poll() is None


def test_activate_behind_a_proxy_that_passes_no_upgrade_headers(
    host: Host, live: Live, name: str
) -> None:
    """The deployment is followed by its status, and the missing log is explained."""
    agent = host.agent(name, live.url, live.token("agent"))
    agent.wait_for("is connected to")
    path = plain(live.files, name)
    live.push(path)
    spec = host.directory / "deploy.json"
    spec.write_text(json.dumps({"agents": {name: path}}))
    with stripping_proxy(int(live.url.rpartition(":")[2]), "upgrade:|connection:") as url:
        argv = [*command("cachix-deploy"), "--host", url, "activate", str(spec)]
        result = host.run(argv, env={"CACHIX_ACTIVATE_TOKEN": live.token("activate")})
    assert result.returncode == 0
    problem = f"warning: no log of {name} at present: a proxy in front of {url} does not pass"
    assert f"{problem} the Upgrade headers" in result.stderr


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (426, r"a proxy in front of URL does not pass the Upgrade headers \(HTTP 426\): in nginx"),
        (404, r"URL is no workspace \(HTTP 404 at /ws\): is there a path too many"),
        (200, "URL/ws answered HTTP 200 instead of a websocket: is it a workspace, and does a"),
        (400, "URL/ws answered HTTP 400 instead of a websocket: is it a workspace, and does a"),
        (500, "URL/ws answered HTTP 500 instead of a websocket$"),
        (502, "URL/ws answered HTTP 502 instead of a websocket$"),
        (503, "URL/ws answered HTTP 503 instead of a websocket$"),
    ],
)
def test_a_handshake_that_is_refused(status: int, problem: str) -> None:
    listener, url = listen(answering(status, ["Content-Type: text/html"], b"<html>no</html>"))
    with pytest.raises(Unreachable, match=problem.replace("URL", url)):
        CALLS["websocket"](url)
    listener.close()


@needs_bodies
def test_another_handshake_that_our_workspace_refuses(live: Live) -> None:
    """It says why. The name is checked by the command line already."""
    with pytest.raises(Unreachable, match="a websocket: the header `name` must be the agent's"):
        connect(Peer(live.url, live.token("agent"), "a b"), "/ws", 5)


def test_a_path_too_many(host: Host, live: Live) -> None:
    agent = start(host, f"{live.url}/deploy", live.token("agent"))
    agent.wait_for(rf"{live.url}/deploy is no workspace \(HTTP 404 at /ws\): is there a path too")
    with pytest.raises(Unreachable, match=r"/log/x\?view=true answered HTTP 404 instead"):
        connect(Peer(live.url, live.token("activate")), "/api/v1/deploy/log/x?view=true", 5)


@pytest.mark.parametrize("name", ["b\u00fccher.example", "\u2100.example", "\u00ff\u00fe"])
def test_our_workspace_refuses_a_host_that_is_not_ascii(live: Live, name: str) -> None:
    sock = websocket.WebSocket()
    token = live.token("agent")
    headers = [f"Authorization: Bearer {token}", "name: idn", "system: x", "version: 1"]
    with pytest.raises(websocket.WebSocketBadStatusException) as error:
        sock.connect(f"ws{live.url[4:]}/ws", header=headers, host=name, suppress_origin=True)
    assert error.value.status_code == 400
