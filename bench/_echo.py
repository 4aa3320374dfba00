"""A bare server of websockets: one selector, no protocol beyond a handshake and frames.

`_echo.py` prints its port. A line `N` on stdin has it send all clients a text of N bytes, and print
the moment when it began.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import socket
import time

ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: 2IlncOyZC2YtLmiFbsX0hvGvuy8=\r\n\r\n"
)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    selector, socks = selectors.DefaultSelector(), set()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                with contextlib.suppress(BlockingIOError):
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    socks.add(sock)
                    selector.register(sock, selectors.EVENT_READ)
            elif key.fileobj == 0:
                line = os.read(0, 100)
                if not line:
                    return
                print(time.monotonic(), flush=True)
                size = int(line)
                frame = b"\x81\x7e" + size.to_bytes(2, "big") + b"x" * size
                for sock in socks:
                    sock.send(frame)
            else:
                sock = key.fileobj
                with contextlib.suppress(OSError):
                    if data := sock.recv(4096):
                        if data.startswith(b"GET "):
                            sock.send(ANSWER)
                        continue
                selector.unregister(sock)
                socks.discard(sock)
                sock.close()


if __name__ == "__main__":
    main()
