"""The connection to a workspace: websockets and plain requests, each with an overall deadline."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import types
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

import cachix_dial
from activate.text import brief, hide
from activate.values import dataclass, names
from cachix_dial import Dialer, shut_down
from cachix_dial import ca_bundle as ca_bundle
from cachix_dial import within as within
from cachix_protocol import (
    PROTOCOL_VERSION,
    USER_AGENT,
    Unreachable,
    UsageError,
    checked_url,
    loads,
    nix_system,
)
from cachix_proxy import ascii_host, proxy_for

if TYPE_CHECKING:
    import websocket

    import cachix_session
    import cachix_websocket

CONNECT_TIMEOUT = 20.0  # seconds for name look-up, TCP, TLS and handshake together
CALL_TIMEOUT = 10.0  # seconds for one report, or for sending a ping
MAX_BODY = 1 << 26  # bytes of an answer to `activate`
MAX_REPORT_BODY = 1 << 20  # of an answer to an agent
MAX_MESSAGE = 1 << 20  # of a message on a websocket
MAX_LOG_MESSAGE = 1 << 25  # on that of a log
UNUSED = ("websocket._app", "websocket._dispatcher")  # they load `inspect`, which takes 6 ms
LOG_PATH = "/api/v1/deploy/log/"
MAX_RETRY_AFTER = 3600.0  # seconds for which a workspace may ask to be left alone

_importing = threading.Lock()  # Python 3.9: two threads that import from a zip see half a module

# --- patience -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waits:
    """How long the agent waits, in seconds. Tests shorten it with CACHIX_DEPLOY_WAITS (JSON)."""

    ping: float = 30.0
    silence: float = 60.0
    connect: float = CONNECT_TIMEOUT
    call: float = CALL_TIMEOUT
    backoff: float = 1.0
    slowest: float = 60.0
    healthy: float = 60.0
    handover: float = 60.0
    tail: float = 0.1
    ready: float = 2.0
    download: float = 6 * 3600.0
    unit_recheck: float = 10.0
    retry: float = 2.0
    former: float = 15.0  # for another agent of the name to end
    orphan: float = 30.0  # for another agent to report an end, see cachix_orphan.py
    orphan_reports: float = 3600.0
    post_deploy: float = 300.0  # for the command after a deployment
    look: float = 60.0  # between two looks at what the machine runs

    @classmethod
    def from_environment(cls) -> Waits:
        """The defaults, changed by CACHIX_DEPLOY_WAITS. Unknown names are ignored."""
        changes = loads(os.environ.get("CACHIX_DEPLOY_WAITS", "{}"))
        return cls(**{name: float(changes[name]) for name in names(cls) if name in changes})


def backoff(failures: int, waits: Waits) -> float:
    """Seconds before the next attempt: exponential, with full jitter.

    The jitter keeps a fleet from coming back all at once.
    """
    import random

    return random.uniform(0, min(waits.slowest, waits.backoff * 2 ** min(failures, 16)))


# --- the workspace --------------------------------------------------------------------------------


@dataclass
class Peer:
    """A workspace, and a token for it. `name` is the agent's; CI has none.

    An agent may get another token while it runs: see cachix_secret. The token is hidden in all that
    is printed, logged or reported.
    """

    host: str
    token: str
    name: Optional[str] = None

    def __post_init__(self) -> None:
        hide(self.token)

    @classmethod
    def create(cls, host: str, token: str, name: Optional[str] = None) -> Peer:
        """Complete `host` to a URL, in ASCII.

        Raises UsageError if it is not an http or https URL, or if its proxy can't be used.
        """
        url = host if "://" in host else f"https://{host}"
        url = _ascii_url(checked_url(url, "--host", "https://cachix.org"))
        proxy_for(url)
        return cls(url, token, name)

    def headers(self) -> dict[str, str]:
        """The headers of every request and handshake. An agent adds its name and system."""
        headers = {"Authorization": f"Bearer {self.token}"}
        if self.name is not None:
            headers.update(name=self.name, version=PROTOCOL_VERSION, system=nix_system())
        return {**headers, "User-Agent": USER_AGENT}


def _ascii_url(url: str) -> str:
    """A URL as it goes over the wire. Raises UsageError if its host's name can't be encoded."""
    if url.isascii():
        return url
    parts = urllib.parse.urlsplit(url)
    host, colon, port = parts.netloc.partition(":")
    try:
        netloc = f"{ascii_host(host)}{colon}{port}"
    except UnicodeError as error:
        raise UsageError(f"--host must be a URL with a host name, not {url!r}: {error}") from None
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~")
    return urllib.parse.urlunsplit((parts.scheme, netloc, path, "", ""))


def load(peer: Peer) -> None:
    """Load all that `reach` needs: an activation may remove the files."""
    import cachix_diagnosis  # noqa: F401
    import cachix_websocket  # noqa: F401

    cachix_dial.load(peer.host)


# --- websockets -----------------------------------------------------------------------------------


class _Unused(types.ModuleType):
    """In the place of a module of which we use nothing. Any name in it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def connect(peer: Peer, path: str, timeout: float = CONNECT_TIMEOUT) -> cachix_websocket.WebSocket:
    """Open a websocket to `path`. Raises Refused (the token), or Unreachable with the reason."""
    with _importing:
        for name in UNUSED:
            sys.modules.setdefault(name, _Unused(name))
        import websocket

        from cachix_websocket import WebSocket

    limit = MAX_LOG_MESSAGE if path.startswith(LOG_PATH) else MAX_MESSAGE
    dialer, sock, url = Dialer(timeout), WebSocket(limit), "ws" + peer.host[4:] + path
    options: dict[str, Any] = {
        "header": [f"{name}: {value}" for name, value in peer.headers().items()],
        "timeout": timeout,
        "suppress_origin": True,
        "redirect_limit": 0,
    }

    def call() -> None:
        connection = dialer.open(peer.host)
        sock.connect(url, socket=connection, **options)  # type: ignore[no-untyped-call]

    try:
        within(timeout, call, dialer.hang_up)
        if sock.status != 101:
            raise websocket.WebSocketException("a redirect")
    except Exception as error:  # the library raises nearly anything if the answer is not HTTP
        hang_up(sock)
        raise _connect_problem(peer, path, sock, error, dialer) from None
    return sock


