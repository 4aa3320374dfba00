"""websocket-client's WebSocket, but it answers a close with the server's own code."""

from __future__ import annotations

from typing import Any, Optional

import websocket


class WebSocket(websocket.WebSocket):
    """A websocket whose answer to a close has the code that it received, as RFC 6455 advises."""

    def __init__(self) -> None:
        super().__init__(enable_multithread=True, skip_utf8_validation=True)
        self.close_code: Optional[bytes] = None  # as received; empty if the close had none

    def recv_frame(self) -> Any:
        """Receive a frame, and keep the code of a close."""
        frame = super().recv_frame()  # type: ignore[no-untyped-call]
        if frame and frame.opcode == websocket.ABNF.OPCODE_CLOSE:
            self.close_code = frame.data[:2]
        return frame

    def send_close(self, *arguments: Any, **options: Any) -> None:
        """Send a close. The library does so too whenever it has received one."""
        if self.close_code is None:
            super().send_close(*arguments, **options)
        else:
            self.connected = False
            self.send(self.close_code, websocket.ABNF.OPCODE_CLOSE)
