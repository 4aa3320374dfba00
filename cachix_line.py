"""Requests to a binary cache over a connection that is kept open, and their repetition.

`http.client` costs a third of what requests does, which counts with thousands of small files.
"""

from __future__ import annotations

import base64
import http.client
import io
import socket
import threading
from typing import Any, BinaryIO, Callable, Optional, Union
from urllib.parse import urlsplit

from cachix_connection import CONNECT_TIMEOUT, Answer
from cachix_diagnosis import reason
from cachix_dial import Dialer
from cachix_protocol import USER_AGENT, Unreachable

STALL = 60.0  # seconds without a byte until a server counts as gone
SLOWEST = 1 << 14  # bytes a second of an upload: what is slower than that is given up
BLOCK = 1 << 16  # bytes that are sent at once
MOST_BODY = 1 << 20  # bytes of an answer
ATTEMPTS = 3
PAUSE, LONGEST_PAUSE = 1.0, 120.0  # seconds between two attempts, unless the server says more
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 507})  # statuses after which to try again

Body = Union[bytes, BinaryIO]


def basic(token: str) -> str:
    """The Authorization header that Nix makes of a netrc with a login."""
    return "Basic " + base64.b64encode(f"x:{token}".encode()).decode()


class Line:
    """A connection to one server, for one thread. It is opened when it is needed."""

    def __init__(self, url: str, authorization: Optional[str] = None) -> None:
        self.url, self.path = url, urlsplit(url).path.rstrip("/")
        self.headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        self.headers.update({"Authorization": authorization} if authorization else {})
        self.dialer = Dialer(CONNECT_TIMEOUT)
        self.connection: Optional[http.client.HTTPConnection] = None

    def request(self, method: str, name: str, body: Body = b"", size: int = 0) -> Answer:
        """Make a request for the file `name`, and read the answer whole. Redirects are answers.

        A connection that the server has closed meanwhile is opened again. Raises Unreachable.
        """
        is_kept = self.connection is not None
        self.dialer.set_deadline(CONNECT_TIMEOUT + size / SLOWEST)
        try:
            return self._request(method, name, body, size)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            if not is_kept or isinstance(error, socket.timeout):
                problem = reason(self.url, error, self.dialer)
                raise Unreachable(f"{method} {self.url}/{name} failed: {problem}") from None
        return self.request(method, name, body, size)

    def _request(self, method: str, name: str, body: Body, size: int) -> Answer:
        connection = self.connection or self._open()
        self.connection = connection
        connection.sock.settimeout(STALL)
        connection.putrequest(method, f"{self.path}/{name}", skip_accept_encoding=True)
        for header, value in self.headers.items():
            connection.putheader(header, value)
        if method == "PUT":
            connection.putheader("Content-Length", str(size))
        try:
            connection.endheaders()
            self._send(connection, body)
        except OSError:  # it may have answered before it has read everything
            return self._answer(connection, is_complete=False)
        return self._answer(connection)

    def _open(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc)
        connection.sock = self.dialer.open(self.url)
        connection.auto_open = 0
        return connection

    def _send(self, connection: http.client.HTTPConnection, body: Body) -> None:
        stream = io.BytesIO(body) if isinstance(body, bytes) else body
        stream.seek(0)
        while block := stream.read(BLOCK):
            self.dialer.left()
            connection.send(block)

    def _answer(self, connection: Any, is_complete: bool = True) -> Answer:
        response = connection.getresponse()
        content = response.read(MOST_BODY + 1)
        if len(content) > MOST_BODY:
            raise ValueError(f"the answer is larger than {MOST_BODY >> 20} MiB")
        if response.length:
            raise http.client.IncompleteRead(content, response.length)
        if response.will_close or not is_complete:
            self.close()
        return Answer(response.status, response.headers, content)

    def close(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def repeated(call: Callable[[], Answer], stop: threading.Event) -> Answer:
    """The answer to a request that is made up to ATTEMPTS times. Raises Unreachable.

    It is the last one, whatever its status is. Nothing is repeated once `stop` is set.
    """
    for attempt in range(1, ATTEMPTS + 1):
        last = attempt == ATTEMPTS or stop.is_set()
        pause = PAUSE * 2 ** (attempt - 1)
        try:
            answer = call()
            if last or answer.status not in AGAIN:
                return answer
            pause = max(pause, min(answer.retry_after, LONGEST_PAUSE))
        except Unreachable:
            if last:
                raise
        stop.wait(pause)
    raise AssertionError


class Lines(threading.local):
    """A line for each thread."""

    def __init__(self, url: str, authorization: Optional[str] = None) -> None:
        self.line = Line(url, authorization)
