"""Several nodes of one workspace behind nginx, and agents that execute what they are sent.

The nodes are real servers, and so are nginx and PostgreSQL. The agents are stand-ins in this
process, quick and many: each remembers what it has executed, repeats a call until it is
acknowledged, and comes back after any close, as cachix-deploy does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, Callable

import clusters
import requests
import websocket
from clusters import Cluster
from test_workspace_front import free_port, need, nginx
from workspace_support import DEADLINE, OURS, Peer, Server, wait_for

PATH = "/nix/store/" + 32 * "a" + "-system"
QUICK = {"beat_interval": 0.5, "node_timeout": 3.0, "database_patience": 2.0}  # seconds
RUN = """
import sys
from pathlib import Path
from cachix_workspace import server
from cachix_workspace.settings import Settings
data, url, listen, more = sys.argv[1:]
listener = server.bind(listen)
settings = Settings(Path(data), url, behind_proxy=1, **eval(more))
sys.exit(server.serve(settings, listener))
"""
SWALLOW = """
CREATE TABLE IF NOT EXISTS swallowing (really boolean);
CREATE OR REPLACE FUNCTION public.pg_notify(channel text, payload text) RETURNS void AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM swallowing) THEN
    PERFORM pg_catalog.pg_notify(channel, payload);
  END IF;
