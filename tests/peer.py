"""A scripted workspace on raw sockets, which records all requests and frames, and misbehaves.

By default it behaves like Cachix's backend: it registers any agent that connects to /ws, answers
pings and closes, and takes reports on /ws-deployment and on the log sockets. With `reports =
"http"` it asks for plain requests and takes those. Its records have the form of the transcripts:
`http-request` and `http-response` events, and frames.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any, Callable, Optional, Union

from hosts import PROJECT, wait_until

from cachix_protocol import FAILURE_LINE, SUCCESS_LINE

AGENT_ID = "11111111-2222-4333-8444-555555555555"
OPCODES = {0: "continuation", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}
NUMBERS = {name: number for number, name in OPCODES.items()}
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
GARBAGE = b"\xff\x07garbage" * 20  # frames of no known kind with all reserved bits set
SECONDS = 600.0  # the longest that a connection may take

Answer = tuple[int, Any]  # status and body: bytes, or a value that becomes JSON


@dataclass
class Fault:
    """The fault that meets connections whose path matches, `times` times (-1: always)."""

    pattern: str
    kind: str
    times: int = -1


@dataclass(frozen=True)
class Request:
    """An HTTP request; `raw` is its head as received."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    raw: str

    def json(self) -> Any:
        return json.loads(self.body)


class Gone(Exception):
    """The other side has closed the connection."""


