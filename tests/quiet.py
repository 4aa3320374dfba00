"""The HTTP server of scripted peers."""

from __future__ import annotations

import base64
import hashlib
import http.server
from typing import Any


class QuietServer(http.server.ThreadingHTTPServer):
    """A server that prints nothing about clients that leave, as many tests let theirs."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a traceback here would be one of the program's, to a test that looks."""


def switch_to_websocket(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Answer a client's handshake; what follows are frames."""
    key = handler.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    handler.send_response(101)
    handler.send_header("Upgrade", "websocket")
    handler.send_header("Connection", "Upgrade")
    accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
    handler.send_header("Sec-WebSocket-Accept", accept)
    handler.end_headers()
