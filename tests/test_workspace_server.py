"""Tasks that the server libraries leave to us: ends, slots, stalled peers, crashes."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from workspace_support import (
    DEADLINE,
    OURS,
    PING,
    PONG,
    STORE_PATHS,
    TEXT,
    Connection,
    Peer,
    command,
    handshake,
    open_socket,
    running,
    wait_for,
)

from cachix_workspace.settings import Settings


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_sockets_are_closed_before_a_restart(number: int) -> None:
    with running() as server:
        peer = Peer(server)
        agent = peer.registered("web")
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        connections = [
            agent,
            peer.agent("web", "/ws-deployment"),
            peer.agent("web", f"/api/v1/deploy/log/{deployment}"),
            peer.view(deployment),
        ]
        silent = Connection(server.port)  # sends nothing
        server.process.send_signal(number)
        assert [connection.expect_close(3) for connection in connections] == [1012] * 4
        assert server.process.wait(DEADLINE) == 0
        silent.close()


def test_a_silent_peer_does_not_delay_the_end() -> None:
    with running() as server:
        peer = Peer(server)
        peer.registered("web")
        assert server.stop() == 0


def test_a_handler_that_fails_closes_with_1011(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from cachix_workspace import report_sockets, server
from cachix_workspace.settings import Settings
def fail(*_): raise RuntimeError("on purpose")
report_sockets.ReportHandler.enter = fail
listener = server.bind("127.0.0.1:0")
sys.exit(server.serve(Settings(Path(sys.argv[1])), listener))
"""
    with running() as server:
        server.kill()
        server.argv = [sys.executable, "-c", program, str(server.data)]
        server.start()
        connection = Peer(server).agent("web", "/ws-deployment")
        assert connection.expect_close() == 1011
        with pytest.raises(EOFError) as end:
            connection.read(1)
        assert end.value.args == (b"",), "something was written after the close"
        assert wait_for(lambda: any("on purpose" in line for line in server.lines[1:]))


def test_the_rest_of_the_slots_is_for_plain_requests() -> None:
    with running("--max-connections=8") as server:
        peer = Peer(server)
        connections = [peer.registered(f"web-{number}") for number in range(6)]
        refused = Connection(server.port)
        refused.send(handshake("/ws", peer.agent_token, name="web-6"))
        head = refused.read_head()
        assert head.startswith("HTTP/1.1 503") and "Retry-After" in head
        assert peer.http("GET", "/").status_code == 200
        connections.pop().close()
        wait_for(lambda: _registers(peer, "web-7"))


HINT = "set LimitNOFILE= of its service, or `ulimit -n`"
NO_ROOM = (
    "2048 open files are allowed, so that it has at most 1024 connections at a time; "
    f"for 16000 allow 17280: {HINT}"
)
TOO_MANY = (
    f"warning: only 4096 open files are allowed, and --max-connections=5000 may need 6280: {HINT}"
)


@pytest.mark.parametrize(
    ("files", "options", "sentence"),
    [
        (2048, (), NO_ROOM),
        (4096, ("--max-connections=5000",), TOO_MANY),
        (4096, ("--max-connections=1000",), ""),
    ],
)
def test_open_files_are_told_that_are_too_few(
    files: int, options: tuple[str, ...], sentence: str
) -> None:
    with running(*options) as server:
        server.kill()
        server.lines.clear()
        server.argv = ["prlimit", f"--nofile=512:{files}", *server.argv]
        server.start()
        assert [line for line in server.lines if "open files" in line] == (
            [sentence] if sentence else []
        )
        assert Peer(server).http("GET", "/").status_code == 200


def test_the_sockets_of_one_token_are_limited() -> None:
    """Whatever kind of socket they are; other tokens have their own."""
    with running(max_sockets=5, max_sockets_of_one=2) as server:
        peer = Peer(server)
        connections = [peer.registered("web"), peer.registered("db")]
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        connections.append(peer.agent("web", "/ws-deployment"))
        connections += [peer.agent("web", f"/api/v1/deploy/log/{deployment}") for _ in range(2)]
        for path in ("/ws", "/ws-deployment", f"/api/v1/deploy/log/{deployment}"):
            assert "5 websockets already" in _refused(peer, path, peer.agent_token, "web")
        one = server.command("token", "create", "agent", "--name=web").strip()
        for _ in range(2):
            connections.append(open_socket(server, "/ws-deployment", one, name="web"))
        assert "2 websockets already" in _refused(peer, "/ws-deployment", one, "web")
        viewers = [peer.view(deployment) for _ in range(5)]
        view = f"/api/v1/deploy/log/{deployment}?view=true"
        assert "5 websockets already" in _refused(peer, view, peer.ci_token)
        assert peer.http("GET", "/").status_code == 200
        viewers.pop().close()
        wait_for(lambda: _views(peer, deployment))