class Connection:
    """One connection to the peer. `path` is empty until a request has arrived."""

    def __init__(self, peer: Peer, number: int, sock: socket.socket) -> None:
        self.peer, self.number, self.socket = peer, number, sock
        self.path = ""
        self.open = False  # the handshake is over, and AgentRegistered was sent if it is due
        self.buffer = b""
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.pongs = True
        self.how = socket.SHUT_RDWR

    # --- what a script can do ---

    def send(self, kind: str, payload: Union[bytes, str] = b"", fin: bool = True) -> None:
        """Send one frame: text, binary, continuation, ping, pong or close."""
        data = payload.encode() if isinstance(payload, str) else payload
        size = len(data)
        length = struct.pack(">BQ", 127, size) if size >= 1 << 16 else struct.pack(">BH", 126, size)
        length = bytes([size]) if size < 126 else length
        with self.lock:
            self.record_frame("S->C", kind, data, fin)
            self.write(bytes([(0x80 if fin else 0) | NUMBERS[kind]]) + length + data)

    def send_text(self, text: str, fragments: int = 1, kind: str = "text") -> None:
        """Send a message in `fragments` frames, with pings between them as the protocol allows."""
        data = text.encode()
        step = max(1, -(-len(data) // fragments))
        parts = [data[i : i + step] for i in range(0, len(data), step)] or [b""]
        for index, part in enumerate(parts):
            self.send("continuation" if index else kind, part, index == len(parts) - 1)
            if index < len(parts) - 1:
                self.send("ping", b"between")

    def close(self, code: Optional[int] = 1000, reason: str = "") -> None:
        """Send a close frame (None: without a code) and wait at most 2 s for the answer."""
        self.send("close", b"" if code is None else struct.pack(">H", code) + reason.encode())
        self.ended.wait(2)

    def raw(self, data: bytes) -> None:
        """Send bytes that need not be a frame."""
        with self.lock:
            self.write(data)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.how = socket.SHUT_RD  # wakes the reading thread, and sends nothing
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end()

    def end(self) -> None:
        """End the TCP connection without a close frame."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(self.how)
        with contextlib.suppress(OSError):
            self.socket.close()
        self.ended.set()

    def write(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError:
            raise Gone from None

    # --- reading ---

    def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            try:
                part = self.socket.recv(1 << 16)
            except OSError:
                part = b""
            if not part:
                raise Gone
            self.buffer += part
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def read_request(self) -> Request:
        """Read the next HTTP request."""
        while b"\r\n\r\n" not in self.buffer:
            self.buffer = self.read(len(self.buffer) + 1) + self.buffer
        head = self.read(self.buffer.index(b"\r\n\r\n") + 4).decode("latin-1")
        first, *rest = head.strip().split("\r\n")
        pairs = (line.partition(":") for line in rest)
        headers = {key.lower(): value.strip() for key, _, value in pairs}
        method, path, _ = first.split(" ", 2)
        body = self.read_chunks() if "chunked" in headers.get("transfer-encoding", "") else b""
        body = body or self.read(int(headers.get("content-length", 0)))
        self.path = path
        self.peer.record({"conn": self.number, "event": "http-request", "raw": head})
        if body:
            text = body.decode("utf-8", "replace")
            self.peer.record({"conn": self.number, "event": "http-body", "body": text})
        return Request(method, path, headers, body, head)

    def read_chunks(self) -> bytes:
        body = b""
        while True:
            line = b""
            while not line.endswith(b"\r\n"):
                line += self.read(1)
            size = int(line, 16)
            body += self.read(size)
            self.read(2)
            if not size:
                return body

    def read_frame(self) -> tuple[str, bytes, bool]:
        """Read the next frame; return its kind, its payload, and whether it ends a message."""
        first, second = self.read(2)
        size = second & 127
        if size > 125:
            size = int.from_bytes(self.read(2 if size == 126 else 8), "big")
        mask = self.read(4) if second & 128 else None
        data = self.read(size)
        if mask is not None and size:
            key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
            data = (int.from_bytes(data, "big") ^ key).to_bytes(size, "big")
        kind, fin = OPCODES.get(first & 15, str(first & 15)), bool(first & 128)
        more = {"rsv": first >> 4 & 7, "masked": second >> 7}
        self.record_frame("C->S", kind, data, fin, more)
        return kind, data, fin

    def record_frame(
        self,
        direction: str,
        kind: str,
        data: bytes,
        fin: bool,
        more: Optional[dict[str, int]] = None,
    ) -> None:
        event: dict[str, Any] = {
            "conn": self.number,
            "path": self.path,
            "dir": direction,
            "frame": kind,
            "fin": int(fin),
            **(more or {}),
        }
        if kind == "close" and len(data) >= 2:
            event["close_code"] = int.from_bytes(data[:2], "big")
            event["close_reason"] = data[2:].decode("utf-8", "replace")
        text = kind not in ("close", "binary")
        event["payload"] = data.decode("utf-8", "replace") if text else data.hex()
        self.peer.record(event)


class Peer:
    """The scripted workspace, a context manager. Set its attributes before an agent connects."""

    def __init__(self) -> None:
        self.cache: Optional[dict[str, Any]] = None  # of AgentRegistered; `Cache.wire()` makes one
        self.reports: Optional[str] = None  # "http", or None as Cachix
        self.registers = True  # send AgentRegistered to each agent that connects
        self.cancelled: set[str] = set()  # deployments whose status reports are answered by 409
        # The reports over HTTP by their deployments, in order; log lines by HTTP or websocket.
        self.statuses: dict[str, list[dict[str, Any]]] = {}
        self.logs: dict[str, list[str]] = {}
        self.answers: list[tuple[str, Callable[[Request], Answer]]] = []
        self.events: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.connections: list[Connection] = []
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._index = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._start_accepting()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- start, stop and faults ---

    def stop(self) -> None:
        """End all connections, and refuse new ones."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in list(self.connections):
            connection.end()

    def restart(self) -> None:
        """Listen again on the same port."""
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self._start_accepting()

    def misbehave(self, pattern: str, kind: str, times: int = -1) -> Fault:
        """Misbehave on connections whose path matches. The latest fault that matches counts.

        At the handshake: silent (no answer at all), an HTTP status such as "302", "401", "500" or
        "200", cut, reset. After it: no-pong, half-open (neither reads nor sends any more), garbage,
        close-1000 and the like, close (without a code).
        """
        fault = Fault(pattern, kind, times)
        self.faults.insert(0, fault)
        return fault

    def heal(self) -> None:
        """Behave well on new connections; those that there are stay as they are."""
        self.faults.clear()

    def answer(self, pattern: str, answer: Callable[[Request], Answer]) -> None:
        """Answer plain requests whose `METHOD /path` matches by a function; the latest counts."""
        self.answers.insert(0, (pattern, answer))

    # --- messages to the agent ---

    def register(self, connection: Connection, **more: Any) -> None:
        """Send AgentRegistered; `more` are additional keys of its contents."""
        contents: dict[str, Any] = {"cache": self.cache, "id": AGENT_ID}
        if self.reports:
            contents["reports"] = self.reports
        connection.send_text(message("AgentRegistered", {**contents, **more}))

    def agent(self, timeout: float = 30.0) -> Connection:
        """Wait for the agent's connection to /ws, and return it."""
        return self.connection("/ws", timeout)

    def connection(self, path: str, timeout: float = 30.0) -> Connection:
        """Wait for an open websocket at a path with this prefix; return the newest one."""

        def newest() -> Optional[Connection]:
            matches = [c for c in self.connections if c.open and is_at(c.path, path)]
            return next((c for c in reversed(matches) if not c.ended.is_set()), None)

        connection: Connection = wait_until(newest, timeout, f"a connection to {path}")
        return connection

    def deploy(
        self, store_path: str, script: Optional[str] = None, fragments: int = 1, **more: Any
    ) -> str:
        """Send a Deployment to the agent, and return its id."""
        self._index += 1
        deployment_id = str(more.pop("id", uuid.uuid4()))
        contents = {
            "storePath": store_path,
            "id": deployment_id,
            "index": self._index,
            "rollbackScript": script,
            **more,
        }
        self.agent().send_text(message("Deployment", contents), fragments)
        return deployment_id

    # --- records of what has arrived ---

    def record(self, event: dict[str, Any]) -> None:
        with self._lock:
            self.events.append({"t": round(time.monotonic() - self._begin, 6), **event})

    def frames(
        self, path: str = "", kind: str = "", direction: str = "C->S"
    ) -> list[dict[str, Any]]:
        """Return the recorded frames of paths with a prefix, by kind and direction ("": any)."""
        with self._lock:
            frames = [event for event in self.events if "frame" in event]
        return [
            event
            for event in frames
            if is_at(event["path"], path)
            and kind in ("", event["frame"])
            and direction in ("", event["dir"])
        ]

    def heads(self, path: str = "") -> list[str]:
        """Return the heads of all HTTP requests, handshakes too, for paths with a prefix."""
        with self._lock:
            heads = [event["raw"] for event in self.events if event.get("event") == "http-request"]
        return [head for head in heads if is_at(head.split(" ")[1], path)]

    def messages(self, deployment_id: str = "", tag: str = "") -> list[dict[str, Any]]:
        """Return the decoded messages of a deployment and a tag that came on /ws-deployment."""
        messages = [json.loads(frame["payload"]) for frame in self.frames("/ws-deployment", "text")]
        return [
            message
            for message in messages
            if deployment_id in ("", message["command"]["id"])
            and tag in ("", message["command"]["tag"])
        ]

    def finished(self, deployment_id: str, timeout: float = 60.0) -> bool:
        """Wait for the final report of a deployment, by either protocol; whether it succeeded."""

        def results() -> list[bool]:
            messages = self.messages(deployment_id, "DeploymentFinished")
            statuses = [report["status"] for report in self.statuses.get(deployment_id, [])]
            return [message["command"]["hasSucceeded"] for message in messages] or [
                status == "Succeeded" for status in statuses if status != "InProgress"
            ]

        end = wait_until(results, timeout, f"the final report of {deployment_id}")[0]
        self.wait_for_log(deployment_id)
        return bool(end)

    def wait_for_log(self, deployment_id: str) -> None:
        """Give a log that has begun a moment to close: the report of its end may overtake it."""
        deadline = time.monotonic() + 3.0
        while (lines := self.log(deployment_id)) and time.monotonic() < deadline:
            if lines[-1].startswith((SUCCESS_LINE, FAILURE_LINE)):
                return
            time.sleep(0.02)

    def log(self, deployment_id: str) -> list[str]:
        """Return the lines of a deployment's log so far."""
        return list(self.logs.get(deployment_id, []))

    # --- the server ---

    def _start_accepting(self) -> None:
        threading.Thread(
            target=self._accept, args=(self.listener,), name="peer", daemon=True
        ).start()

    def _accept(self, listener: socket.socket) -> None:
        number = 0
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            number += 1
            sock.settimeout(SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, len(self.connections) + 1, sock)
            self.connections.append(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name=f"peer-{number}", daemon=True
            ).start()

    def _serve(self, connection: Connection) -> None:
        try:
            while self._serve_request(connection, connection.read_request()):
                pass
        except Gone:
            self.record({"conn": connection.number, "path": connection.path, "event": "tcp-eof"})
        finally:
            self.record({"conn": connection.number, "path": connection.path, "event": "closed"})
            connection.end()

    def _fault(self, path: str) -> str:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, path):
                fault.times -= 1
                return fault.kind
        return ""

    def _serve_request(self, connection: Connection, request: Request) -> bool:
        """Answer a request. Returns whether another may follow on this connection."""
        kind = self._fault(request.path)
        if kind == "silent":
            connection.ended.wait(SECONDS)
            return False
        if kind == "reset":
            connection.reset()
            return False
        if kind == "cut":
            raise Gone
        if kind.isdigit():
            self._respond(connection, int(kind), {"error": "out of order"})
            return True
        if request.headers.get("upgrade", "").lower() == "websocket":
            self._handshake(connection, request)
            self._websocket(connection, kind)
            return False
        status, answer = self._answer(request)
        self._respond(connection, status, answer)
        return True

    def _respond(self, connection: Connection, status: int, answer: Any) -> None:
        encoded = json.dumps(answer, separators=(",", ":")) if not isinstance(answer, bytes) else ""
        body = answer if isinstance(answer, bytes) else encoded.encode()
        location = f"Location: {self.url}/elsewhere\r\n" if 300 <= status < 400 else ""
        head = f"HTTP/1.1 {status} Status\r\n{location}Content-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        event = {"conn": connection.number, "event": "http-response", "status": status}
        self.record({**event, "body": body.decode("utf-8", "replace")})
        connection.write(head.encode() + body)

    def _handshake(self, connection: Connection, request: Request) -> None:
        key = hashlib.sha1((request.headers["sec-websocket-key"] + GUID).encode()).digest()
        accept = base64.b64encode(key).decode()
        head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        head += f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
        self.record({"conn": connection.number, "event": "http-response", "raw": head})
        connection.write(head.encode())

    def _websocket(self, connection: Connection, kind: str) -> None:
        connection.pongs = kind not in ("no-pong", "half-open")
        if connection.path == "/ws" and self.registers and kind != "half-open":
            self.register(connection)
        connection.open = True
        if kind == "half-open":
            connection.ended.wait(SECONDS)
            return
        if kind == "garbage":
            connection.raw(GARBAGE)
        if kind.startswith("close"):
            code = kind.partition("-")[2]
            connection.close(int(code) if code else None)
            return
        text = b""
        while True:
            frame, data, fin = connection.read_frame()
            if frame == "ping" and connection.pongs:
                with contextlib.suppress(Gone):  # earlier frames of the agent may still be unread
                    connection.send("pong", data)
            elif frame == "close":
                with contextlib.suppress(Gone):
                    connection.send("close", data)
                return
            elif frame in ("text", "binary", "continuation"):
                text += data
                if fin:
                    self._message(connection.path, text)
                    text = b""

    def _message(self, path: str, text: bytes) -> None:
        match = re.match(r"/api/v1/deploy/log/([0-9a-f-]+)", path)
        if match:
            self.logs.setdefault(match[1], []).append(json.loads(text)["line"])

    def _answer(self, request: Request) -> Answer:
        line = f"{request.method} {request.path}"
        for pattern, answer in self.answers:
            if re.search(pattern, line):
                return answer(request)
        match = re.match(r"PUT /api/v1/deploy/deployment/([0-9a-f-]+)/status", line)
        if match:
            return self._take_status(match[1], request.json())
        match = re.match(r"PUT /api/v1/deploy/log/([0-9a-f-]+)\?offset=(\d+)", line)
        if match:
            return self._take_log(match[1], int(match[2]), request.body)
        return 404, {"error": f"not found: {line}"}

    def _take_status(self, deployment_id: str, status: dict[str, Any]) -> Answer:
        self.statuses.setdefault(deployment_id, []).append(status)
        if deployment_id in self.cancelled:
            return 409, {"id": deployment_id, "status": "Cancelled"}
        return 200, {"id": deployment_id, "status": status["status"]}

    def _take_log(self, deployment_id: str, offset: int, body: bytes) -> Answer:
        log = self.logs.setdefault(deployment_id, [])
        if offset > len(log):
            return 416, {"next": len(log)}
        lines = [json.loads(line)["line"] for line in body.split(b"\n") if line.strip()]
        log += lines[len(log) - offset :]
        return 200, {"next": len(log)}


def message(tag: str, contents: dict[str, Any]) -> str:
    """Return a message from a workspace to an agent, as Cachix's backend writes it."""
    frame = {
        "method": tag,
        "command": {"tag": tag, "contents": contents},
        "agent": None,
        "id": str(uuid.uuid4()),
    }
    return json.dumps(frame, separators=(",", ":"))


def headers(head: str) -> list[tuple[str, str]]:
    """Return the headers of a recorded request, in order, without the random websocket key."""
    pairs = [line.split(": ", 1) for line in head.strip().split("\r\n")[1:]]
    return [(key, value) for key, value in pairs if key != "Sec-WebSocket-Key"]


def is_at(path: str, prefix: str) -> bool:
    """Whether a path has a prefix. /ws is only itself, not a prefix of /ws-deployment."""
    return path == prefix or (prefix != "/ws" and path.startswith(prefix))


def shape(value: Any) -> Any:
    """Return JSON without its values: the keys in their order, and the type of each value."""
    if isinstance(value, dict):
        return [(key, shape(part)) for key, part in value.items()]
    return value if isinstance(value, bool) else type(value).__name__


def outline(events: list[dict[str, Any]], path: str) -> list[Any]:
    """Return tags and shapes of a client's messages on the websockets at a path, in order."""
    texts = [
        e["payload"]
        for e in events
        if (e.get("dir"), e.get("frame")) == ("C->S", "text") and is_at(e["path"], path)
    ]
    messages = [json.loads(text) for text in texts]
    return [(message.get("method"), shape(message)) for message in messages]


def transcript(name: str) -> list[dict[str, Any]]:
    """Return the events of a recorded session of Cachix's client."""
    text = (PROJECT / f"tests/transcripts/{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
