"""A TCP proxy between an agent and a workspace that breaks the network at a chosen message.

A message is an HTTP request, the answer to one, or a websocket frame. Its label begins with `>` if
the agent has sent it, and with `<` if the workspace has: `> PUT /api/v1/deploy/log/ID?offset=0`,
`< 200 PUT /api/v1/...`, `> GET /ws`, `< 101 GET /ws`, `< ws /ws text`, `> ws /ws-deployment ping`.
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

# What may happen to a message. cut, reset: the connection ends before it, by FIN or RST. delay: it
# is forwarded late. truncate: half of it is forwarded, then the connection ends. half-open: nothing
# is forwarded any more, and the connection stays open.
FAULTS = ("cut", "reset", "delay", "truncate", "half-open")
# Also, slow: it is forwarded byte by byte. stall: only its head is read.
KINDS = (*FAULTS, "slow", "stall")


@dataclass(frozen=True)
class Answer:
    """An answer that the agent gets instead of the workspace's."""

    status: int
    headers: str = "Content-Type: text/html\r\n"
    body: bytes = b"<h1>out of order</h1>"

    def raw(self) -> bytes:
        head = f"HTTP/1.1 {self.status} S\r\n{self.headers}Content-Length: {len(self.body)}\r\n\r\n"
        return head.encode() + self.body


Kind = Union[str, Answer]


@dataclass
class Order:
    """The fault that meets messages whose label matches, `times` times."""

    pattern: str
    kind: Kind
    times: int = 1


@dataclass(frozen=True)
class Seen:
    """A message that came to the proxy, and what happened to it (None: it was forwarded)."""

    time: float
    label: str
    kind: Optional[Kind]


class Ended(Exception):
    """One direction of a connection has ended."""


class Stream:
    """The bytes from one side, read in pieces."""

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
        """Read the body that belongs to the head of a request or an answer."""
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
        """Read a websocket frame; return its kind and all its bytes."""
        head = self.take(2)
        size = head[1] & 127
        if size > 125:
            head += self.take(2 if size == 126 else 8)
            size = int.from_bytes(head[2:], "big")
        return OPCODES[head[0] & 15], head + self.take(size + (4 if head[1] & 128 else 0))


class Connection:
    """A connection of the agent, and the proxy's own one to the workspace for it."""

    def __init__(self, proxy: Proxy, agent: socket.socket, workspace: socket.socket) -> None:
        self.proxy, self.agent, self.workspace = proxy, agent, workspace
        self.requests: list[str] = []  # those without an answer so far
        self.frames = ""  # the path of the websocket, once there is one
        self.stalled = False

    def start(self) -> None:
        """Start to forward in both directions."""
        for mark, source, target in (
            (">", self.agent, self.workspace),
            ("<", self.workspace, self.agent),
        ):
            kw = {"args": (mark, Stream(source), target), "name": f"proxy {mark}", "daemon": True}
            threading.Thread(target=self._pump, **kw).start()  # type: ignore[arg-type]

    def _pump(self, mark: str, stream: Stream, target: socket.socket) -> None:
        try:
            while not self.stalled:
                self._forward(target, *self._message(mark, stream))
        except (OSError, Ended):
            if not self.stalled:
                self.end()

    def _message(self, mark: str, stream: Stream) -> tuple[bytes, Optional[Kind]]:
        """Read the next message; return it, and what must happen to it."""
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
            self.stalled = True
        if self.stalled:
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
                # This wakes the reading thread; after a reset nothing may be sent.
                side.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
            side.close()


class Proxy:
    """Listens at `url` for agents. Use it as a context manager."""

    def __init__(self, target: str) -> None:
        self.target = int(target.rpartition(":")[2])
        self.orders: list[Order] = []
        self.seen: list[Seen] = []
        self.connections: list[Connection] = []
        self.delay = 1.0  # seconds
        self.pace = 0.2  # seconds for each byte of a slow message: no limit of a read may notice
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
        """Accept connections, on the same port as before."""
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = self.listener.getsockname()[1]
        threading.Thread(
            target=self._accept, args=(self.listener,), name="proxy", daemon=True
        ).start()

    def refuse(self) -> None:
        """End all connections and refuse new ones, as if the workspace were down."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            connection.end()

    def order(self, pattern: str, kind: Kind, times: int = 1) -> Order:
        """Break messages whose label matches; the latest order that matches counts."""
        assert isinstance(kind, Answer) or kind in KINDS
        order = Order(pattern, kind, times)
        self.orders.insert(0, order)
        return order

    def heal(self) -> None:
        """Forward all further messages; connections that are half-open or stalled stay so."""
        self.orders.clear()

    def count(self, pattern: str) -> int:
        """Return the number of messages so far whose label matches."""
        return sum(bool(re.search(pattern, message.label)) for message in list(self.seen))

    def fault(self, label: str) -> Optional[Kind]:
        """Return what must happen to a message, and record it."""
        kind = None
        for order in list(self.orders):
            if order.times > 0 and re.search(order.pattern, label):
                order.times -= 1
                kind = order.kind
                break
        self.seen.append(Seen(time.monotonic(), label, kind))
        return kind

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
                # `refuse` may have ended all others just before this one was among them.
                if listener.fileno() < 0:
                    connection.end()
                connection.start()
                continue
            agent.close()
