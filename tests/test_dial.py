"""How connections are opened: addresses, deadlines, TLS."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import certifi
import pytest
from caches import Cache
from closures import nixos, plain
from hosts import PROJECT, Host, Program, command, wait_until
from live import Workspace as Live
from machines import Machine
from peer import Peer as Workspace
from servers import Certificate, Proxy, deaf_port, drip, listen

import cachix_connection
import cachix_dial
from cachix_connection import Peer, ca_bundle, connect, within
from cachix_dial import Dialer
from cachix_protocol import Unreachable

TOKEN = "peer-agent-token"
WAITS = {"backoff": 0.05, "slowest": 0.2}
HAS_IPV6 = Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text() != ""
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6, not even ::1")
CALLS = {
    "websocket": connect,
    "request": lambda peer, path, timeout: cachix_connection.http(peer, "GET", path, timeout),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies and no certificates from the environment of the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cachix_dial, "_latest", (None, None))


def start(host: Host, url: str, waits: dict[str, float] = {}, **env: str) -> Program:  # noqa: B006
    waits_json = json.dumps({**WAITS, **waits})
    return host.agent("web", url, TOKEN, env={"CACHIX_DEPLOY_WAITS": waits_json, **env})


# --- addresses ------------------------------------------------------------------------------------


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let every name have these addresses, in this order."""

    def set_addresses(*addresses: str) -> None:
        def look_up(host: bytes, port: int, *_: Any, **__: Any) -> list[Any]:
            families = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in addresses]
            kind = (socket.SOCK_STREAM, 6, "")
            return [(*[family, *kind], (one, port)) for family, one in zip(families, addresses)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return set_addresses


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("6", "6"),
        ("64", "64"),
        ("46", "46"),
        ("6644", "6464"),
        ("666444", "646464"),
        ("4466", "4646"),
        ("66664", "64666"),
        ("", ""),
    ],
)
def test_families_take_turns(order: str, expected: str) -> None:
    numbered = [(digit, number) for number, digit in enumerate(order)]
    ordered = cachix_dial._interleave(numbered)
    assert "".join(digit for digit, _ in ordered) == expected
    for digit in "46":
        numbers = [number for family, number in ordered if family == digit]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("dead", ["drops", "refuses"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_dead_address_does_not_hide_a_living_one(
    peer: Workspace,
    addresses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    dead: str,
    count: int,
) -> None:
    names = [f"127.0.0.{number}" for number in range(2, 2 + count)]
    addresses(*names, "127.0.0.1", "127.0.0.9")
    with contextlib.ExitStack() as stack:
        if dead == "drops":
            for name in names:
                stack.enter_context(deaf_port(name, peer.port))
        else:  # a refusal is not waited for
            monkeypatch.setattr(cachix_dial, "STAGGER", 30.0)
        began = time.monotonic()
        result = CALLS[how](Peer(f"http://deploy.test:{peer.port}", TOKEN, "web"), "/ws", 60)
        duration = time.monotonic() - began
    assert result is not None and duration < 20
    assert f"Host: deploy.test:{peer.port}" in peer.heads()[-1]


@pytest.mark.parametrize("how", CALLS)
def test_the_addresses_that_have_failed_are_named(addresses: Callable[..., None], how: str) -> None:
    addresses("127.0.0.2", "127.0.0.3")
    reasons = "127.0.0.2: Connection refused, 127.0.0.3: Connection refused$"
    with pytest.raises(Unreachable, match=reasons):
        CALLS[how](Peer("http://deploy.test:9", TOKEN, "web"), "/ws", 5)


@pytest.mark.promise(10)
@pytest.mark.parametrize("how", CALLS)
def test_addresses_that_are_all_dead_have_one_deadline(
    addresses: Callable[..., None], how: str
) -> None:
    addresses("127.0.0.2", "127.0.0.3")
    with deaf_port("127.0.0.2") as port, deaf_port("127.0.0.3", port):
        began = time.monotonic()
        reason = "no answer within 4 s while connecting to 127.0.0.2, 127.0.0.3"
        with pytest.raises(Unreachable, match=reason):
            CALLS[how](Peer(f"http://deploy.test:{port}", TOKEN, "web"), "/ws", 4.0)
        assert time.monotonic() - began < 7.5


def test_losers_are_closed(peer: Workspace, addresses: Callable[..., None]) -> None:
    addresses("127.0.0.2", "127.0.0.3", "127.0.0.1")
    before = len(os.listdir("/proc/self/fd"))
    with deaf_port("127.0.0.2", peer.port), deaf_port("127.0.0.3", peer.port):
        Dialer(5).dial("deploy.test", peer.port).close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, 5, "the end of all sockets")


def test_a_connection_is_kept_alive(peer: Workspace) -> None:
    sock = Dialer(5).dial("localhost", peer.port)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
    sock.close()


@needs_ipv6
@pytest.mark.parametrize("dead", ["drops", "refuses"])
def test_an_agent_whose_first_address_is_dead(
    host: Host, cache: Cache, peer: Workspace, dead: str
) -> None:
    """The name has an IPv6 address that does not answer, and an IPv4 address that does."""
    file = host.directory / "hosts"
    file.write_text("127.0.0.1 localhost\n::1 deploy.test\n127.0.0.1 deploy.test\n")
    host.output("mount", "--bind", str(file), "/etc/hosts")
    peer.reports, peer.cache = "http", cache.wire()
    with deaf_port("::1", peer.port) if dead == "drops" else contextlib.nullcontext():
        agent = start(host, f"http://deploy.test:{peer.port}", {"connect": 5.0, "call": 5.0})
        assert peer.finished(peer.deploy(plain(cache, 1)), 30), agent.text()
        assert "no connection" not in agent.text() and "not reported" not in agent.text()
        assert agent.stop() == 0


@needs_ipv6
@pytest.mark.long
def test_a_workspace_at_an_ipv6_literal(host: Host, tmp_path: Path, name: str) -> None:
    """Its cache is private, and has a key that Nix takes."""
    workspace = Live(tmp_path / "workspace")
    try:
        workspace.serve(listen="[::1]:0")
        workspace.cache(private=True)
        assert workspace.url.startswith("http://[::1]:")
        machine = Machine(host, workspace, name, env={"CACHIX_DEPLOY_WAITS": json.dumps(WAITS)})
        outcome = machine.deploy(nixos(machine.files, name))
        assert outcome.status == "Succeeded", outcome
    finally:
        workspace.kill()


def test_a_workspace_whose_name_is_not_ascii(host: Host, live: Live, name: str) -> None:
    file = host.directory / "hosts"
    file.write_text("127.0.0.1 localhost xn--bcher-kva.example.test\n")
    host.output("mount", "--bind", str(file), "/etc/hosts")
    path = plain(live.files, name)
    live.push(path)
    url = live.url.replace("127.0.0.1", "b\u00fccher.example.test")
    agent = host.agent(name, url, live.token("agent"))
    agent.wait_for(f"{name} is connected to http://xn--bcher-kva.example.test:")
    assert live.wait(live.deploy(name, path)) == "Succeeded"


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("http://bücher.example", "http://xn--bcher-kva.example"),
        ("http://BÜCHER.example:8080/böse/", "http://xn--bcher-kva.example:8080/b%C3%B6se"),
        ("bücher.example", "https://xn--bcher-kva.example"),
        ("http://xn--bcher-kva.example", "http://xn--bcher-kva.example"),
        ("http://bücher.example:1", "http://xn--bcher-kva.example:1"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://例え.テスト", "http://xn--r8jz45g.xn--zckzah"),
    ],
)
def test_a_host_goes_over_the_wire_in_ascii(host: str, url: str) -> None:
    assert Peer.create(host, TOKEN).host == url


