"""Random faults of the server's side, under agents that deploy, a push and an admin.

`make soak-workspace SECONDS=1800 SEED=1` draws them from that seed. Whatever was acknowledged is
there afterwards: orders, reports, lines of logs, pushes and tokens. No deployment ran twice.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import partitions
import pytest
import requests
from caches import Files, Key
from nodes_support import Front, Nodes, assert_all_is_there, at_work
from partitions import Proxy, Wire
from test_workspace_directory import fill
from test_workspace_front import free_port
from workspace_support import Peer, Server, wait_for

pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(4 * 3600)]
AGENTS = 8


class Forwarder:
    """A way to a server that can be cut: all connections at once."""

    def __init__(self, target: int) -> None:
        self.target, self.lock = target, threading.Lock()
        self.open: set[socket.socket] = set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                inside, _ = self.listener.accept()
                threading.Thread(target=self._carry, args=(inside,), daemon=True).start()

    def _carry(self, inside: socket.socket) -> None:
        try:
            outside = socket.create_connection(("127.0.0.1", self.target), 5.0)
        except OSError:
            inside.close()
            return
        outside.settimeout(None)
        for sock in (inside, outside):  # else each answer in two parts takes 40 ms
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.lock:
            self.open |= {inside, outside}
        back = threading.Thread(target=self._pump, args=(outside, inside), daemon=True)
        back.start()
        self._pump(inside, outside)
        back.join(60)
        with self.lock:
            self.open -= {inside, outside}
        inside.close()
        outside.close()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections."""
        with self.lock:
            for sock in self.open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()
        self.cut()


class World:
    """What is tried: servers, the way to them, and the faults that they can have."""

    servers: list[Any]

    def __init__(self, target: int, server: Server) -> None:
        self.forwarder = Forwarder(target)
        self.front = Front(self.forwarder.port, server)
        self.url = self.front.url
        self.peer = Peer(self.front)  # type: ignore[arg-type]
        self.faults: list[Callable[[random.Random], None]] = [self.kill, self.restart, self.cut]

    def tracebacks(self) -> list[str]:
        return [line for one in self.servers for line in one.lines if "Traceback" in line]

    def kill(self, draw: random.Random) -> None:
        server = draw.choice(self.servers)
        server.kill()
        time.sleep(draw.uniform(0.0, 2.0))
        server.start()

    def restart(self, draw: random.Random) -> None:
        server = draw.choice(self.servers)
        server.stop()
        server.start()

    def cut(self, draw: random.Random) -> None:
        self.forwarder.cut()


class FixedServer(Server):
    """A server with the same port after a restart."""

    def __init__(self, data: Path, *options: str) -> None:
        self.data, self.port = data, free_port()
        super().__init__(data, *options)

    def start(self) -> None:
        listen = f"--listen=127.0.0.1:{self.port}"
        self.argv = [listen if word.startswith("--listen") else word for word in self.argv]
        super().start()


class Alone(World):
    """A server with SQLite, on a small disk."""

    def __init__(self, data: Path) -> None:
        self.data = data
        server = FixedServer(data, "--keep-free=0")
        self.servers = [server]
        super().__init__(server.port, server)
        self.faults += [self.full]

    def full(self, draw: random.Random) -> None:
        ballast = fill(self.data)
        time.sleep(draw.uniform(0.5, 3.0))
        ballast.unlink()

    def close(self) -> None:
        self.forwarder.close()
        with contextlib.suppress(ProcessLookupError):
            self.servers[0].kill()


class Several(World):
    """Three nodes behind nginx; two reach PostgreSQL by ways that can stop."""

    def __init__(self, directory: Path) -> None:
        disk = 256 if os.geteuid() == 0 else 0  # MiB
        self.wire = Wire(partitions.address())
        self.nodes = Nodes(directory, disk=disk, listen=self.wire.address)
        self.servers = self.nodes.servers
        self.proxy = Proxy(self.nodes.cluster)
        self.servers[-1].move_to(self.proxy.url(self.nodes.database))
        super().__init__(self.nodes.front.port, self.servers[0])
        self.faults += [self.database, self.part, *[self.full] * bool(disk)]
        if partitions.are_possible():
            self.servers[1].move_to(self.wire.url(self.nodes.database))
            self.faults += [self.lose]

    def database(self, draw: random.Random) -> None:
        self.nodes.cluster.stop(draw.choice(["fast", "immediate"]))
        time.sleep(draw.uniform(0.0, 1.5))
        self.nodes.cluster.start()

    def full(self, draw: random.Random) -> None:
        """Fill the disk of the database, which may end for lack of room."""
        ballast = fill(self.nodes.cluster.directory)
        if draw.random() < 0.3:
            self.nodes.cluster.panic()
        time.sleep(draw.uniform(0.5, 3.0))
        ballast.unlink()
        self.nodes.cluster.revive()

    def lose(self, draw: random.Random) -> None:
        """Lose packets between a node and the database."""
        self.wire.cut(draw.choice(sorted(partitions.WAYS)))
        time.sleep(draw.uniform(0.5, 6.0))
        self.wire.mend()

    def part(self, draw: random.Random) -> None:
        self.proxy.send(signal.SIGSTOP)
        time.sleep(draw.uniform(0.5, 6.0))
        self.proxy.send(signal.SIGCONT)

    def close(self) -> None:
        self.proxy.send(signal.SIGCONT)
        self.forwarder.close()
        self.nodes.close()
        self.proxy.close()
        if partitions.are_possible():
            self.wire.close()


