"""Websockets wait without a thread: counts, order, and peers that don't do their part."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path

import pytest
from workspace_support import (
    DEADLINE,
    PING,
    PONG,
    STORE_PATHS,
    TEXT,
    Connection,
    Peer,
    Server,
    handshake,
    running,
    wait_for,
)

WITH_COUNTS = """
import sys, threading, time
from pathlib import Path
from cachix_workspace import server
from cachix_workspace.settings import Settings
file = Path(sys.argv[2])
def watch(worker):
    while True:
        threads = sum(not t.name.startswith("ThreadPool") for t in threading.enumerate())
        parked = worker._workspace().lot.count()
        text = f"{worker.nr_conns} {parked} {threads}"
        file.with_suffix(".new").write_text(text)
        file.with_suffix(".new").rename(file)
        time.sleep(0.05)
start = server.WorkspaceWorker.run
def run(self):
    threading.Thread(target=watch, args=(self,), daemon=True).start()
    start(self)
server.WorkspaceWorker.run = run
listener = server.bind("127.0.0.1:0")
sys.exit(server.serve(Settings(Path(sys.argv[1])), listener))
"""


def counts(file: Path) -> tuple[int, int, int]:
    """Connections that gunicorn counts, parked ones, and threads beside those of requests."""
    connections, parked, threads = map(int, file.read_text().split())
    return connections, parked, threads


def counted(server: Server, file: Path) -> None:
    """Start a server anew that writes its counts into a file."""
    server.kill()
    server.argv = [sys.executable, "-c", WITH_COUNTS, str(server.data), str(file)]
    server.start()
    wait_for(file.exists)


@pytest.fixture
def many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))


@pytest.mark.long
@pytest.mark.usefixtures("many_files")
def test_a_thousand_sockets_park_and_end_and_none_is_counted(tmp_path: Path) -> None:
    """They end in all ways: by a close, by a cut, by the server."""
    file = tmp_path / "counts"
    with running() as server:
        counted(server, file)
        peer = Peer(server)
        threads = counts(file)[2]
        agents = []
        for number in range(1000):
            agents.append(peer.agent(f"agent-{number}"))
            if number % 100 == 99:  # no more than the backlog of connections at a time
                for agent in agents[-100:]:
                    assert agent.expect_text()["method"] == "AgentRegistered"
        wait_for(lambda: counts(file)[:2] == (0, 1000))
        assert counts(file)[2] == threads, "threads were started for sockets"
        for agent in agents[:300]:
            agent.send_frame(8, b"\x03\xe8")
        for agent in agents[300:600]:
            agent.close()
        again = [peer.registered(f"agent-{number}") for number in range(600, 700)]  # replaced
        for agent in agents[600:700]:
            assert agent.expect_close() == 4001
        wait_for(lambda: counts(file)[:2] == (0, 400))
        for agent in agents[700:] + again:
            agent.close()
        wait_for(lambda: counts(file)[:2] == (0, 0))
        listed = json.loads(server.command("agent", "list", "--json"))
        assert len(listed) == 1000
        wait_for(lambda: not any(_connected(server)))


def _connected(server: Server) -> list[bool]:
    return [row["connected"] for row in json.loads(server.command("agent", "list", "--json"))]


def test_what_came_with_the_handshake_is_not_lost() -> None:
    """gunicorn's parser has read it already."""
    with running() as server:
        peer = Peer(server)
        connection = Connection(server.port)
        ping = bytes([0x80 | PING, 0x80 | 5]) + b"\0\0\0\0" + b"early"
        connection.send(handshake("/ws", peer.agent_token, name="web") + ping)
        assert connection.read_head().startswith("HTTP/1.1 101")
        assert connection.expect(PONG) == b"early"
        assert connection.expect_text()["method"] == "AgentRegistered"


