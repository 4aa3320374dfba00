"""A bare download: `_bare.py URL PATH` fetches the closure of a path, and gives it to Nix.

It asks for narinfos and archives on as many connections as Nix has, looks at nothing that it gets,
and writes it into `nix-store --import`: no signature, no root, no word on what happens. Paths that
the store has already are left out.
"""

from __future__ import annotations

import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import urllib.parse

CONNECTIONS = 25  # Nix's own default


class Connection:
    """A connection to a cache that is kept open."""

    def __init__(self, host: str, port: int) -> None:
        self.sock = socket.create_connection((host, port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray()

    def get(self, path: str) -> bytes:
        """Return the body of a file."""
        self.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            self.buffer += self.sock.recv(1 << 16)
        head = bytes(self.buffer[:end]).lower()
        assert head.startswith(b"http/1.1 200"), (path, head)
        start, size = end + 4, int(head.partition(b"content-length:")[2].split()[0])
        while len(self.buffer) < start + size:
            self.buffer += self.sock.recv(1 << 20)
        body = bytes(self.buffer[start : start + size])
        del self.buffer[: start + size]
        return body


class Download:
    """The closure of a path, as it arrives."""

    def __init__(self, url: str, path: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)
        self.names: set[str] = set()
        self.references: dict[str, list[str]] = {}
        self.archives: dict[str, bytes] = {}
        self.tasks: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.lock, self.open, self.done = threading.Lock(), 0, threading.Event()
        self.ask([os.path.basename(path)])
        for _ in range(CONNECTIONS):
            threading.Thread(target=self.work, daemon=True).start()
        if self.open:
            self.done.wait()

    def ask(self, names: list[str]) -> None:
        """Ask for the narinfos of names that are new."""
        with self.lock:
            fresh = {name for name in names if not os.path.lexists(f"/nix/store/{name}")}
            fresh -= self.names
            self.names |= fresh
            self.open += len(fresh)
        for name in fresh:
            self.tasks.put((name, f"/{name[:32]}.narinfo"))

    def work(self) -> None:
        """Fetch files on a connection (a thread)."""
        connection = Connection(self.host, self.port)
        while True:
            name, file = self.tasks.get()
            body = connection.get(file)
            if file.endswith(".narinfo"):
                lines = dict(line.split(": ", 1) for line in body.decode().splitlines())
                self.references[name] = lines["References"].split()
                self.ask(self.references[name])
                self.tasks.put((name, f"/{lines['URL']}"))
                continue
            with self.lock:
                self.archives[name] = body
                self.open -= 1
                if not self.open:
                    self.done.set()

    def exported(self) -> list[bytes]:
        """Return the closure as `nix-store --import` takes it, references first."""
        parts: list[bytes] = []
        left, placed = dict(self.references), set[str]()
        while left:
            ready = [name for name, refs in left.items() if not (set(refs) - {name}) & left.keys()]
            for name in ready:
                references = [f"/nix/store/{one}".encode() for one in sorted(left[name])]
                parts += [struct.pack("<Q", 1), self.archives[name], struct.pack("<Q", 0x4558494E)]
                parts += [text(f"/nix/store/{name}".encode()), struct.pack("<Q", len(references))]
                parts += [*map(text, references), text(b""), struct.pack("<Q", 0)]
            placed.update(ready)
            for name in ready:
                del left[name]
        return [*parts, struct.pack("<Q", 0)]


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data + b"\0" * (-len(data) % 8)


def main() -> None:
    download = Download(*sys.argv[1:3])
    argv = ["nix-store", "--import", "--option", "require-sigs", "false"]
    nix = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert nix.stdin is not None
    with nix.stdin as stdin:
        stdin.writelines(download.exported())
    sys.exit(nix.wait())


if __name__ == "__main__":
    main()
