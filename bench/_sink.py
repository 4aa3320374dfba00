"""A bare cache that takes all and keeps nothing, for pushes: `_sink.py` prints its port.

For each line on stdin it prints how many requests of each method it has answered.
"""

from __future__ import annotations

import asyncio
import collections
import json
import re
import sys

INFO = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
counts: collections.Counter[str] = collections.Counter()


class Sink(asyncio.Protocol):
    """A connection with requests that follow each other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.data, self.left = transport, b"", 0

    def data_received(self, data: bytes) -> None:
        while data:
            if self.left:
                skipped = min(self.left, len(data))
                self.left, data = self.left - skipped, data[skipped:]
                if not self.left:
                    self._answer(b"201 Created", b"")
                continue
            self.data, data = self.data + data, b""
            head, end, rest = self.data.partition(b"\r\n\r\n")
            if end:
                self.data, data = b"", rest
                self._begin(head)

    def _begin(self, head: bytes) -> None:
        method = head.split(b" ", 1)[0].decode()
        counts[method] += 1
        length = LENGTH.search(head)
        if b"\r\nExpect:" in head:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if method == "PUT":
            self.left = int(length[1]) if length else 0
            if not self.left:
                self._answer(b"201 Created", b"")
        elif b"/nix-cache-info " in head:
            self._answer(b"200 OK", INFO if method == "GET" else b"")
        else:
            self._answer(b"404 Not Found", b"")

    def _answer(self, status: bytes, body: bytes) -> None:
        self.transport.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
        self.transport.write(body)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Sink, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
