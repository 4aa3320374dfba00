"""Shared by the workspace's tests: a real server in a subprocess, and peers on raw sockets."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clusters
import requests

from cachix_workspace import tokens
from cachix_workspace.database import open_database
from cachix_workspace.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TRANSCRIPTS = Path(__file__).resolve().parent / "transcripts"
DEADLINE = 30.0  # seconds for anything that a test waits for
OURS = {"User-Agent": "cachix-deploy/0.1.0"}  # the header by which agents of ours are told apart
STORE_PATHS = [f"/nix/store/{letter * 32}-system-{letter}" for letter in "abcdf"]
WITH_SETTINGS = """
import sys
from pathlib import Path
from cachix_workspace import server
from cachix_workspace.settings import Settings
listener = server.bind("127.0.0.1:0")
settings = Settings(Path(sys.argv[1]), server.url_of(listener), **eval(sys.argv[2]))
sys.exit(server.serve(settings, listener))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


class Server:
    """`cachix-workspace serve` on a free port, with its own data directory.

    `settings` reach what no option does.
    """

    def __init__(self, data: Path, *options: str, **settings: float) -> None:
        self.data = data
        clusters.provide(data)
        serve = ["-m", "cachix_workspace", "serve", f"--data={data}", "--listen=127.0.0.1:0"]
        self.argv = [sys.executable, *serve, *options]
        if settings:
            self.argv = [sys.executable, "-c", WITH_SETTINGS, str(data), repr(settings)]
        self.lines: list[str] = []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.argv, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started = threading.Event()
        arguments = (self.process.stderr, started)
        threading.Thread(target=self._read, args=arguments, daemon=True).start()
        has_started = started.wait(DEADLINE)
        url = [line for line in self.lines if line.startswith("listening on ")]
        if not has_started or not url:
            self.kill()  # no test would
        assert has_started and url, self.lines
        self.url = url[-1].split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def _read(self, stream: Any, started: threading.Event) -> None:
        for line in stream:
            self.lines.append(line.rstrip())
            if line.startswith("listening on "):
                started.set()
        started.set()

    def token(self, kind: str, secret: str | None = None) -> str:
        return self.new_token(kind, secret)[1]

    def new_token(
        self, kind: str, secret: str | None = None, days: float | None = None
    ) -> tuple[int, str]:
        database = open_database(Settings(self.data))
        with database.write() as connection:
            number, secret = tokens.create(connection, kind, secret=secret, expires_in=days)
        database.close()
        return number, secret

    def command(self, *arguments: str, status: int = 0) -> str:
        """stdout of `cachix-workspace ARGUMENTS`, run beside the server."""
        return command(*arguments, f"--data={self.data}", status=status).stdout

    def stop(self, signal: int = 15) -> int:
        self.process.send_signal(signal)
        return self.process.wait(DEADLINE)

    def kill(self) -> None:
        """End both processes at once, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.process.pid, 9)
        self.process.wait(DEADLINE)


def command(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    data = clusters.data_of(arguments)
    if data is not None:
        clusters.provide(data)
    argv = [sys.executable, "-m", "cachix_workspace", *arguments]
    process = subprocess.run(
        argv, env=environment(), capture_output=True, text=True, timeout=3 * DEADLINE, check=False
    )
    assert process.returncode == status, process
    return process


@contextlib.contextmanager
def running(*options: str, **settings: float) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory, "data"), *options, **settings)
        try:
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()


def wait_for(condition: Any, timeout: float = DEADLINE) -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"the condition was still false after {timeout:.0f} s")


# --- websockets, frame by frame -------------------------------------------------------------------

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
OPCODES = {"text": TEXT, "close": CLOSE, "ping": PING, "pong": PONG}


class Connection:
    """A TCP connection on which a test writes bytes.

    Frames that arrive are kept until a test expects their kind.
    """

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.buffer = b""
        self.frames: deque[tuple[int, bytes]] = deque()
        self.compressed = False

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_frame(self, opcode: int, payload: bytes, final: bool = True) -> None:
        mask = b"\1\2\3\4"
        size = len(payload)
        if size < 126:
            length = bytes([0x80 | size])
        elif size < 1 << 16:
            length = b"\xfe" + struct.pack("!H", size)
        else:
            length = b"\xff" + struct.pack("!Q", size)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self.send(bytes([(0x80 if final else 0) | opcode]) + length + mask + masked)

    def send_text(self, value: Any) -> None:
        self.send_frame(TEXT, (value if isinstance(value, str) else json.dumps(value)).encode())

    def read(self, count: int, timeout: float = DEADLINE) -> bytes:
        deadline = time.monotonic() + timeout
        while len(self.buffer) < count:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError(self.buffer)
            self.buffer += data
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def read_head(self) -> str:
        while b"\r\n\r\n" not in self.buffer:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError(self.buffer)
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head.decode()

    def read_body(self, head: str) -> bytes:
        fields = [line.lower().split(":") for line in head.split("\r\n")]
        return self.read(next(int(field[1]) for field in fields if field[0] == "content-length"))

    def next_frame(self, timeout: float = DEADLINE) -> tuple[int, bytes]:
        first, second = self.read(2, timeout)
        assert first & 0x70 == 0, "compressed, or a reserved bit is set"
        assert first & 0x80 and not second & 0x80, "fragmented or masked"
        size = second & 0x7F
        if size >= 126:
            size = int.from_bytes(self.read(2 if size == 126 else 8), "big")
        return first & 0x0F, self.read(size)

    def expect(self, opcode: int, timeout: float = DEADLINE) -> bytes:
        """The payload of the first frame of this kind; the others are kept."""
        for frame in self.frames:
            if frame[0] == opcode:
                self.frames.remove(frame)
                return frame[1]
        deadline = time.monotonic() + timeout
        while True:
            frame = self.next_frame(deadline - time.monotonic())
            if frame[0] == opcode:
                return frame[1]
            self.frames.append(frame)

    def expect_text(self, timeout: float = DEADLINE) -> Any:
        return json.loads(self.expect(TEXT, timeout))

    def expect_close(self, timeout: float = DEADLINE) -> int:
        """The close code; the close is answered."""
        payload = self.expect(CLOSE, timeout)
        with contextlib.suppress(OSError):
            self.send_frame(CLOSE, payload[:2])
        return int.from_bytes(payload[:2], "big")

    def is_silent(self, seconds: float = 0.3) -> bool:
        """Whether no text comes for so long."""
        try:
            self.expect(TEXT, seconds)
        except (TimeoutError, socket.timeout):
            return True
        return False

    def close(self) -> None:
        self.socket.close()


def handshake(path: str, token: str, **headers: str) -> bytes:
    fields = {
        "Host": "localhost",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": base64.b64encode(b"0123456789abcdef").decode(),
        "Sec-WebSocket-Version": "13",
        "Authorization": f"Bearer {token}",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def accept_key(key: str) -> str:
    """The answer of a server to a Sec-WebSocket-Key."""
    digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
    return base64.b64encode(digest).decode()


def open_socket(server: Server, path: str, token: str, **headers: str) -> Connection:
    connection = Connection(server.port)
    connection.send(handshake(path, token, **headers))
    head = connection.read_head()
    assert head.startswith("HTTP/1.1 101"), head
    return connection


class Peer:
    """A workspace with an agent token and an activate token, and the messages of agents and CI."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.agent_token, self.ci_token = server.token("agent"), server.token("activate")

    def agent(self, name: str, path: str = "/ws", **headers: str) -> Connection:
        fields = {"name": name, "version": "1.11.1", "system": "x86_64-linux"}
        return open_socket(self.server, path, self.agent_token, **{**fields, **headers})

    def registered(self, name: str, **headers: str) -> Connection:
        connection = self.agent(name, **headers)
        assert connection.expect_text()["method"] == "AgentRegistered"
        return connection

    def http(
        self, method: str, path: str, token: str | None = None, **options: Any
    ) -> requests.Response:
        headers = {
            "Authorization": f"Bearer {token or self.ci_token}",
            **options.pop("headers", {}),
        }
        return requests.request(
            method, self.server.url + path, headers=headers, timeout=DEADLINE, **options
        )

    def activate(
        self, spec: dict[str, str], scripts: dict[str, str] | None = None
    ) -> dict[str, str]:
        """Order deployments as CI does; their ids by agent."""
        body = {"agents": spec, **({"rollbackScript": scripts} if scripts else {})}
        answer = self.http("POST", "/api/v2/deploy/activate?", json=body)
        assert answer.status_code == 200, answer.text
        return {name: ordered["id"] for name, ordered in answer.json()["agents"].items()}

    def status(self, deployment: str) -> dict[str, Any]:
        answer = self.http("GET", f"/api/v1/deploy/deployment/{deployment}?")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def report(self, name: str, deployment: str, status: str, **more: Any) -> requests.Response:
        body = {
            "status": status,
            "time": "2026-11-24T01:02:03.000004Z",
            "closureSize": None,
            "reason": None,
            **more,
        }
        path = f"/api/v1/deploy/deployment/{deployment}/status"
        return self.http("PUT", path, self.agent_token, json=body, headers={"name": name})

    def log(self, name: str, deployment: str, offset: int, lines: list[str]) -> requests.Response:
        records = [{"line": line, "time": "2026-11-24T01:02:03Z"} for line in lines]
        body = "".join(json.dumps(record) + "\n" for record in records)
        path = f"/api/v1/deploy/log/{deployment}?offset={offset}"
        return self.http("PUT", path, self.agent_token, data=body.encode(), headers={"name": name})

    def view(self, deployment: str) -> Connection:
        return open_socket(self.server, f"/api/v1/deploy/log/{deployment}?view=true", self.ci_token)

    def lines(self, deployment: str) -> list[str]:
        lines: list[str] = []
        while True:
            answer = self.http("GET", f"/api/v1/deploy/log/{deployment}?offset={len(lines)}").json()
            if not answer["lines"]:
                return lines
            lines += [line["line"] for line in answer["lines"]]
            assert answer["next"] == len(lines)