class Pusher(threading.Thread):
    """Pushes small paths, and notes those that were acknowledged as a whole."""

    def __init__(self, world: World, directory: Path) -> None:
        super().__init__(name="pusher", daemon=True)
        secret = world.servers[0].command("cache", "create", "main").strip()
        self.files = Files(directory, Key.parse(secret))
        self.url, self.token = f"{world.url}/cache/main", world.peer.ci_token
        self.pushed: list[str] = []
        self.stopping = threading.Event()
        self.start()

    def run(self) -> None:
        number = 0
        while not self.stopping.wait(0.2):
            number += 1
            path = self.files.add(f"path-{number}", {"file": f"text {number}"})
            with contextlib.suppress(urllib.error.URLError, OSError):
                self.files.push(self.url, self.token, path)
                self.pushed.append(path)

    def check(self) -> None:
        self.stopping.set()
        self.join(60)
        assert self.pushed
        with requests.Session() as session:
            for path in self.pushed:
                for file in (self.files.narinfo(path), self.files.archive(path)):
                    url = f"{self.url}/{file.relative_to(self.files.directory)}"
                    answer = session.get(url, timeout=30)
                    assert answer.status_code == 200 and answer.content == file.read_bytes(), path


class Admin(threading.Thread):
    """Makes tokens and revokes every second one, and notes what was acknowledged."""

    def __init__(self, world: World) -> None:
        super().__init__(name="admin", daemon=True)
        self.peer, self.token = world.peer, world.servers[0].token("admin")
        self.valid: list[str] = []
        self.revoked: list[str] = []
        self.stopping = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.stopping.wait(0.3):
            with contextlib.suppress(requests.RequestException):
                made = self.peer.http(
                    "POST", "/api/v1/tokens", self.token, json={"kind": "activate"}
                )
                if made.status_code != 201:
                    continue
                secret, number = made.json()["secret"], made.json()["id"]
                if len(self.valid) <= len(self.revoked):
                    self.valid.append(secret)
                elif self.peer.http("DELETE", f"/api/v1/tokens/{number}", self.token).ok:
                    self.revoked.append(secret)

    def check(self) -> None:
        self.stopping.set()
        self.join(60)
        path = "/api/v1/deploy/deployments?limit=1"
        assert self.valid
        for secret in self.valid:
            assert self.peer.http("GET", path, secret).status_code == 200
        for secret in self.revoked:
            assert self.peer.http("GET", path, secret).status_code == 401


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "several":
        several = Several(tmp_path / "nodes")
        yield several
        several.close()
        return
    data = tmp_path / "data"
    data.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(data)]
    if os.geteuid() != 0 or subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts a small disk")
    alone = Alone(data)
    try:
        yield alone
    finally:
        alone.close()
        subprocess.run(["umount", "--lazy", str(data)], check=True)


@pytest.mark.parametrize("world", ["alone", "several"], indirect=True)
def test_what_was_acknowledged_is_there(
    request: pytest.FixtureRequest, world: World, tmp_path: Path
) -> None:
    seed = request.config.getoption("--seed") or random.randrange(1 << 30)
    request.node.user_properties.append(("soak", seed))
    draw, story = random.Random(seed), list[str]()
    end = time.monotonic() + request.config.getoption("--seconds") / 2
    pusher, admin = Pusher(world, tmp_path / "files"), Admin(world)
    with at_work(world, AGENTS) as (agents, ci):  # type: ignore[arg-type]
        while time.monotonic() < end:
            time.sleep(draw.uniform(0.5, 3.0))
            fault = draw.choice(world.faults)
            story.append(fault.__name__)
            fault(draw)
        print(f"seed {seed}: {' '.join(story)}")
        wait_for(lambda: all(agent.registered.is_set() for agent in agents), 60.0)
        assert_all_is_there(world, agents, ci)  # type: ignore[arg-type]
    pusher.check()
    admin.check()
    assert all(server.process.poll() is None for server in world.servers), story
    ended = sum(status == "Succeeded" for agent in agents for status in agent.finished.values())
    print(f"{len(story)} faults, {len(ci.accepted)} orders, {ended} reports of success,")
    print(f"{ended * agents[0].lines} lines, {len(pusher.pushed)} pushes,")
    print(f"{len(admin.valid)} valid and {len(admin.revoked)} revoked tokens")
