"""A scripted workspace that remembers: agents, runs and deployments that end as a test says."""

from __future__ import annotations

import http.server
import json
import re
import struct
import threading
import uuid
from typing import Any, Callable, Optional

from quiet import QuietServer, switch_to_websocket

NEW, OLD = f"/nix/store/{'a' * 32}-system-2", f"/nix/store/{'b' * 32}-system-1"
REASON = "the rollback script /nix/store/x-check ended with status 1"


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a websocket frame of a server."""
    size = len(payload)
    head = bytes([size]) if size < 126 else b"\x7e" + struct.pack("!H", size)
    return bytes([0x80 | opcode]) + head + payload


class Fleet:
    """Agents by name. Their deployments succeed at once, but for those in `failing` and `hanging`.

    `is_ours` is whether it answers what Cachix's workspace does not know. `orders` are the agents
    of each order.
    """

    def __init__(self, *names: str, is_ours: bool = True) -> None:
        self.names, self.is_ours = list(names), is_ours
        self.running = dict.fromkeys(names, OLD)
        self.state = dict.fromkeys(names, "succeeded")
        self.labels: dict[str, list[str]] = {}
        self.offline: set[str] = set()
        self.failing: dict[str, str] = {}
        self.hanging: set[str] = set()
        self.lines: dict[str, list[str]] = {}
        self.deployments: dict[str, dict[str, Any]] = {}
        self.runs: list[list[str]] = []
        self.orders: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.on_order: Callable[[list[str]], None] = lambda names: None
        self.lock = threading.RLock()
        self.server = QuietServer(("127.0.0.1", 0), type("Own", (Handler,), {"fleet": self}))
        self.host = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def spec(self) -> dict[str, Any]:
        """Return a deploy.json for all agents."""
        return {"agents": dict.fromkeys(self.names, NEW)}

    # --- what is asked ---

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Return the status and the body of an answer."""
        with self.lock:
            self.asked.append(f"{method} {path.partition('?')[0]}")
            if path == "/api/v2/deploy/activate":
                return self.order(body)
            if match := re.fullmatch(r"/api/v1/deploy/deployment/(\S+)", path):
                return 200, self.poll(match[1])
            if self.is_ours and (match := re.fullmatch(r"/api/v1/runs/(\d+)/roll-back", path)):
                return self.roll_back(int(match[1]), body["agents"])
            if self.is_ours and path.startswith("/api/v1/agents?"):
                return 200, {"agents": [self.describe(name) for name in self.names], "next": None}
            return 404, {"error": "no such page"}

    def order(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.bodies.append(body)
        unknown = sorted(set(body["agents"]) - set(self.names))
        if unknown:
            return 400, {"error": f"unknown agents: {', '.join(unknown)}"}
        self.on_order(list(body["agents"]))
        self.orders.append(list(body["agents"]))
        number = body.get("run")
        if number is None:
            self.runs.append([])
            number = len(self.runs)
        links = {name: self.place(name, path, number) for name, path in body["agents"].items()}
        if not self.is_ours:
            return 200, {"agents": links}
        return 200, {"agents": links, "run": number, "runUrl": f"{self.host}/runs/{number}"}

    def place(self, name: str, path: str, number: int) -> dict[str, str]:
        id = str(uuid.uuid4())
        self.runs[number - 1].append(id)
        record = {"id": id, "agent": name, "index": len(self.deployments) + 1, "run": number}
        more = {"storePath": path, "before": self.running[name], "status": "Pending"}
        self.deployments[id] = {**record, **more, "closureSize": None}
        return {"id": id, "url": f"{self.host}/agents/{name}/deployments/{record['index']}"}

    def poll(self, id: str) -> dict[str, Any]:
        record = self.deployments[id]
        name = record["agent"]
        is_waiting = name in self.hanging or name in self.offline
        if record["status"] == "Pending" and not is_waiting:
            if name in self.failing and record["storePath"] == NEW:
                record.update(status="Failed", outcome="rolled-back", reason=self.failing[name])
                self.state[name] = "rolled-back"
            else:
                record.update(status="Succeeded", outcome="succeeded")
                self.running[name], self.state[name] = record["storePath"], "succeeded"
        facts = {**record, "agentOnline": name not in self.offline}
        return facts if self.is_ours else {"status": record["status"], "closureSize": None}

    def describe(self, name: str) -> dict[str, Any]:
        is_open = [one for one in self.deployments.values() if one["agent"] == name]
        return {
            "name": name,
            "connected": name not in self.offline,
            "labels": self.labels.get(name, []),
            "running": self.running[name],
            "lastStorePath": self.running[name],
            "lastState": self.state[name],
            "deployment": next((e["index"] for e in is_open if e["status"] == "Pending"), None),
        }

    def roll_back(self, number: int, names: list[str]) -> tuple[int, Any]:
        members = [self.deployments[id] for id in self.runs[number - 1]]
        self.runs.append([])
        self.orders.append(names)
        for each in members:
            if each["agent"] in names:
                self.place(each["agent"], each["before"], len(self.runs))
        former = [self.deployments[id] for id in self.runs[-1]]
        return 201, {"id": len(self.runs), "deployments": former}

    def log(self, id: str) -> list[str]:
        """Return the lines of a deployment's log."""
        return self.lines.get(self.deployments[id]["agent"], ["hello"])


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests to a fleet; each fleet has a class of its own, by `type`."""

    fleet: Fleet
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if match := re.match(r"/api/v1/deploy/log/([^?]+)\?view=true", self.path):
            self.stream(self.fleet.log(match[1]))
        else:
            self.respond("GET", None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.respond("POST", json.loads(body))

    def respond(self, method: str, body: Optional[Any]) -> None:
        status, value = self.fleet.answer(method, self.path, body)
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, lines: list[str]) -> None:
        self.close_connection = True
        switch_to_websocket(self)
        for line in lines:
            record = {"line": line, "time": "2026-11-23T19:00:00Z"}
            self.wfile.write(frame(1, json.dumps(record).encode()))
        self.wfile.write(frame(8, struct.pack("!H", 1000)))
        self.rfile.read(1)