def test_messages_of_a_socket_are_handled_in_order() -> None:
    """However many threads there are, and however many messages are unhandled."""
    with running() as server:
        peer = Peer(server)
        peer.registered("web")
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        writers = [peer.agent("web", f"/api/v1/deploy/log/{deployment}") for _ in range(4)]
        count = 6000  # three times as many as are kept unhandled
        for first in range(0, count, 500):
            for which, writer in enumerate(writers):
                frames = []
                for number in range(first, first + 500):
                    line = {"line": f"{which} {number} {'x' * 100}", "time": "T"}
                    data = json.dumps(line).encode()
                    frames.append(b"\x81\xfe%b\0\0\0\0%b" % (len(data).to_bytes(2, "big"), data))
                writer.send(b"".join(frames))
        wait_for(lambda: len(peer.lines(deployment)) == 4 * count, 3 * DEADLINE)
        seen: dict[str, list[int]] = {}
        for line in peer.lines(deployment):
            which, number, _ = line.split()
            seen.setdefault(which, []).append(int(number))
        assert list(seen.values()) == [list(range(count))] * 4


def test_a_pool_of_busy_handlers_holds_up_no_ping(tmp_path: Path) -> None:
    """The selector's thread answers by itself, whatever the database does."""
    import sqlite3

    with running() as server:
        peer = Peer(server)
        agent = peer.registered("web")
        database = sqlite3.connect(server.data / "workspace.db", isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        new = peer.agent("db")  # its registration waits for the writer
        began = time.monotonic()
        for number in range(20):
            agent.send_frame(PING, b"%d" % number)
            assert agent.expect(PONG) == b"%d" % number
        assert time.monotonic() - began < DEADLINE
        database.execute("COMMIT")
        database.close()
        assert new.expect_text()["method"] == "AgentRegistered"


def test_a_viewer_that_does_not_read_costs_no_other_viewer_anything() -> None:
    with running() as server:
        peer = Peer(server)
        peer.registered("web")
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        stalled, reading = peer.view(deployment), peer.view(deployment)
        for first in range(40):
            assert peer.log("web", deployment, first, ["x" * 300_000]).status_code == 200
        for _ in range(40):
            assert len(reading.expect(TEXT)) > 300_000
        for _ in range(40):  # it was sent what it took, and no more was kept for it
            assert len(stalled.expect(TEXT)) > 300_000


def test_large_messages_wait_for_each_other_and_all_arrive() -> None:
    """Two may be under way at a time: what comes of a third is left to TCP."""
    with running() as server:
        peer = Peer(server)
        peer.registered("web")
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        writers = [peer.agent("web", f"/api/v1/deploy/log/{deployment}") for _ in range(4)]
        size = 3 << 20
        for writer in writers:  # more than a mebibyte of each
            head = b"\x81\xff" + size.to_bytes(8, "big") + b"\0\0\0\0"
            writer.send(head + b'{"time":"T","line":"' + b"x" * (size // 2))
        rest = size - size // 2 - len(b'{"time":"T","line":"') - 2
        threads = [
            threading.Thread(target=writer.send, args=(b"x" * rest + b'"}',)) for writer in writers
        ]
        for thread in reversed(threads):  # those that came last are whole first
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        wait_for(lambda: len(peer.lines(deployment)) == 4)
        assert {len(line) for line in peer.lines(deployment)} == {size - 22}


@pytest.mark.parametrize("opcode", [PING, PONG, 1])
def test_a_flood_of_frames_that_say_nothing_ends_its_socket_alone(opcode: int) -> None:
    with running() as server:
        peer = Peer(server)
        other, flood = peer.registered("other"), peer.registered("flood")
        frame = bytes([opcode if opcode == 1 else 0x80 | opcode, 0x80, 0, 0, 0, 0])
        rest = b"\x00\x80\0\0\0\0" if opcode == 1 else frame  # parts of a message without an end
        flood.send(frame + 900 * rest)
        other.send_frame(PING, b"still")
        assert other.expect(PONG) == b"still"
        flood.send(200 * rest)
        assert flood.expect_close() == 1008
        assert peer.registered("flood")
        other.send_frame(PING, b"there")
        assert other.expect(PONG) == b"there"
