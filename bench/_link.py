"""A binary cache behind a slow link, in its own process: `_link.py DIRECTORY` prints two ports.

The first port is the cache's own, the second one leads to it over the link. With another port as an
argument a third one leads to that, over the link too. All files are held in
memory, as servers are not measured here. The link delays data by 10 ms each way, or by as many as
the third argument says, at any bandwidth.
It delays the first data of a connection by another round trip, for the TCP handshake, which on
127.0.0.1 is over before a proxy sees the connection.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Optional

delay = 0.010  # seconds each way


class Files(asyncio.Protocol):
    """An HTTP server for GET and HEAD with persistent connections."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        self.answers, self.text = answers, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.text += data
        while b"\r\n\r\n" in self.text:
            head, _, self.text = self.text.partition(b"\r\n\r\n")
            method, path, _ = head.split(b" ", 2)
            body = self.answers.get(path)
            status = b"404 Not Found" if body is None else b"200 OK"
            body = body or b""
            self.transport.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
            if method == b"GET":
                self.transport.write(body)


class End(asyncio.Protocol):
    """One end of a connection through the link. It sends what the other end has received, later."""

    def __init__(self, loop: asyncio.AbstractEventLoop, port: Optional[int]) -> None:
        self.loop, self.port = loop, port
        self.transport: Optional[asyncio.Transport] = None
        self.other: Optional[End] = None
        self.usable = 0.0  # the time at which the handshake would be over
        self.early: list[Optional[bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        for data in self.early:
            self.send(data)
        if self.port is not None:
            self.usable = self.loop.time() + 2 * delay
            self.other = far = End(self.loop, None)
            far.other = self
            # Over long before the first data are due. The reference keeps the task alive.
            connecting = self.loop.create_connection(lambda: far, "127.0.0.1", self.port)
            self.task = self.loop.create_task(connecting)

    def data_received(self, data: bytes) -> None:
        self.forward(data)

    def connection_lost(self, _: Optional[Exception]) -> None:
        self.forward(None)

    def forward(self, data: Optional[bytes]) -> None:
        """Let the other end send data, or close (None), after the delay."""
        assert self.other is not None
        self.usable = max(self.loop.time(), self.usable + 1e-6)  # timers of one time have no order
        self.loop.call_at(self.usable + delay, self.other.send, data)

    def send(self, data: Optional[bytes]) -> None:
        if self.transport is None:  # on a busy machine it is not connected yet
            self.early.append(data)
            return
        if self.transport.is_closing():
            return
        if data is None:
            self.transport.close()
        else:
            self.transport.write(data)


async def serve(directory: Path, other: int) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    answers = {f"/{path.relative_to(directory)}".encode(): path.read_bytes() for path in files}
    loop = asyncio.get_running_loop()
    near = await loop.create_server(lambda: Files(answers), "127.0.0.1", 0, backlog=1024)
    port = near.sockets[0].getsockname()[1]
    link = await loop.create_server(lambda: End(loop, port), "127.0.0.1", 0, backlog=1024)
    more = await loop.create_server(lambda: End(loop, other), "127.0.0.1", 0, backlog=1024)
    print(port, *(one.sockets[0].getsockname()[1] for one in (link, more)), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until the parent ends


if __name__ == "__main__":
    if sys.argv[3:]:
        delay = float(sys.argv[3]) / 1000
    asyncio.run(serve(Path(sys.argv[1]), int((sys.argv[2:] or ["0"])[0])))
