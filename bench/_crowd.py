"""A crowd of clients in one process: `_crowd.py` takes commands from stdin, a JSON line each.

Each answer is a JSON line too. All moments are of the monotonic clock, which processes share.
"""

from __future__ import annotations

import base64
import json
import resource
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from _obey import obey

KEY = base64.b64encode(b"0123456789abcdef").decode()
AT_ONCE = 1000  # connections whose handshakes are not over
RETRY = 0.5  # seconds


@dataclass(eq=False)
class Client:
    """A websocket. `moments` are when texts came, `texts` how many, `refused` what was answered."""

    head: bytes
    port: int
    source: str
    will_return: bool = True
    sock: socket.socket | None = None
    buffer: bytes = b""
    is_open: bool = False
    texts: int = 0
    moments: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    retry_at: float = 0.0


class Crowd:
    """The clients, and the selector that they share."""

    def __init__(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.selector = selectors.DefaultSelector()
        self.clients: list[Client] = []
        self.waiting: list[Client] = []  # for their turn to connect
        self.under_way = 0
        self.lag: list[float] = []  # of lines that were seen
        self.keeps_lag = False

    def add(self, command: dict[str, Any]) -> None:
        """Have new clients connect."""
        for number in range(command["first"], command["first"] + command["count"]):
            fields = {
                **{"Host": "localhost", "Connection": "Upgrade", "Upgrade": "websocket"},
                **{"Sec-WebSocket-Key": KEY, "Sec-WebSocket-Version": "13"},
                **{"Authorization": f"Bearer {command['token']}", "system": "x86_64-linux"},
                **{"name": f"agent-{number}", "version": "0.1.0"},
                "User-Agent": "cachix-deploy/0.1.0",
            }
            paths = command["paths"]
            lines = [f"GET {paths[number % len(paths)]} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in fields.items()]
            source = f"127.0.0.{2 + number % 8}"
            head = "\r\n".join([*lines, "", ""]).encode()
            client = Client(head, command["port"], source, command.get("will_return", True))
            self.clients.append(client)
            self.waiting.append(client)

    def connect_some(self) -> None:
        """Let as many connect as may at once."""
        now = time.monotonic()
        rest: list[Client] = []
        while self.waiting and self.under_way < AT_ONCE:
            client = self.waiting.pop()
            if client.retry_at > now:
                rest.append(client)
                continue
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
            sock.bind((client.source, 0))
            sock.connect_ex(("127.0.0.1", client.port))
            client.sock, client.buffer, client.is_open = sock, b"", False
            self.under_way += 1
            self.selector.register(sock, selectors.EVENT_WRITE, client)
        self.waiting += rest

    def serve(self, seconds: float) -> None:
        """Serve all clients for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.connect_some()
            for key, mask in self.selector.select(min(left, 0.05)):
                if key.data is not None:
                    self._event(key.data, mask)

    def _event(self, client: Client, mask: int) -> None:
        assert client.sock is not None
        try:
            if mask & selectors.EVENT_WRITE:
                client.sock.send(client.head)
                self.selector.modify(client.sock, selectors.EVENT_READ, client)
                return
            data = client.sock.recv(1 << 16)
        except OSError as error:
            client.refused += [] if client.is_open else [type(error).__name__]
            data = b""
        if not data:
            self._lose(client)
            return
        client.buffer += data
        if not client.is_open:
            head, end, rest = client.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            self.under_way -= 1
            client.is_open, client.buffer = True, rest
            if not head.startswith(b"HTTP/1.1 101"):
                client.refused.append(head[:12].decode())
                self.under_way += 1
                client.is_open = False
                self._lose(client)
                return
        self._frames(client)

    def _frames(self, client: Client) -> None:
        data, place = client.buffer, 0
        while len(data) - place >= 2:
            opcode, size, start = data[place] & 15, data[place + 1], place + 2
            if size == 126:
                size, start = int.from_bytes(data[start : start + 2], "big"), start + 2
            elif size == 127:
                size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
            if len(data) < start + size:
                break
            if opcode == 1:
                client.texts += 1
                client.moments = [*client.moments[-1:], time.monotonic()]
                if self.keeps_lag:
                    sent = json.loads(data[start : start + size])["line"].partition(" ")[0]
                    self.lag.append(time.monotonic() - float(sent))
            elif opcode == 9 and client.sock is not None:
                client.sock.send(b"\x8a\x80\0\0\0\0")
            place = start + size
        client.buffer = data[place:]

    def _lose(self, client: Client) -> None:
        assert client.sock is not None
        self.selector.unregister(client.sock)
        client.sock.close()
        self.under_way -= 0 if client.is_open else 1
        client.is_open, client.sock = False, None
        if client.will_return:
            client.retry_at = time.monotonic() + RETRY
            self.waiting.append(client)

    def state(self, command: dict[str, Any]) -> dict[str, Any]:
        """How the newest `count` clients are."""
        some = self.clients[-command["count"] :]
        return {
            "open": sum(client.is_open for client in some),
            "texts": sum(client.texts for client in some),
            "at_least": sum(client.texts >= command.get("texts", 1) for client in some),
            "moments": [client.moments[-1] for client in some if client.moments],
            "refused": [reason for client in some for reason in client.refused],
            "lag": self.lag[-20_000:],
        }

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command."""
        kind = command["do"]
        if kind == "add":
            self.add(command)
        elif kind == "forget":
            for client in self.clients:
                client.texts, client.moments, client.refused = 0, [], []
            self.lag.clear()
        elif kind == "lag":
            self.keeps_lag = command["keep"]
        elif kind == "state":
            return self.state(command)
        return {}


def main() -> None:
    crowd = Crowd()
    crowd.selector.register(0, selectors.EVENT_READ, None)
    obey(crowd.serve, crowd.do)


if __name__ == "__main__":
    sys.exit(main())
