"""A binary cache behind a slow link, in a process of its own: `_link.py DIRECTORY` prints two ports and serves.

The files are held in memory, as this is not about servers. The link delays what it carries by 10 ms each way, however
much there is, and what a new connection carries first by a round trip more: the TCP handshake, which on 127.0.0.1 is
over before a proxy hears of it.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Optional

DELAY = 0.010  # seconds each way


class Files(asyncio.Protocol):
    """An HTTP server for GET and HEAD that keeps its connections open."""

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
    """One end of a connection through the link; what it hears, the other says later."""

    def __init__(self, loop: asyncio.AbstractEventLoop, port: Optional[int]) -> None:
        self.loop, self.port = loop, port
        self.transport: Optional[asyncio.Transport] = None
        self.other: Optional[End] = None
        self.usable = 0.0  # until when the handshake would take

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.port is not None:
            self.usable = self.loop.time() + 2 * DELAY
            self.other = far = End(self.loop, None)
            far.other = self
            connecting = self.loop.create_connection(lambda: far, "127.0.0.1", self.port)
            self.task = self.loop.create_task(
                connecting
            )  # kept: it is over long before anything is to be said

    def data_received(self, data: bytes) -> None:
        self.later(data)

    def connection_lost(self, _: Optional[Exception]) -> None:
        self.later(None)

    def later(self, data: Optional[bytes]) -> None:
        assert self.other is not None
        self.loop.call_at(max(self.loop.time(), self.usable) + DELAY, self.other.say, data)

    def say(self, data: Optional[bytes]) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if data is None:
            self.transport.close()
        else:
            self.transport.write(data)


async def serve(directory: Path) -> None:
    found = [path for path in directory.rglob("*") if path.is_file()]
    answers = {f"/{path.relative_to(directory)}".encode(): path.read_bytes() for path in found}
    loop = asyncio.get_running_loop()
    near = await loop.create_server(lambda: Files(answers), "127.0.0.1", 0, backlog=1024)
    port = near.sockets[0].getsockname()[1]
    link = await loop.create_server(lambda: End(loop, port), "127.0.0.1", 0, backlog=1024)
    print(port, link.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until who started it ends


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
