"""Peers that write logs, drip, or take their time. `_strain.py` takes commands: JSON lines."""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from _obey import obey

SECOND = 1.0
RATE = 50_000  # bytes a second of a download or an upload
PATIENCE = 1.0  # seconds until a peer that was hung up on comes again


@dataclass(eq=False)
class Peer:
    """A connection, and what it does each second: bytes to send, bytes to read."""

    port: int
    source: str
    head: bytes
    part: Any  # makes the bytes of a second
    reads: int  # bytes a second; 0 for any number, at once
    due: float = 0.0
    sock: socket.socket | None = None
    began: bool = False
    total: int = 0
    left: bytes = b""
    last: bytes = field(default=b"", repr=False)


class Strain:
    """All peers."""

    def __init__(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.selector = selectors.DefaultSelector()
        self.peers: list[Peer] = []
        self.answers = self.lines = self.reconnected = 0

    def add(self, command: dict[str, Any]) -> None:
        """Add peers of a kind, spread over a second."""
        kind, count = command["kind"], command["count"]
        for number in range(count):
            source = f"127.0.0.{2 + number % 8}"
            head, part, reads = self.made(kind, number, command)
            peer = Peer(command["port"], source, head, part, reads)
            peer.due = time.monotonic() + number / count
            self.peers.append(peer)

    def made(self, kind: str, number: int, command: dict[str, Any]) -> tuple[bytes, Any, int]:
        """What a peer sends first and each second, and how fast it reads."""
        path, token = command.get("path", "/"), command.get("token", "")
        bearer = f"Authorization: Bearer {token}\r\n" if token else ""
        if kind == "head":
            return b"GET / HTTP/1.1\r\nHost: x\r\nX: ", iter(lambda: b"a", b""), 0
        if kind == "body":
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n{bearer}\r\n"
            return head.encode(), iter(lambda: b"x", b""), 0
        if kind == "download":
            head = f"GET {path} HTTP/1.1\r\nHost: x\r\n{bearer}\r\n"
            return head.encode(), iter(lambda: b"", None), command["rate"]
        if kind == "upload":
            name = f"{path}/{number:052}.nar"
            length = f"Content-Length: {RATE * 1000}"
            head = f"PUT {name} HTTP/1.1\r\nHost: x\r\n{length}\r\n{bearer}\r\n"
            return head.encode(), iter(lambda: b"x" * RATE, b""), 0
        deployment = command["deployments"][number]
        return b"", self.log(deployment, f"agent-{number}", bearer, command["lines"]), 0

    def log(self, deployment: str, name: str, bearer: str, count: int) -> Iterator[bytes]:
        """A request each second, with `count` lines that say when they were made."""
        offset = 0
        while True:
            now = time.monotonic()
            line = json.dumps({"line": f"{now} a line of some log or other", "time": "T"})
            body = f"{line}\n" * count
            self.lines += count
            path = f"/api/v1/deploy/log/{deployment}?offset={offset}"
            fields = f"Host: x\r\nname: {name}\r\n{bearer}Content-Length: {len(body)}\r\n\r\n"
            offset += count
            yield f"PUT {path} HTTP/1.1\r\n{fields}{body}".encode()

    def serve(self, seconds: float) -> None:
        """Let all peers do what they do."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            for peer in self.peers:
                if peer.due <= now:
                    # late once is not late ever after
                    peer.due = max(peer.due, now - SECOND) + SECOND
                    self.step(peer)
            for key, _ in self.selector.select(0.02):
                if key.data is not None:
                    self.read(key.data)

    def step(self, peer: Peer) -> None:
        """What a peer does in a second."""
        try:
            if peer.sock is None:
                peer.sock = socket.socket()
                if peer.reads:
                    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
                peer.sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
                peer.sock.bind((peer.source, 0))
                peer.sock.connect(("127.0.0.1", peer.port))
                peer.sock.setblocking(False)
                peer.left = peer.head
                if not peer.reads:
                    self.selector.register(peer.sock, selectors.EVENT_READ, peer)
            peer.left += next(peer.part)
            if peer.left:
                peer.left = peer.left[peer.sock.send(peer.left) :]
            if peer.reads and not peer.sock.recv(peer.reads):
                self.lose(peer)
        except BlockingIOError:
            return
        except OSError:
            self.lose(peer)

    def read(self, peer: Peer) -> None:
        """Read what has come."""
        assert peer.sock is not None
        try:
            data = peer.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lose(peer)
            return
        self.answers += data.count(b"HTTP/1.1 200")
        peer.last = data

    def lose(self, peer: Peer) -> None:
        """It was hung up on: it comes again."""
        assert peer.sock is not None
        if not peer.reads:
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(peer.sock)
        peer.sock.close()
        peer.sock, peer.due = None, time.monotonic() + PATIENCE
        self.reconnected += 1

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command."""
        if command["do"] == "add":
            self.add(command)
        elif command["do"] == "clear":
            self.peers = []
        return {
            "answers": self.answers,
            "lines": self.lines,
            "reconnected": self.reconnected,
            "held": sum(peer.sock is not None for peer in self.peers),
        }


def main() -> None:
    strain = Strain()
    obey(strain.serve, strain.do)


if __name__ == "__main__":
    sys.exit(main())
