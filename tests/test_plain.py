"""Workspaces that are reached without encryption."""

import socket
import threading

import pytest

import cachix_plain
from cachix_protocol import UsageError

pytestmark = pytest.mark.promise(11)


def resolve(monkeypatch, *addresses):
    """Let every name have these addresses; without any, the name server knows none."""

    def look_up(name, port):
        if not addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.parametrize(
    ("host", "addresses", "plain"),
    [
        ("https://deploy.example.org", ["203.0.113.1"], False),
        ("http://deploy.example.org", ["203.0.113.1"], True),
        ("http://deploy.example.org:8080/x", ["127.0.0.1", "203.0.113.1"], True),
        ("http://localhost:8080", ["127.0.0.1", "::1"], False),
        ("http://workspace.test", ["127.0.3.4"], False),
        ("http://deploy.example.org", [], True),
        ("http://10.0.0.1", ["10.0.0.1"], True),
        ("http://[::1]:8080", ["::1"], False),
        ("http://[fe80::1%25eth0]", ["fe80::1%eth0"], True),
        ("http://127.0.0.1.example.org", ["203.0.113.1"], True),
    ],
)
@pytest.mark.parametrize("by", ["nothing", "option", "variable"])
def test_plain_http_to_another_machine(monkeypatch, capsys, host, addresses, plain, by):
    resolve(monkeypatch, *addresses)
    monkeypatch.setenv("CACHIX_DEPLOY_REQUIRE_TLS", "1" if by == "variable" else "0")
    if plain and by != "nothing":
        with pytest.raises(UsageError, match=r"is plain http: .* --require-tls forbids that"):
            cachix_plain.check(host, by == "option")
        return
    cachix_plain.check(host, by == "option")
    for thread in threading.enumerate():
        if thread.name == "plain":
            thread.join(10)
    assert ("is plain http" in capsys.readouterr().err) == plain


def test_a_name_server_that_hangs_does_not_hold_up_the_start(monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: hang.wait(60) and [])
    monkeypatch.setattr(cachix_plain, "LOOK_UP", 0.1)
    assert not cachix_plain.is_this_machine("http://deploy.example.org")
    hang.set()
