"""websocket-client's WebSocket, with an end to the memory that it takes for a message."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any, Optional

import websocket

MOST_FRAGMENTS = 4096  # of a message
BLOCK = 1 << 16  # bytes offered to the kernel at a time
FINAL, MASKED = 0x80, 0x80  # bits of a frame's first and second byte, RFC 6455 section 5.2


class TooLarge(websocket.WebSocketException):
    """A message, or what is announced of it, is larger than the limit."""


class _Frames(websocket.frame_buffer):
    """Frames as they are received, none of which is larger than `limit` bytes."""

    limit: int

    def recv_length(self) -> None:
        """Receive the length of a frame. Raises TooLarge."""
        super().recv_length()
        if self.length is not None and self.length > self.limit:
            self.length, self.limit = 0, -1  # nothing more is read
            raise TooLarge


class WebSocket(websocket.WebSocket):
    """A websocket that takes messages of at most `limit` bytes.

    Its answer to a close has the code that it received, as RFC 6455 advises.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(enable_multithread=True, skip_utf8_validation=True)
        self.limit, self.size, self.fragments = limit, 0, 0  # of the message that is received
        self.frame_buffer = _Frames(self._recv, True)
        self.frame_buffer.limit = limit
        self.close_code: Optional[bytes] = None  # as received; empty if the close had none

    def send_all(self, frames: Sequence[tuple[int, bytes]], timeout: float) -> None:
        """Send frames, each an opcode with its payload, in large writes. Raises TimeoutError too.

        The library takes a call and a write for each, which costs a log ten times as much.
        """
        deadline, data, sent = time.monotonic() + timeout, masked(frames), 0
        with self.lock:
            while sent < len(data):
                if time.monotonic() > deadline:
                    raise TimeoutError("the peer reads too slowly")
                sent += self._send(data[sent : sent + BLOCK])

    def recv_frame(self) -> Any:
        """Receive a frame, and keep the code of a close. Raises TooLarge."""
        try:
            frame = super().recv_frame()  # type: ignore[no-untyped-call]
            if frame:
                self.count(frame)
        except TooLarge:
            with contextlib.suppress(OSError, ValueError, websocket.WebSocketException):
                self.send_close(websocket.STATUS_MESSAGE_TOO_BIG)
            self.shutdown()  # type: ignore[no-untyped-call]  # or its sender would wait for us
            raise TooLarge(f"a message of more than {self.limit >> 20} MiB") from None
        if frame and frame.opcode == websocket.ABNF.OPCODE_CLOSE:
            self.close_code = frame.data[:2]
        return frame

    def count(self, frame: Any) -> None:
        """Add a frame to the message that it belongs to. Raises TooLarge."""
        if frame.opcode >= websocket.ABNF.OPCODE_CLOSE:  # those that control belong to none
            return
        self.size += len(frame.data)
        self.fragments += 1
        if self.size > self.limit or self.fragments > MOST_FRAGMENTS:
            raise TooLarge
        if frame.fin:
            self.size = self.fragments = 0

    def send_close(self, *arguments: Any, **options: Any) -> None:
        """Send a close. The library does so too whenever it has received one."""
        if self.close_code is None:
            super().send_close(*arguments, **options)
        else:
            self.connected = False
            self.send(self.close_code, websocket.ABNF.OPCODE_CLOSE)


def masked(frames: Sequence[tuple[int, bytes]]) -> bytes:
    """Frames as a client sends them. All bytes are masked at once: those of headers by zeros."""
    keys = os.urandom(4 * len(frames))
    plain: list[bytes] = []
    masks: list[bytes] = []
    for number, (opcode, payload) in enumerate(frames):
        size, key = len(payload), keys[4 * number : 4 * number + 4]
        header = _header(opcode, size) + key
        plain += (header, payload)
        masks += (bytes(len(header)), (key * (size // 4 + 1))[:size])
    whole = b"".join(plain)
    result = int.from_bytes(whole, "little") ^ int.from_bytes(b"".join(masks), "little")
    return result.to_bytes(len(whole), "little")


def _header(opcode: int, size: int) -> bytes:
    if size < 126:
        return bytes((FINAL | opcode, MASKED | size))
    if size < 1 << 16:
        return bytes((FINAL | opcode, MASKED | 126)) + size.to_bytes(2, "big")
    return bytes((FINAL | opcode, MASKED | 127)) + size.to_bytes(8, "big")