@pytest.mark.parametrize("host", ["http://b\u00fc..example", "http://\u2024", "http://-\u00fc-"])
def test_a_host_that_has_no_form_in_ascii(host: str) -> None:
    with pytest.raises(cachix_connection.UsageError, match="--host"):
        Peer.create(host, TOKEN)


# --- deadlines for a whole call, not for each packet ----------------------------------------------


@pytest.fixture
def trickle() -> Iterator[str]:
    """A server that answers a byte every 50 ms, and never ends; its URL."""
    ended = threading.Event()

    def answer(connection: Any) -> None:
        while not ended.wait(0.05):
            connection.sendall(b"H")

    listener, url = listen(answer)
    yield url
    ended.set()
    listener.close()


def call_threads() -> list[threading.Thread]:
    """Return the threads of calls that go on."""
    return [thread for thread in threading.enumerate() if thread.name == "call"]


@pytest.mark.promise(10)
@pytest.mark.parametrize("proxied", [False, True])
@pytest.mark.parametrize("how", CALLS)
def test_an_answer_that_trickles_has_a_deadline(
    trickle: str, monkeypatch: pytest.MonkeyPatch, how: str, proxied: bool
) -> None:
    if proxied:
        monkeypatch.setenv("http_proxy", trickle)
    peer = Peer("http://example.invalid" if proxied else trickle, "token", "web")
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no answer within 1 s while waiting for the "):
        CALLS[how](peer, "/ws", 1.0)
    assert time.monotonic() - began < 20
    wait_until(lambda: not call_threads(), 2, "the end of the call's thread")


