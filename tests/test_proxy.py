"""The proxy of a URL: the decision, the same one for websockets, requests and Nix, and the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import urllib3
from caches import Cache
from closures import plain
from hosts import Host, Program, command
from peer import Peer as Workspace
from servers import Certificate, Proxy, SocksProxy, answering, listen

import cachix_connection
from cachix_connection import Peer, connect
from cachix_protocol import Unreachable, UsageError
from cachix_proxy import for_nix, proxy_for

TOKEN = "peer-agent-token"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
URL = "http://deploy.example.test:8080"
WAITS = json.dumps({"backoff": 0.05, "slowest": 0.2})


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies from the environment of the tests."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# --- the decision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "variables", "proxy"),
    [
        (URL, {}, None),
        (URL, {"http_proxy": "http://p:3128"}, "http://p:3128"),
        (URL, {"HTTP_PROXY": "http://p:3128"}, "http://p:3128"),
        (URL, {"http_proxy": "p:3128"}, "http://p:3128"),
        (URL, {"http_proxy": "p"}, "http://p:80"),
        (URL, {"http_proxy": " http://p:3128/ "}, "http://p:3128"),
        (URL, {"http_proxy": "http://a:1", "HTTP_PROXY": "http://b:1"}, "http://a:1"),
        (URL, {"http_proxy": "", "HTTP_PROXY": "http://b:1"}, "http://b:1"),
        (URL, {"http_proxy": "http://a:1", "all_proxy": "http://b:1"}, "http://a:1"),
        (URL, {"https_proxy": "http://p:1"}, None),
        ("https://x", {"https_proxy": "http://p:1", "http_proxy": "http://q:1"}, "http://p:1"),
        ("https://x", {"http_proxy": "http://q:1"}, None),
        (URL, {"ALL_PROXY": "http://p:1"}, "http://p:1"),
        ("https://x", {"all_proxy": "socks5h://p"}, "socks5h://p:1080"),
        (URL, {"all_proxy": "socks://p"}, "socks5://p:1080"),
        (URL, {"http_proxy": "https://p"}, "https://p:443"),
        (URL, {"http_proxy": "http://[::1]:3128"}, "http://[::1]:3128"),
        (URL, {"http_proxy": "http://bücher.test"}, "http://xn--bcher-kva.test:80"),
        (URL, {"http_proxy": "joe:pass%20word@p:1"}, "http://joe:pass%20word@p:1"),
        (URL, {"http_proxy": "http://j%40e@p:1"}, "http://j%40e:@p:1"),
    ],
)
def test_the_variable_that_counts(
    monkeypatch: pytest.MonkeyPatch, url: str, variables: dict[str, str], proxy: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    decision = proxy_for(url)
    assert (decision and decision.url) == proxy
    assert for_nix(url).get(f"{url.partition(':')[0]}_proxy") == proxy


@pytest.mark.parametrize(
    ("text", "url", "is_direct"),
    [
        ("*", URL, True),
        ("other,*", URL, True),
        ("deploy.example.test", URL, True),
        ("DEPLOY.Example.TEST", URL, True),
        ("deploy.example.test.", URL, True),
        ("example.test", URL, True),
        (".example.test", URL, True),
        ("*.example.test", URL, True),
        (".deploy.example.test", URL, True),
        ("ploy.example.test", URL, False),
        ("a.deploy.example.test", URL, False),
        ("deploy.example.test:8080", URL, True),
        ("example.test:8080", URL, True),
        ("deploy.example.test:80", URL, False),
        ("other, deploy.example.test", URL, True),
        ("other deploy.example.test", URL, True),
        ("other,,deploy.example.test,", URL, True),
        ("http://deploy.example.test:8080/", URL, True),
        ("", URL, False),
        (",", URL, False),
        ("deploy.example.test", "http://DEPLOY.example.test:8080", True),
        ("example.test:443", "https://deploy.example.test", True),
        ("example.test:443", "http://deploy.example.test", False),
        ("bücher.test", "http://xn--bcher-kva.test", True),
        ("127.0.0.1", "http://127.0.0.1:1", True),
        ("127.0.0.0/8", "http://127.0.0.1:1", True),
        ("127.0.0.1/8", "http://127.0.0.1:1", True),
        ("10.0.0.0/8", "http://127.0.0.1:1", False),
        ("127.0.0.1:1", "http://127.0.0.1:1", True),
        ("127.0.0.1:2", "http://127.0.0.1:1", False),
        ("0.0.1", "http://127.0.0.1:1", False),
        ("127.0.0.0/8", URL, False),
        ("::1", "http://[::1]:1", True),
        ("[::1]", "http://[::1]:1", True),
        ("[::1]:1", "http://[::1]:1", True),
        ("[::1]:2", "http://[::1]:1", False),
        ("0:0:0:0:0:0:0:1", "http://[::1]:1", True),
        ("fd00::/8", "http://[fd00:1::2]:1", True),
        ("fd00::/8", "http://127.0.0.1", False),
        ("nonsense/99", "http://127.0.0.1", False),
    ],
)
@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_no_proxy(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, url: str, is_direct: bool
) -> None:
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://p:1")
    monkeypatch.setenv(name, text)
    assert (proxy_for(url) is None) == is_direct


@pytest.mark.parametrize(
    ("text", "url", "expected"),
    [
        ("A.test,*.B.test .c.test", URL, "a.test,b.test,c.test"),
        ("a.test,*", URL, "*"),
        ("example.test:8080", URL, "deploy.example.test"),
        ("example.test:80", URL, ""),
        ("127.0.0.0/8", "http://127.0.0.1:1/cache", "127.0.0.0/8,127.0.0.1"),
        ("[::1]:1", "http://[::1]:1", "::1"),
        ("", URL, ""),
    ],
)
def test_no_proxy_for_nix(
    monkeypatch: pytest.MonkeyPatch, text: str, url: str, expected: str
) -> None:
    """curl takes no port there, no `*.`, and NO_PROXY if no_proxy is empty."""
    monkeypatch.setenv("ALL_PROXY", "p:1")
    monkeypatch.setenv("NO_PROXY", text)
    proxies = {"http_proxy": "http://p:1", "https_proxy": "http://p:1"}
    assert for_nix(url) == {**proxies, "no_proxy": expected, "NO_PROXY": expected}


@pytest.mark.parametrize("url", ["http://[", "http://a:b", "s3://bucket", "/nix/store", "", "\0"])
def test_a_cache_with_an_odd_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("http_proxy", "p:1")
    monkeypatch.setenv("no_proxy", "a.test:1,b.test")
    assert for_nix(url)["no_proxy"].startswith("b.test")


def test_without_a_proxy_the_environment_of_nix_stays_as_it_is() -> None:
    assert for_nix(URL) == {}


@pytest.mark.parametrize(
    "value", ["socks4://joe:secret@p", "ftp://joe:secret@p", "http://joe:secret@p:x", "http://"]
)
def test_a_proxy_that_can_not_be_used(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(
        UsageError, match="the proxy in HTTP_PROXY can't be used: give http://"
    ) as e:
        Peer.create(URL, TOKEN)
    assert "secret" not in str(e.value)
    assert Peer.create("https://deploy.example.test", TOKEN)


# --- everything goes the same way -----------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


@pytest.fixture
def locked_proxy() -> Iterator[Proxy]:
    proxy = Proxy("joe:pass word")
    yield proxy
    proxy.close()


@pytest.fixture
def make_socks() -> Iterator[Callable[..., SocksProxy]]:
    proxies = []

    def make(password: str = "") -> SocksProxy:
        proxies.append(SocksProxy(password))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


def start(host: Host, url: str, **env: str) -> Program:
    return host.agent("web", url, TOKEN, env={"CACHIX_DEPLOY_WAITS": WAITS, **env})


def name_this_machine(host: Host, name: str) -> None:
    """Let a host look up a name as 127.0.0.1."""
    file = host.directory / "hosts"
    file.write_text(f"127.0.0.1 localhost {name}\n")
    host.output("mount", "--bind", str(file), "/etc/hosts")


def kinds(proxy: Proxy, workspace: Workspace, cache: Cache) -> set[str]:
    """Return which kinds of requests a proxy was asked."""
    kinds = set()
    for request in proxy.asked:
        method, target = request.split(" ")
        port = int(re.search(r":(\d+)", target.replace("http://", ""))[1])  # type: ignore[index]
        assert port in (workspace.port, int(cache.url.rpartition(":")[2]))
        kinds.add(method if port == workspace.port else "Nix")
    return kinds


ALL = {"CONNECT", "PUT", "Nix"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("http_proxy", "http://127.0.0.1:PORT"),
        ("http_proxy", "127.0.0.1:PORT"),
        ("HTTP_PROXY", "http://127.0.0.1:PORT"),
        ("ALL_PROXY", "http://127.0.0.1:PORT"),
        ("all_proxy", "127.0.0.1:PORT"),
    ],
)
def test_the_proxy_of_the_environment_is_used_for_everything(
    host: Host, cache: Cache, peer: Workspace, proxy: Proxy, name: str, value: str
) -> None:
    peer.reports, peer.cache = "http", cache.wire()
    start(host, peer.url, **{name: value.replace("PORT", str(proxy.port))})
    assert peer.finished(peer.deploy(plain(cache, 1)))
    assert kinds(proxy, peer, cache) == ALL
    connects = [request for request in proxy.asked if request.startswith("CONNECT")]
    assert connects[0] == f"CONNECT {peer.url[7:]}"
    assert len(connects) == len(peer.heads("/ws")) + len(peer.heads("/ws-deployment"))


def test_a_proxy_with_a_password(
    host: Host, cache: Cache, peer: Workspace, locked_proxy: Proxy
) -> None:
    peer.reports, peer.cache = "http", cache.wire()
    url = f"http://joe:pass%20word@127.0.0.1:{locked_proxy.port}"
    agent = start(host, peer.url, http_proxy=url)
    assert peer.finished(peer.deploy(plain(cache, 1)))
    assert kinds(locked_proxy, peer, cache) == ALL
    assert "pass" not in agent.text()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("example.test", set()),
        ("*.example.test", set()),
        ("DEPLOY.EXAMPLE.TEST", set()),
        ("other, deploy.example.test", set()),
        ("deploy.example.test:WORKSPACE,deploy.example.test:CACHE", set()),
        ("deploy.example.test:WORKSPACE", {"Nix"}),
        ("deploy.example.test:CACHE", {"CONNECT", "PUT"}),
        ("deploy.example.test:1", ALL),
        ("", ALL),
    ],
)
def test_everybody_obeys_no_proxy(
    host: Host, cache: Cache, peer: Workspace, proxy: Proxy, value: str, expected: set[str]
) -> None:
    name_this_machine(host, "deploy.example.test")
    peer.reports = "http"
    url, cache_url = (
        address.replace("127.0.0.1", "deploy.example.test") for address in (peer.url, cache.url)
    )
    peer.cache = {**cache.wire(), "uri": cache_url}
    value = value.replace("WORKSPACE", str(peer.port)).replace(
        "CACHE", cache.url.rpartition(":")[2]
    )
    start(host, url, http_proxy=f"http://127.0.0.1:{proxy.port}", no_proxy=value)
    assert peer.finished(peer.deploy(plain(cache, 1)))
    assert kinds(proxy, peer, cache) == expected


@pytest.mark.parametrize("value", ["127.0.0.1", "localhost,127.0.0.1", "127.0.0.0/8", "*"])
def test_everybody_obeys_no_proxy_for_an_address(
    host: Host, cache: Cache, peer: Workspace, proxy: Proxy, value: str
) -> None:
    peer.reports, peer.cache = "http", cache.wire()
    start(host, peer.url, ALL_PROXY=f"http://127.0.0.1:{proxy.port}", NO_PROXY=value)
    assert peer.finished(peer.deploy(plain(cache, 1)))
    assert proxy.asked == []


@pytest.mark.parametrize("password", ["", "joe:secret"])
def test_a_socks_proxy(
    host: Host,
    cache: Cache,
    peer: Workspace,
    make_socks: Callable[..., SocksProxy],
    password: str,
) -> None:
    """The proxy looks up the name, which this machine does not know."""
    socks = make_socks(password)
    peer.reports = "http"
    url, cache_url = (
        address.replace("127.0.0.1", "deploy.invalid") for address in (peer.url, cache.url)
    )
    peer.cache = {**cache.wire(), "uri": cache_url}
    credentials = f"{password}@" if password else ""
    agent = start(host, url, ALL_PROXY=f"socks5h://{credentials}127.0.0.1:{socks.port}")
    assert peer.finished(peer.deploy(plain(cache, 1))), agent.text()
    assert set(socks.asked) == {"deploy.invalid"} and len(socks.asked) >= 3
    assert cache.count("narinfo")


def test_activate_goes_through_the_proxy(
    host: Host, cache: Cache, peer: Workspace, proxy: Proxy
) -> None:
    peer.reports = "http"
    path = plain(cache, 1)
    identity = "11111111-2222-4333-8444-555555555555"
    orders = {"agents": {"web": {"id": identity, "url": f"{peer.url}/1"}}}
    state = {"status": "Succeeded", "startedOn": None, "finishedOn": None, "closureSize": 1}
    peer.answer("^POST /api/v2/deploy/activate", lambda request: (200, orders))
    peer.answer("^GET /api/v1/deploy/deployment/", lambda request: (200, state))
    spec = host.directory / "deploy.json"
    spec.write_text(json.dumps({"agents": {"web": path}}))
    argv = [*command("cachix-deploy"), "--host", peer.url, "activate", str(spec)]
    env = {"CACHIX_ACTIVATE_TOKEN": TOKEN, "ALL_PROXY": f"127.0.0.1:{proxy.port}"}
    result = host.run(argv, env=env)
    assert result.returncode == 0, result.stderr
    assert {request.split(" ")[0] for request in proxy.asked} == {"POST", "GET", "CONNECT"}


# --- the way through it ---------------------------------------------------------------------------


def test_a_proxy_that_refuses_is_reported(
    host: Host, peer: Workspace, locked_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://joe:wrong-one@127.0.0.1:{locked_proxy.port}"
    agent = start(host, peer.url, http_proxy=url)
    agent.wait_for("no connection to .*proxy.*407")
    assert "wrong-one" not in agent.text() and not peer.heads("/ws")
    assert agent.stop() == 0
    monkeypatch.setenv("https_proxy", url)
    problem = rf"by the proxy http://127.0.0.1:{locked_proxy.port}: .*407"
    with pytest.raises(Unreachable, match=problem) as error:
        cachix_connection.http(Peer("https://127.0.0.1:1", TOKEN), "GET", "/x")
    assert "wrong-one" not in str(error.value)


@pytest.mark.parametrize(
    ("serve", "problem"),
    [
        (answering(403, [], b"no"), r"it refused to connect to 127.0.0.1:1 \(HTTP 403\)"),
        (lambda connection: connection.recv(100), "it hung up"),
        (lambda connection: connection.sendall(b"SSH-2.0\r\n\r\n"), "not answer as an HTTP proxy"),
        (lambda connection: connection.sendall(b"x" * 100_000), "not answer as an HTTP proxy"),
    ],
)
def test_an_odd_proxy_is_reported(
    monkeypatch: pytest.MonkeyPatch, serve: Any, problem: str
) -> None:
    listener, url = listen(serve)
    monkeypatch.setenv("http_proxy", url)
    with pytest.raises(Unreachable, match=f"by the proxy {url}: .*{problem}"):
        connect(Peer("http://127.0.0.1:1", TOKEN), "/ws", 5)
    listener.close()


def test_a_proxy_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "127.0.0.1:9")
    for call in (connect, cachix_connection.http):
        arguments = ("/ws", 5) if call is connect else ("GET", "/x", 5)
        with pytest.raises(Unreachable, match="by the proxy http://127.0.0.1:9: .*refused"):
            call(Peer(URL, TOKEN), *arguments)  # type: ignore[operator]


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
@pytest.mark.parametrize("name", ["127.0.0.1", "::1", "localhost"])
def test_who_looks_up_the_name_of_a_socks_proxy(
    monkeypatch: pytest.MonkeyPatch,
    peer: Workspace,
    make_socks: Callable[..., SocksProxy],
    scheme: str,
    name: str,
) -> None:
    socks = make_socks()
    monkeypatch.setenv("http_proxy", f"{scheme}://127.0.0.1:{socks.port}")
    host = f"[{name}]" if ":" in name else name
    cachix_connection.reach(Peer(f"http://{host}:{peer.port}", TOKEN, "web"), 5)
    assert cachix_connection.http(Peer(f"http://{host}:{peer.port}", TOKEN), "GET", "/x").status
    is_sent = name != "localhost" or scheme == "socks5h"
    assert set(socks.asked) <= ({name} if is_sent else {"127.0.0.1", "::1"})


@pytest.mark.parametrize(
    ("credentials", "port", "problem"),
    [
        ("", 0, "it wants credentials: give them in its URL"),
        ("joe:wrong@", 0, "it refused the credentials in its URL"),
        ("joe:secret@", 1, "it can't connect to 127.0.0.1:1: connection refused"),
    ],
)
def test_a_socks_proxy_that_refuses(
    monkeypatch: pytest.MonkeyPatch,
    peer: Workspace,
    make_socks: Callable[..., SocksProxy],
    credentials: str,
    port: int,
    problem: str,
) -> None:
    socks = make_socks("joe:secret")
    monkeypatch.setenv("http_proxy", f"socks5://{credentials}127.0.0.1:{socks.port}")
    workspace = Peer(f"http://127.0.0.1:{port or peer.port}", TOKEN, "web")
    expected = f"by the proxy socks5://127.0.0.1:{socks.port}: {problem}"
    with pytest.raises(Unreachable, match=expected):
        connect(workspace, "/ws", 5)
    with pytest.raises(Unreachable, match=expected):
        cachix_connection.http(workspace, "GET", "/x", 5)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_speaks_tls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, peer: Workspace, scheme: str
) -> None:
    certificate = Certificate(tmp_path / "tls", "127.0.0.1")
    proxy = Proxy(context=certificate.context())
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    monkeypatch.setenv("all_proxy", f"https://127.0.0.1:{proxy.port}")
    listener, url = certificate.serve(peer.port)
    workspace = Peer(url if scheme == "https" else peer.url, TOKEN, "web")
    cachix_connection.load(workspace)
    cachix_connection.reach(workspace, 5)
    if scheme == "https" and urllib3.__version__.startswith("1."):
        pytest.skip("this urllib3 has no TLS in TLS that works: 2.0 or newer is needed")
    assert cachix_connection.http(workspace, "GET", "/x", 5).status == 404
    assert proxy.asked == [f"CONNECT {workspace.host.partition('//')[2]}"] * 2
    listener.close()
    proxy.close()