def _connect_problem(
    peer: Peer, path: str, sock: cachix_websocket.WebSocket, error: Exception, dialer: Dialer
) -> Exception:
    """The error for a handshake that failed."""
    with _importing:
        from cachix_diagnosis import handshake_problem, reason

    # the library raises no error with a status for a redirect
    status = getattr(error, "status_code", sock.status)
    if status in (None, 101):
        problem = reason(peer.host, error, dialer)
        return Unreachable(f"no connection to {peer.host}{path}: {problem}")
    headers = getattr(error, "resp_headers", sock.headers) or {}
    body = getattr(error, "resp_body", None) or b""  # older releases have none
    return handshake_problem(peer.host, path, status, headers, body, dialer)


def connection_lost(error: Exception) -> Unreachable:
    """The error for a websocket that broke."""
    return Unreachable(f"the connection was lost: {brief(str(error)) or type(error).__name__}")


def hang_up(sock: websocket.WebSocket) -> None:
    """End a connection at once, from any thread. A read in another thread ends too."""
    with contextlib.suppress(AttributeError):  # it has none before it is connected
        shut_down(sock.sock)


def close(sock: websocket.WebSocket) -> None:
    """Close with code 1000, and wait at most a second for the answer. Never raises."""
    with contextlib.suppress(Exception):
        sock.close(timeout=1)


def round_trip(
    sock: cachix_websocket.WebSocket, timeout: float, frames: tuple[str, ...] = ()
) -> None:
    """Send text frames and a ping, and wait for the pong, which proves that all have arrived.

    Raises Unreachable.
    """
    import websocket

    mark, deadline = os.urandom(16), time.monotonic() + timeout
    try:
        sock.settimeout(timeout)
        texts = [(websocket.ABNF.OPCODE_TEXT, text.encode("utf-8")) for text in frames]
        sock.send_all([*texts, (websocket.ABNF.OPCODE_PING, mark)], timeout)
        while True:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            opcode, frame = sock.recv_data_frame(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_PONG and frame.data == mark:
                return
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise Unreachable("the workspace closed the connection")
    except (OSError, websocket.WebSocketException) as error:
        raise Unreachable(
            f"no answer to a ping: {brief(str(error)) or type(error).__name__}"
        ) from None


def reach(peer: Peer, timeout: float) -> None:
    """Check that the workspace answers over a fresh connection. Raises Refused or Unreachable."""
    sock = connect(peer, "/ws-deployment", timeout)
    try:
        within(timeout, lambda: round_trip(sock, timeout), lambda: hang_up(sock))
    finally:  # nobody has to wait for the workspace's answer to our close
        threading.Thread(target=close, args=(sock,), name="close", daemon=True).start()


# --- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read whole. `headers` ignores the case of its keys."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_json(self) -> bool:
        """Whether the body is declared as JSON: a workspace's answer, not the page of a proxy."""
        return self.headers.get("Content-Type", "").startswith("application/json")

    @property
    def retry_after(self) -> float:
        """Seconds by its Retry-After, at most MAX_RETRY_AFTER; 0 without one, or for a date."""
        with contextlib.suppress(ValueError):
            return min(MAX_RETRY_AFTER, max(0.0, float(self.headers.get("Retry-After", "0"))))
        return 0.0


def http(peer: Peer, method: str, path: str, timeout: float = 20.0, **kwargs: Any) -> Answer:
    """Make one request, and read the answer whole. `kwargs` go to `requests.Session.request`.

    Raises Unreachable if no answer is complete after `timeout` seconds, or if its body is larger
    than MAX_BODY, for an agent MAX_REPORT_BODY. Redirects are not followed: the token would go
    elsewhere.
    """
    with _importing:
        import cachix_diagnosis
        import cachix_session  # noqa: F401  # for `_session`

    session, url = _session(), peer.host + path
    dialer, proxy = session.dialer, proxy_for(peer.host)
    dialer.set_deadline(timeout)
    limit = MAX_BODY if peer.name is None else MAX_REPORT_BODY
    plain = {"Accept-Encoding": "identity"}
    kwargs["headers"] = {**peer.headers(), **plain, **kwargs.pop("headers", {})}
    kwargs.update(timeout=timeout, verify=ca_bundle() or True)
    try:
        call = functools.partial(session.fetch, method, url, proxy, limit, **kwargs)
        answer = Answer(*within(timeout, call, dialer.hang_up))
    except (Unreachable, OSError, ValueError) as error:  # also those of requests
        problem = cachix_diagnosis.reason(peer.host, error, dialer)
        sent = dialer.is_connected or proxy is not None
        raise Unreachable(f"{method} {url} failed: {problem}", sent=sent) from None
    is_page = answer.status == 400 and not answer.is_json
    if is_page and (problem := cachix_diagnosis.speaks_https(peer.host, dialer)):
        raise Unreachable(f"{method} {url} failed: {problem}")
    _sessions.append(session)
    return answer


_sessions: list[cachix_session.Session] = []  # those that no thread uses, the latest one last


def _session() -> cachix_session.Session:
    """A session for this thread alone. Its connection may be open, whichever thread opened it."""
    import cachix_session

    try:
        return _sessions.pop()
    except IndexError:
        return cachix_session.Session()