@pytest.mark.promise(10)
@pytest.mark.parametrize("how", CALLS)
def test_a_body_that_trickles_ends_with_its_call(how: str) -> None:
    head = b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n"
    listener, url = listen(drip(head + b"x" * 100000, 0.01))
    # older releases of websocket-client do not read the body
    with pytest.raises(Unreachable, match="no answer within 1 s|HTTP 500 instead"):
        CALLS[how](Peer(url, "token", "web"), "/ws", 1.0)
    wait_until(lambda: not call_threads(), 2, "the end of the call's thread")
    listener.close()


def test_a_call_returns_or_raises_what_its_function_does() -> None:
    assert within(5, lambda: None) is None and within(5, lambda: 7) == 7
    with pytest.raises(KeyError, match="mistake"):
        within(5, lambda: {}["mistake"])


def test_a_late_call_is_cancelled() -> None:
    cancelled, release = [], threading.Event()
    with pytest.raises(Unreachable, match="no answer within 0 s"):
        within(0.05, lambda: release.wait(5), lambda: cancelled.append(1))
    assert cancelled == [1]
    release.set()


@pytest.mark.promise(10)
@pytest.mark.parametrize("how", CALLS)
def test_a_late_look_up_is_not_followed_by_a_connection(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    accepted: list[Any] = []
    listener, url = listen(accepted.append)
    look_up = socket.getaddrinfo

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    with pytest.raises(Unreachable, match="no answer within 0 s while looking up 127.0.0.1"):
        CALLS[how](Peer(url, "token", "web"), "/ws", 0.2)
    wait_until(lambda: not call_threads(), 2, "the end of the look-up")
    time.sleep(0.1)
    assert accepted == []
    listener.close()


def test_a_dialer_that_has_hung_up_opens_nothing(peer: Workspace) -> None:
    dialer = Dialer(5)
    sock = dialer.open(peer.url)
    dialer.hang_up()
    assert sock.recv(1) == b""
    with pytest.raises(TimeoutError):
        dialer.open(peer.url)
    sock.close()


@pytest.mark.promise(10)
def test_reaching_has_a_deadline_even_if_frames_trickle(peer: Workspace) -> None:
    peer.misbehave("/ws-deployment", "no-pong")
    done = threading.Event()

    def feed() -> None:
        connection = peer.connection("/ws-deployment")
        with contextlib.suppress(Exception):
            for byte in itertools.cycle(b"\x8a\x7e\xff\xff" + bytes(1000)):
                connection.raw(bytes([byte]))
                if done.wait(0.05):
                    return

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    began = time.monotonic()
    with pytest.raises(Unreachable):
        cachix_connection.reach(Peer(peer.url, TOKEN, "web"), 1.0)
    assert time.monotonic() - began < 20
    done.set()
    thread.join()


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate(tmp_path / "tls", "127.0.0.1")


@pytest.fixture
def secured(peer: Workspace, certificate: Certificate) -> Iterator[str]:
    """The peer behind TLS: its URL."""
    listener, url = certificate.serve(peer.port)
    yield url
    listener.close()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_tls_with_the_bundle_of_the_environment(
    host: Host,
    cache: Cache,
    peer: Workspace,
    secured: str,
    certificate: Certificate,
    variable: str,
) -> None:
    """For the agent's websocket, its reports, and the reachability check of the switch process."""
    peer.reports, peer.cache = "http", cache.wire()
    agent = start(host, secured, **{variable: str(certificate.public)})
    assert peer.finished(peer.deploy(plain(cache, 1))), agent.text()
    assert peer.heads("/ws-deployment") and len(peer.heads("/ws")) == 1


def test_tls_through_a_proxy(
    host: Host, cache: Cache, peer: Workspace, secured: str, certificate: Certificate
) -> None:
    proxy = Proxy()
    peer.reports, peer.cache = "http", cache.wire()
    https_proxy = f"http://127.0.0.1:{proxy.port}"
    start(host, secured, https_proxy=https_proxy, SSL_CERT_FILE=str(certificate.public))
    assert peer.finished(peer.deploy(plain(cache, 1)))
    assert set(proxy.asked) == {f"CONNECT {secured[8:]}"} and len(proxy.asked) >= 3
    proxy.close()


def test_the_authorities_are_read_once(
    tmp_path: Path, secured: str, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read again if the file changes; if it is gone those count that were read before."""
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(certificate.public.read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    context = cachix_dial.tls_context()
    assert cachix_dial.tls_context() is context
    Certificate(tmp_path / "other", "127.0.0.1").public.replace(bundle)
    assert cachix_dial.tls_context() is not context
    with pytest.raises(Unreachable, match="certificate verify failed"):
        connect(Peer(secured, TOKEN, "web"), "/ws", 5)
    bundle.write_bytes(certificate.public.read_bytes())
    connect(Peer(secured, TOKEN, "web"), "/ws", 5).shutdown()
    bundle.unlink()
    connect(Peer(secured, TOKEN, "web"), "/ws", 5).shutdown()


def test_authorities_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    listener, url = listen(lambda connection: None)
    with pytest.raises(Unreachable, match=f"the authorities in {bundle} can't be read"):
        connect(Peer(url.replace("http:", "https:"), TOKEN), "/ws", 5)
    listener.close()


LOOK = """
import builtins, os, sys
import cachix_switch
host, token, bundle = sys.argv[1:]
look = cachix_switch.load_reach({"host": host, "token": token, "name": "web"})
os.unlink(bundle)
sys.path.clear(), sys.meta_path.clear(), sys.path_importer_cache.clear()
def refuse(*arguments, **options):
    raise OSError(f"files are gone: {arguments}")
builtins.open = os.open = refuse
for _ in range(2):
    look(5.0)
print("reached")
"""


@pytest.mark.promise(3)
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("proxied", ["directly", "no_proxy", "http", "https", "socks5h"])
def test_the_switch_process_needs_no_file_for_a_look(
    tmp_path: Path,
    peer: Workspace,
    secured: str,
    certificate: Certificate,
    scheme: str,
    proxied: str,
) -> None:
    """An activation may remove every file of the program, and that of the authorities."""
    from servers import SocksProxy

    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(certificate.public.read_bytes())
    env = {"PATH": os.environ["PATH"], "SSL_CERT_FILE": str(bundle)}
    proxy: Any = None
    if proxied in ("http", "https"):
        proxy = Proxy("joe:secret", certificate.context() if proxied == "https" else None)
        env["ALL_PROXY"] = f"{proxied}://joe:secret@127.0.0.1:{proxy.port}"
    elif proxied == "socks5h":
        proxy = SocksProxy()
        env["ALL_PROXY"] = f"{proxied}://127.0.0.1:{proxy.port}"
    elif proxied == "no_proxy":
        env |= {"ALL_PROXY": "127.0.0.1:9", "no_proxy": "bücher.test,10.0.0.0/8,127.0.0.0/8"}
    argv = [sys.executable, "-c", LOOK, peer.url if scheme == "http" else secured, TOKEN, bundle]
    result = subprocess.run(
        argv, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == "reached\n", result.stderr
    if proxy is not None:
        assert len(proxy.asked) == 2
        proxy.close()


@pytest.mark.parametrize(
    ("given", "system", "expected"),
    [
        ("SNR", "1", "S"),
        ("NR", "1", "N"),
        ("R", "1", "R"),
        ("", "12", "1"),
        ("", "2", "2"),
        ("", "", None),
        ("sN", "1", "N"),
        ("snr", "1", "1"),
        ("snr", "", None),
    ],
)
def test_which_bundle_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    system: str,
    expected: str,
) -> None:
    """Capital letters name variables with a file, small ones variables whose file is missing."""
    names = {"S": "SSL_CERT_FILE", "N": "NIX_SSL_CERT_FILE", "R": "REQUESTS_CA_BUNDLE"}
    for letter, variable in names.items():
        (tmp_path / letter).write_text("")
        monkeypatch.delenv(variable, raising=False)
        if letter in given.upper():
            monkeypatch.setenv(variable, str(tmp_path / (letter if letter in given else "missing")))
    for letter in system:
        (tmp_path / letter).write_text("")
    bundles = (str(tmp_path / "1"), str(tmp_path / "2"))
    monkeypatch.setattr(cachix_dial, "SYSTEM_BUNDLES", bundles)
    monkeypatch.setattr(cachix_dial, "_kept", ("", ""))  # by a test before this one
    assert ca_bundle() == (certifi.where() if expected is None else str(tmp_path / expected))


def test_activate_with_a_dead_first_address(host: Host, peer: Workspace) -> None:
    """The order is given: 127.0.0.2 drops, 127.0.0.1 answers."""
    identity = "11111111-2222-4333-8444-555555555555"
    answer = {"agents": {"web": {"id": identity, "url": f"{peer.url}/1"}}}
    peer.answer("^POST /api/v2/deploy/activate", lambda request: (200, answer))
    file = host.directory / "hosts"
    file.write_text("127.0.0.1 localhost\n127.0.0.2 deploy.test\n127.0.0.1 deploy.test\n")
    host.output("mount", "--bind", str(file), "/etc/hosts")
    spec = host.directory / "deploy.json"
    spec.write_text('{"agents": {"web": "/nix/store/00000000000000000000000000000000-x"}}')
    argv = [*command("cachix-deploy"), "--host", f"http://deploy.test:{peer.port}"]
    with deaf_port("127.0.0.2", peer.port):
        env = {"CACHIX_ACTIVATE_TOKEN": TOKEN}
        result = host.run([*argv, "activate", str(spec), "--async"], env=env)
    assert result.returncode == 0 and re.search("^web +http", result.stdout, re.M), result.stderr