def _refused(peer: Peer, path: str, token: str, name: str = "") -> str:
    """The sentence of an answer with 429."""
    refused = Connection(peer.server.port)
    refused.send(handshake(path, token, name=name))
    head = refused.read_head()
    assert head.startswith("HTTP/1.1 429"), head
    return refused.read_body(head).decode()


def _views(peer: Peer, deployment: str) -> bool:
    try:
        peer.view(deployment)
        return True
    except AssertionError:
        return False


def _registers(peer: Peer, name: str) -> bool:
    try:
        peer.registered(name)
        return True
    except AssertionError:
        return False


def test_no_compression_is_agreed_to() -> None:
    with running() as server:
        peer = Peer(server)
        connection = Connection(server.port)
        offer = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
        connection.send(handshake("/ws", peer.agent_token, name="web", **offer))
        assert "extensions" not in connection.read_head().lower()
        assert connection.expect_text()["method"] == "AgentRegistered"


def test_frames_of_several_threads_stay_whole() -> None:
    """A viewer that pings while it is sent lines: pongs come from another thread than the lines."""
    with running() as server:
        peer = Peer(server)
        peer.registered("web")
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        viewer = peer.view(deployment)
        pings, lines = 900, 20_000  # more pings would end it

        def ping() -> None:
            for number in range(pings):
                viewer.send_frame(PING, b"%d" % number * 20)

        thread = threading.Thread(target=ping)
        thread.start()
        for first in range(0, lines, 2000):
            batch = [f"{first + number} " + "x" * 200 for number in range(2000)]
            peer.log("web", deployment, first, batch)
        seen, pongs = 0, 0
        while seen < lines or pongs < pings:
            opcode, payload = viewer.next_frame()
            if opcode == TEXT:
                assert json.loads(payload)["line"].split()[0] == str(seen)
                seen += 1
            else:
                assert opcode == PONG and payload == b"%d" % pongs * 20
                pongs += 1
        thread.join(DEADLINE)


def test_a_peer_that_does_not_answer_pings_is_closed() -> None:
    with running(ping_interval=0.3) as server:
        connection = Peer(server).registered("web")
        assert connection.expect_close() == 1008


@pytest.mark.slow
def test_a_stalled_reader_is_disconnected() -> None:
    with running(send_timeout=1) as server:
        peer = Peer(server)
        peer.registered("web")
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        viewer = Connection(server.port)
        viewer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        viewer.send(handshake(f"/api/v1/deploy/log/{deployment}?view=true", peer.ci_token))
        viewer.read_head()
        for first in range(0, 40):
            peer.log("web", deployment, first, ["x" * 400_000])
        wait_for(lambda: not _is_established(server.port, viewer.socket.getsockname()[1]))
        assert len(peer.lines(deployment)) == 40