END $$ LANGUAGE plpgsql;
"""
RECONNECT = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
FRONT = """
map $http_upgrade $cachix_connection {{ default upgrade; '' ''; }}
upstream nodes {{
{servers}
}}
server {{
    listen 127.0.0.1:{port};
    client_max_body_size 0;
    location / {{
        proxy_pass http://nodes;
        proxy_http_version 1.1;
        proxy_set_header Upgrade    $http_upgrade;
        proxy_set_header Connection $cachix_connection;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_connect_timeout 2s;
        proxy_read_timeout 60s;
        proxy_buffering off;
        proxy_next_upstream error timeout http_503;
    }}
}}
"""


class NodeServer(Server):
    """A node, which has the same port after a restart."""

    def __init__(self, data: Path, front: str, database: str, caches: Path, **more: Any) -> None:
        self.data, self.port = data, free_port()
        settings = {"database": database, "cache_store": str(caches), "keep_free": 0}
        settings.update(has_shared_directory=True, **{**QUICK, **more})
        listen = f"127.0.0.1:{self.port}"
        self.argv = [sys.executable, "-c", RUN, str(data), front, listen, repr(settings)]
        self.lines: list[str] = []
        self.database = database
        data.mkdir(mode=0o700, parents=True)
        clusters.note(data, database)
        self.start()

    def run_from(self, place: Path) -> None:
        """Start again as the program in another directory."""
        self.stop()
        self.argv[2] = f"import sys; sys.path.insert(0, {str(place)!r})\n{RUN}"
        self.start()

    def move_to(self, database: str) -> None:
        """Start again with another URL of the database."""
        self.stop()
        self.argv[-1] = self.argv[-1].replace(repr(self.database), repr(database))
        self.database = database
        self.start()


class Front:
    """The workspace by its front: what a Peer needs of a server."""

    def __init__(self, port: int, server: Server) -> None:
        self.port, self.server = port, server
        self.url = f"http://127.0.0.1:{port}"

    def token(self, kind: str, secret: str | None = None) -> str:
        return self.server.token(kind, secret)


class Nodes:
    """A cluster, nodes, and nginx in front of them."""

    def __init__(
        self, directory: Path, count: int = 3, listen: str = "", disk: int = 0, **settings: Any
    ) -> None:
        need("nginx")
        clusters.require()
        self.directory, self.stack = directory, contextlib.ExitStack()
        # with fsync: it is killed
        self.cluster = Cluster("max_connections=100", f"listen_addresses={listen}", disk=disk)
        self.stack.callback(self.cluster.remove)
        self.database, self.caches = self.cluster.create(), directory / "caches"
        self.settings, self.servers = settings, list[NodeServer]()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(count):
                self.add()
            words = [f"    server 127.0.0.1:{one.port} max_fails=0;" for one in self.servers]
            front = FRONT.format(servers="\n".join(words), port=port)
            self.stack.enter_context(nginx(directory / "nginx", front, port))
            self.front = Front(port, self.servers[0])
            self.peer = Peer(self.front)  # type: ignore[arg-type]
        except BaseException:
            self.close()
            raise

    def add(self, **settings: Any) -> NodeServer:
        """Start one more node."""
        data = self.directory / f"node-{len(self.servers)}"
        more = {"database": self.database, **self.settings, **settings}
        node = NodeServer(data, self.url, more.pop("database"), self.caches, **more)
        self.servers.append(node)
        self.stack.callback(self._end, node)
        return node

    def _end(self, node: NodeServer) -> None:
        with contextlib.suppress(ProcessLookupError):
            node.kill()

    def peer_of(self, number: int) -> Peer:
        """A peer of one node, with the tokens that all have."""
        peer = object.__new__(Peer)
        peer.server = self.servers[number]
        peer.agent_token, peer.ci_token = self.peer.agent_token, self.peer.ci_token
        return peer

    @contextlib.contextmanager
    def swallowing(self) -> Iterator[Callable[[], Any]]:
        """Let notifications be lost on order: within the block of what is yielded."""
        name = self.database.partition("@/")[2].partition("?")[0]
        order = functools.partial(self.cluster.sql, name)
        order(SWALLOW)
        order(f"ALTER DATABASE {name} SET search_path = public, pg_catalog")
        order(RECONNECT)

        @contextlib.contextmanager
        def swallow() -> Iterator[None]:
            order("INSERT INTO swallowing VALUES (true)")
            yield
            order("DELETE FROM swallowing")

        yield swallow
        order(f"ALTER DATABASE {name} RESET search_path")
        order(RECONNECT)

    def close(self) -> None:
        self.stack.close()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tracebacks(self) -> list[str]:
        """Lines of nodes that should not be there."""
        return [line for one in self.servers for line in one.lines if "Traceback" in line]


class Agent(threading.Thread):
    """An agent behind the front: it executes, logs, reports, and comes back."""

    def __init__(self, nodes: Nodes, name: str, lines: int = 6) -> None:
        super().__init__(name=name, daemon=True)
        self.url, self.token, self.lines = nodes.url, nodes.peer.agent_token, lines
        self.executed: Counter[str] = Counter()
        self.finished: dict[str, str] = {}  # what was acknowledged last, by deployment
        self.codes: Counter[int] = Counter()
        self.repeated: list[str] = []  # deployments that came twice on one connection
        self.stopping = threading.Event()
        self.registered = threading.Event()
        self.start()

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "name": self.name, **OURS}

    def run(self) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(OSError, websocket.WebSocketException, ValueError):
                self._connect()
            self.registered.clear()
            self.stopping.wait(random.uniform(0.05, 0.5))

    def _connect(self) -> None:
        more = {"version": "1.11.1", "system": "x86_64-linux"}
        header = [f"{name}: {value}" for name, value in {**self.headers(), **more}.items()]
        url = self.url.replace("http:", "ws:") + "/ws"
        sock = websocket.create_connection(url, timeout=5.0, header=header)
        seen = set[str]()
        with contextlib.closing(sock):
            while not self.stopping.is_set():
                try:
                    opcode, data = sock.recv_data()
                except websocket.WebSocketTimeoutException:
                    sock.ping()
                    continue
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    self.codes[int.from_bytes(data[:2], "big")] += 1
                    return
                message = json.loads(data)
                if message["method"] == "AgentRegistered":
                    self.registered.set()
                elif message["method"] == "Deployment":
                    id = message["command"]["contents"]["id"]
                    if id in seen:
                        self.repeated.append(id)
                    seen.add(id)
                    self._deploy(message["command"]["contents"])

    def _deploy(self, order: dict[str, Any]) -> None:
        id = order["id"]
        if id in self.finished:
            self._report(id, "Succeeded")
            return
        if self._report(id, "InProgress") == 409:
            self.finished[id] = "refused"
            return
        self.executed[id] += 1
        third = max(1, self.lines // 3)
        for first in range(0, self.lines, third):
            count = min(third, self.lines - first)
            records = [{"line": f"{id} {first + n}", "time": TIME} for n in range(count)]
            body = "".join(json.dumps(record) + "\n" for record in records)
            self._put(f"/api/v1/deploy/log/{id}?offset={first}", body)
        self._report(id, "Succeeded")
        self.finished[id] = "Succeeded"

    def _report(self, id: str, status: str) -> int:
        record = {"status": status, "time": TIME, "closureSize": None, "reason": None}
        return self._put(f"/api/v1/deploy/deployment/{id}/status", json.dumps(record))

    def _put(self, path: str, body: str) -> int:
        """Repeat a call until it is acknowledged; its status."""
        while True:
            with contextlib.suppress(requests.RequestException):
                answer = requests.put(
                    self.url + path,
                    data=body.encode(),
                    headers={**self.headers(), "Content-Type": "application/json"},
                    timeout=5.0,
                )
                if answer.status_code in (200, 409):
                    return answer.status_code
            if self.stopping.wait(0.2):
                raise OSError("the agent ends")

    def end(self) -> None:
        self.stopping.set()
        self.join(DEADLINE)


TIME = "2026-11-24T01:02:03.000004Z"


class Ci(threading.Thread):
    """Orders deployments of agents, one after the other, and notes those that were accepted."""

    def __init__(self, nodes: Nodes, names: list[str], pause: float = 0.05) -> None:
        super().__init__(name="ci", daemon=True)
        self.nodes, self.names, self.pause = nodes, names, pause
        self.accepted: dict[str, str] = {}  # agents by deployment
        self.stopping = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.stopping.wait(self.pause):
            name = random.choice(self.names)
            with contextlib.suppress(requests.RequestException):
                body = {"agents": {name: PATH}}
                answer = self.nodes.peer.http("POST", "/api/v2/deploy/activate", json=body)
                if answer.status_code == 200:
                    self.accepted[answer.json()["agents"][name]["id"]] = name

    def end(self) -> None:
        self.stopping.set()
        self.join(DEADLINE)


@contextlib.contextmanager
def at_work(nodes: Nodes, count: int) -> Iterator[tuple[list[Agent], Ci]]:
    """Agents and a CI that are at work during the block."""
    agents = [Agent(nodes, f"agent-{number}") for number in range(count)]
    for agent in agents:
        assert agent.registered.wait(DEADLINE), agent.name
    ci = Ci(nodes, [agent.name for agent in agents])
    try:
        yield agents, ci
    finally:
        ci.end()
        for agent in agents:
            agent.stopping.set()
        for agent in agents:
            agent.end()


def assert_all_is_there(nodes: Nodes, agents: list[Agent], ci: Ci) -> None:
    """Whatever was acknowledged is there, once: orders, reports and lines. Agents must be alive."""
    ci.end()
    by_name = {agent.name: agent for agent in agents}
    with futures.ThreadPoolExecutor(8) as pool:
        checks = (
            pool.submit(_assert_it_is_there, nodes, by_name[name], id)
            for id, name in ci.accepted.items()
        )
        for check in list(checks):
            check.result()
    assert [agent.repeated for agent in agents if agent.repeated] == []
    assert ci.accepted and any(agent.executed for agent in agents)
    assert nodes.tracebacks() == []


def _assert_it_is_there(nodes: Nodes, agent: Agent, id: str) -> None:
    def end() -> str:
        try:
            status = str(nodes.peer.status(id)["status"])
        except (AssertionError, requests.RequestException):
            return ""
        return status if status in ("Succeeded", "Cancelled") else ""

    if wait_for(end, 60.0) == "Succeeded":
        assert agent.executed[id] == 1, (id, agent.executed[id])
        assert nodes.peer.lines(id) == [f"{id} {number}" for number in range(agent.lines)]
    else:
        assert agent.executed[id] <= 1, (id, agent.executed[id])
        assert agent.finished.get(id) != "Succeeded"
