"""Requests that come slowly, answers that are taken slowly: they cost no thread, and end."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import requests
from workspace_support import DEADLINE, Connection, Peer, Server, running, wait_for

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


def threads_of(server: Server) -> int:
    """The threads of the server's worker."""
    parent = server.process.pid
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            return int(fields[17])
    raise AssertionError("there is no worker")


def test_a_hundred_heads_that_drip_hold_up_nothing() -> None:
    with running() as server:
        peer = Peer(server)
        assert peer.http("GET", "/").status_code == 200
        before = threads_of(server)
        dripping = [Connection(server.port) for _ in range(100)]
        for _ in range(3):
            for connection in dripping:
                connection.send(HEAD if _ == 0 else b"X")
            assert peer.http("GET", "/").status_code == 200
        assert threads_of(server) <= before + 3
        dripping[0].send(b": y\r\n\r\n")  # a head that becomes whole is answered
        assert dripping[0].read_head().startswith("HTTP/1.1 200")


def test_a_head_has_a_deadline_whatever_drips() -> None:
    with running(receive_timeout=1.0) as server:
        connection, began = Connection(server.port), time.monotonic()
        connection.send(HEAD)
        with pytest.raises((EOFError, OSError)):
            while time.monotonic() < began + DEADLINE:
                connection.send(b"X")
                time.sleep(0.2)
                connection.socket.setblocking(False)
                try:
                    if not connection.socket.recv(100):
                        raise EOFError
                except BlockingIOError:
                    connection.socket.setblocking(True)


@pytest.mark.parametrize("start", [b"\x16\x03\x01\x02\x00", b"\0", b"\xff" * 9, b"{}"])
def test_bytes_that_begin_no_request_are_answered_at_once(start: bytes) -> None:
    """Such as a handshake of TLS, to a server that speaks none."""
    with running() as server:
        connection = Connection(server.port)
        connection.send(start)  # and nothing more
        assert connection.read_head().startswith("HTTP/1.1 400")


def test_a_head_has_a_limit() -> None:
    with running() as server:
        connection = Connection(server.port)
        connection.send(HEAD + b"".join(b"X%d: %s\r\n" % (n, b"a" * 4000) for n in range(60)))
        assert connection.read_head().startswith("HTTP/1.1 431")


@pytest.mark.long
def test_requests_that_are_not_whole_have_a_limit_together() -> None:
    with running("--max-per-address=0") as server:
        peer = Peer(server)
        heads = [Connection(server.port) for _ in range(500)]
        filled = HEAD + b"".join(b"X%d: %s\r\n" % (n, b"a" * 4000) for n in range(37))
        lost = 0
        for connection in heads:
            try:
                connection.send(filled)
            except OSError:
                lost += 1
        lost += sum(is_over(connection) for connection in heads)
        assert 40 <= lost <= 80, lost  # 452 of them have 64 MiB
        assert peer.http("GET", "/").status_code == 200
        for connection in heads:
            connection.close()
        again = Connection(server.port)
        again.send(filled + b"\r\n")
        assert again.read_head().startswith("HTTP/1.1 200")


def is_over(connection: Connection) -> bool:
    """Whether the server has hung up."""
    connection.socket.settimeout(0.01)
    try:
        return connection.socket.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_the_oldest_of_an_address_goes_that_has_shown_no_token() -> None:
    with running("--max-per-address=3") as server:
        peer = Peer(server)
        session = requests.Session()
        url = f"{server.url}/api/v1/deploy/cache"
        bearer = {"Authorization": f"Bearer {peer.ci_token}"}
        assert session.get(url, headers=bearer, timeout=DEADLINE).status_code == 404
        known = next(iter(session.adapters["http://"].poolmanager.pools._container.values()))
        silent = []
        for _ in range(3):
            silent.append(Connection(server.port))
            silent[-1].send(HEAD)
        time.sleep(2.5)  # they are not young any more
        newer = Connection(server.port)
        newer.send(HEAD)
        silent[0].socket.settimeout(DEADLINE)
        assert silent[0].socket.recv(1) == b"", "the oldest stayed"
        for connection in [*silent[1:], newer]:
            connection.send(b"\r\n")
            assert connection.read_head().startswith("HTTP/1.1 200")
        assert session.get(url, headers=bearer, timeout=DEADLINE).status_code == 404
        assert known.num_connections == 1, "the connection with a token was hung up on"


def test_requests_may_follow_each_other_without_a_pause() -> None:
    with running() as server:
        connection = Connection(server.port)
        connection.send((HEAD + b"\r\n") * 5)
        for _ in range(5):
            head = connection.read_head()
            assert head.startswith("HTTP/1.1 200")
            assert connection.read_body(head)


@pytest.mark.long
def test_a_large_file_is_sent_whole_to_those_who_take_their_time() -> None:
    """Also to forty of them at once, while there are 24 threads for requests."""
    with running() as server:
        server.command("cache", "create", "main")
        peer = Peer(server)
        content = os.urandom(1 << 20) * 8
        path = f"/cache/main/nar/{'1' * 52}.nar"
        nar = server.data / "cache/main/nar"
        nar.mkdir(parents=True, exist_ok=True)
        (nar / f"{'1' * 52}.nar").write_bytes(content)
        assert peer.http("GET", path).content == content
        results = []

        def download(connection: Connection) -> None:
            head = connection.read_head()
            results.append(connection.read_body(head) == content)

        slow = []
        for _ in range(40):
            connection = Connection(server.port)
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            connection.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            slow.append(connection)
        wait_for(lambda: peer.http("GET", "/").status_code == 200)
        readers = [threading.Thread(target=download, args=(each,)) for each in slow]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(3 * DEADLINE)
        assert results == [True] * 40
        for connection in slow:  # and then they may ask for more
            connection.send(HEAD + b"\r\n")
            assert connection.read_head().startswith("HTTP/1.1 200")


def test_a_body_that_was_not_read_ends_the_connection() -> None:
    with running() as server:
        connection = Connection(server.port)
        head = (
            b"POST /api/v2/deploy/activate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        )
        connection.send(head + b"x" * 1000)
        answer = connection.read_head()
        assert answer.startswith("HTTP/1.1 401") and b"error" in connection.read_body(answer)
        with pytest.raises((EOFError, ConnectionError)):
            connection.read(1)
