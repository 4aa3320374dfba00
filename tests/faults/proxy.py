"""A network on order: a TCP proxy between an agent and a workspace that knows where each message begins and ends.

A message is an HTTP request, the answer to one, or a websocket frame. Its label begins with `>` from the agent and `<`
from the workspace: `> PUT /api/v1/deploy/log/ID?offset=0`, `< 200 PUT /api/v1/...`, `> GET /ws`, `< 101 GET /ws`,
`< ws /ws text`, `> ws /ws-deployment ping`.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Optional, Union

from peer import OPCODES

# What may happen to a message: the connection ends before it, by FIN or by RST; it is forwarded late; half of it is,
# and then the connection ends; nothing is forwarded any more, and nobody is told.
FAULTS = ("cut", "reset", "delay", "truncate", "half-open")
KINDS = (*FAULTS, "slow", "stall")  # byte by byte; what follows the head is not even read


@dataclass(frozen=True)
class Answer:
    """What the agent gets in the place of the workspace's answer to a request."""

    status: int
    headers: str = "Content-Type: text/html\r\n"
    body: bytes = b"<h1>out of order</h1>"

    def raw(self) -> bytes:
        head = f"HTTP/1.1 {self.status} S\r\n{self.headers}Content-Length: {len(self.body)}\r\n\r\n"
        return head.encode() + self.body


Kind = Union[str, Answer]


@dataclass
class Order:
    """What is to happen to messages whose label matches, so many times."""

    pattern: str
    kind: Kind
    times: int = 1


@dataclass(frozen=True)
class Seen:
    """A message that came to the proxy, and what was done to it (None: it was forwarded)."""

    time: float
    label: str
    kind: Optional[Kind]


class Ended(Exception):
    """The connection is over, as far as one direction of it knows."""


class Stream:
    """What comes from one side, in pieces of known sizes."""

    def __init__(self, source: socket.socket) -> None:
        self.source, self.buffer = source, b""

    def more(self) -> None:
        part = self.source.recv(1 << 16)
        if not part:
            raise Ended
        self.buffer += part

    def take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            self.more()
        return self.take(self.buffer.index(mark) + len(mark))

    def body(self, head: bytes) -> bytes:
        """The body that belongs to the head of a request or an answer."""
        if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
            body = b""
            while True:
                line = self.until(b"\r\n")
                body += line + self.take(int(line, 16) + 2)
                if int(line, 16) == 0:
                    return body
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        return self.take(int(length[1])) if length else b""

    def frame(self) -> tuple[str, bytes]:
        """Kind and bytes of a websocket frame."""
        head = self.take(2)
        size = head[1] & 127
        if size > 125:
            head += self.take(2 if size == 126 else 8)
            size = int.from_bytes(head[2:], "big")
        return OPCODES[head[0] & 15], head + self.take(size + (4 if head[1] & 128 else 0))