def _is_established(server_port: int, peer_port: int) -> bool:
    """Whether the server's side of a connection is open (state 1 of the kernel's table)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [
        row[3]
        for row in rows
        if row[1].endswith(f":{server_port:04X}") and row[2].endswith(f":{peer_port:04X}")
    ]
    return mine == ["01"]


@pytest.mark.slow
def test_a_stalled_sender_is_disconnected() -> None:
    with running(receive_timeout=1) as server:
        peer = Peer(server)
        stalled = Connection(server.port)
        stalled.send(
            b"POST /api/v2/deploy/activate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
            b"Authorization: Bearer " + peer.ci_token.encode() + b"\r\n\r\n{"
        )
        assert stalled.read_head().startswith("HTTP/1.1 400")


def test_reports_and_orders_are_quick() -> None:
    with running() as server:
        peer = Peer(server)
        session = requests.Session()
        session.headers.update({"Authorization": f"Bearer {peer.agent_token}", "name": "web"})
        agent = peer.registered("web")
        orders, reports = [], []
        for number in range(30):
            began = time.monotonic()
            deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
            assert agent.expect_text()["command"]["contents"]["id"] == deployment
            orders.append(time.monotonic() - began)
            for status in ("InProgress", "Succeeded"):
                began = time.monotonic()
                body = {
                    "status": status,
                    "time": "2026-11-24T01:02:03Z",
                    "closureSize": number,
                    "reason": None,
                }
                url = f"{server.url}/api/v1/deploy/deployment/{deployment}/status"
                assert session.put(url, json=body, timeout=DEADLINE).status_code == 200
                reports.append(time.monotonic() - began)
        best = [sorted(times)[2] * 1000 for times in (orders, reports)]  # whatever runs beside
        print(f"activate to frame {best[0]:.1f} ms, report {best[1]:.1f} ms")
        assert best[0] < 50 and best[1] < 50  # ten times what a quiet machine needs


# --- crashes --------------------------------------------------------------------------------------


def test_kill_9_during_uploads_and_log_writes_loses_nothing() -> None:
    with running() as server:
        server.command("cache", "create", "mycache")
        peer = Peer(server)
        peer.registered("web")
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        assert peer.report("web", deployment, "InProgress").status_code == 200
        acknowledged = [0]
        stop = threading.Event()

        def write_log() -> None:
            while not stop.is_set():
                first = acknowledged[0]
                batch = [f"line {first + number}" for number in range(500)]
                try:
                    answer = peer.log("web", deployment, first, batch)
                    acknowledged[0] = answer.json()["next"]
                except requests.RequestException:
                    return

        thread = threading.Thread(target=write_log)
        thread.start()
        upload = Connection(server.port)
        path = f"/cache/mycache/nar/{'1' * 52}.nar"
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {peer.ci_token}\r\n"
        upload.send(f"{head}Content-Length: 99999999\r\n\r\n".encode() + b"x" * 1_000_000)
        uploads = server.data / "cache/mycache/nar"
        wait_for(lambda: acknowledged[0] > 3000 and list(uploads.glob(".upload-*")))
        server.kill()
        stop.set()
        thread.join(DEADLINE)
        server.start()
        stored = peer.lines(deployment)
        assert acknowledged[0] <= len(stored) <= acknowledged[0] + 500
        assert stored == [f"line {number}" for number in range(len(stored))]
        assert peer.status(deployment)["status"] == "InProgress"
        assert peer.http("GET", path).status_code == 404
        assert not [file for file in server.data.glob("cache/**/*") if file.is_file()]
        agent = peer.registered("web", **OURS)
        assert agent.expect_text()["command"]["contents"]["resumed"] is True


def test_a_server_without_its_parent_makes_way() -> None:
    """gunicorn's master alone was killed: its worker must leave the port to a successor."""
    with running() as server:
        peer = Peer(server)
        agent = peer.registered("web")
        server.process.kill()
        assert agent.expect_close(5) == 1012
        server.process.wait(DEADLINE)

        def refused() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", server.port)) != 0

        wait_for(refused, 6)


# --- starting -------------------------------------------------------------------------------------


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = command("serve", f"--listen={address}", f"--data={tmp_path}", status=1)
    assert process.stderr.startswith(f"error: can't listen on {address}: Address already in use")
    assert process.stderr.count("\n") == 1 and not process.stdout


@pytest.mark.sqlite
@pytest.mark.long
def test_a_data_directory_that_cannot_be_used(tmp_path: Path) -> None:
    def serve(data: Path) -> str:
        process = command("serve", "--listen=127.0.0.1:0", f"--data={data}", status=1)
        assert process.stderr.startswith("error: the data directory")
        return process.stderr

    (tmp_path / "file").write_text("")
    tmp_path.chmod(0o755)
    mode = tmp_path.stat().st_mode
    for data in (tmp_path / "file", tmp_path / "file" / "below"):
        assert serve(data).count("\n") == 1
    # a directory of other files is not made private, whatever it is
    process = command("init", f"--data={tmp_path}", status=1)
    assert "holds other files" in process.stderr and tmp_path.stat().st_mode == mode
    junk = "this is no database, and longer than the header of one is" * 9
    (tmp_path / "workspace.db").write_text(junk)
    assert "not a database" in serve(tmp_path)


def test_the_server_prints_two_lines_and_its_directory_is_private() -> None:
    with running() as server:
        assert server.data.stat().st_mode & 0o777 == 0o700
        assert server.stop() == 0
        link = "nobody has signed in yet: run `cachix-workspace login-link`"
        assert server.lines == [link, f"listening on {server.url}"]


def test_the_host_of_a_public_url(tmp_path: Path) -> None:
    assert Settings(tmp_path, "http://[::1]:80").public_host == "::1"