class Connection:
    """An agent's connection and the one to the workspace that belongs to it."""

    def __init__(self, proxy: Proxy, agent: socket.socket, workspace: socket.socket) -> None:
        self.proxy, self.agent, self.workspace = proxy, agent, workspace
        self.requests: list[str] = []  # those that wait for their answers
        self.frames = ""  # the path of a websocket, from its handshake on
        self.held = False

    def start(self) -> None:
        """Begin to forward."""
        for mark, source, target in (
            (">", self.agent, self.workspace),
            ("<", self.workspace, self.agent),
        ):
            kw = {"args": (mark, Stream(source), target), "name": f"proxy {mark}", "daemon": True}
            threading.Thread(target=self._pump, **kw).start()  # type: ignore[arg-type]

    def _pump(self, mark: str, stream: Stream, target: socket.socket) -> None:
        try:
            while not self.held:
                self._forward(target, *self._message(mark, stream))
        except (OSError, Ended):
            if not self.held:
                self.end()

    def _message(self, mark: str, stream: Stream) -> tuple[bytes, Optional[Kind]]:
        """The next message, and what is to happen to it."""
        if self.frames and (mark == ">" or not self.requests):
            kind, data = stream.frame()
            return data, self.proxy.fault(f"{mark} ws {self.frames} {kind}")
        head = stream.until(b"\r\n\r\n")
        first = head.split(b"\r\n")[0].decode().split(" ")
        label = f"> {first[0]} {first[1]}" if mark == ">" else f"< {first[1]} {self.requests[0]}"
        fault = self.proxy.fault(label)
        data = head if fault == "stall" else head + stream.body(head)
        if mark == "<":
            self.requests.pop(0)
        elif not isinstance(fault, Answer):
            self.requests.append(label[2:])
            if re.search(rb"(?i)\r\nupgrade: *websocket", head):
                self.frames = first[1]
        return data, fault

    def _forward(self, target: socket.socket, data: bytes, fault: Optional[Kind]) -> None:
        if isinstance(fault, Answer):
            self.agent.sendall(fault.raw())
            return
        if fault in ("cut", "reset"):
            self.end(reset=fault == "reset")
        elif fault in ("half-open", "stall"):
            self.held = True
        if self.held:
            return
        if fault == "delay":
            self.proxy.closing.wait(self.proxy.delay)
        if fault == "truncate":
            target.sendall(data[: len(data) // 2])
            self.end()
        pieces = [data[i : i + 1] for i in range(len(data))] if fault == "slow" else [data]
        for piece in pieces:
            target.sendall(piece)
            if fault == "slow" and self.proxy.closing.wait(self.proxy.pace):
                raise Ended

    def end(self, reset: bool = False) -> None:
        """End both sides."""
        for side in (self.agent, self.workspace):
            with contextlib.suppress(OSError):
                if reset:
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                side.shutdown(
                    socket.SHUT_RD if reset else socket.SHUT_RDWR
                )  # wakes the thread that reads
            side.close()


class Proxy:
    """Listens at `url` for agents. Use it as a context manager."""

    def __init__(self, target: str) -> None:
        self.target = int(target.rpartition(":")[2])
        self.orders: list[Order] = []
        self.seen: list[Seen] = []
        self.connections: list[Connection] = []
        self.delay = 1.0  # seconds
        self.pace = 0.2  # seconds for each byte of what is slow: no limit of a packet may notice
        self.closing = threading.Event()
        self.port = 0
        self.listen()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.refuse()

    def listen(self) -> None:
        """Take connections, on the same port as before."""
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = self.listener.getsockname()[1]
        threading.Thread(
            target=self._accept, args=(self.listener,), name="proxy", daemon=True
        ).start()

    def refuse(self) -> None:
        """Take no more connections, and end those that there are: as if the workspace were down."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            connection.end()

    def order(self, pattern: str, kind: Kind, times: int = 1) -> Order:
        """Do this to messages whose label matches; the latest order that matches counts."""
        assert isinstance(kind, Answer) or kind in KINDS
        made = Order(pattern, kind, times)
        self.orders.insert(0, made)
        return made

    def heal(self) -> None:
        """Forward all that comes from now on; what is held stays held."""
        self.orders.clear()

    def count(self, pattern: str) -> int:
        """How many messages with such a label have come."""
        return sum(bool(re.search(pattern, one.label)) for one in list(self.seen))

    def fault(self, label: str) -> Optional[Kind]:
        """What is to happen to a message."""
        found = next(
            (one for one in self.orders if one.times > 0 and re.search(one.pattern, label)), None
        )
        if found is not None:
            found.times -= 1
        self.seen.append(Seen(time.monotonic(), label, found.kind if found else None))
        return found.kind if found else None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                agent, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):  # the workspace is down
                workspace = socket.create_connection(("127.0.0.1", self.target), 5)
                workspace.settimeout(None)
                for side in (agent, workspace):
                    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(self, agent, workspace)
                self.connections.append(connection)
                if (
                    listener.fileno() < 0
                ):  # refused meanwhile: the others were ended before this was among them
                    connection.end()
                connection.start()
                continue
            agent.close()
