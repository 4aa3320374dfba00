"""The connection to a workspace: websockets and plain requests, each with an overall deadline."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar

from cachix_protocol import (
    PROTOCOL_VERSION,
    USER_AGENT,
    Cache,
    Refused,
    Unreachable,
    checked_url,
    loads,
    nix_system,
)

if TYPE_CHECKING:
    import requests
    import websocket

CONNECT_TIMEOUT = 20.0  # seconds for name look-up, TCP, TLS and handshake together
CALL_TIMEOUT = 10.0  # seconds for one report, or for sending a ping
MAX_BODY = 1 << 26  # bytes of an answer
MAX_RETRY_AFTER = 3600.0  # seconds for which a workspace may ask to be left alone
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)

# --- deadlines ------------------------------------------------------------------------------------


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

    @classmethod
    def from_environment(cls) -> Waits:
        """The defaults, changed by CACHIX_DEPLOY_WAITS. Unknown names are ignored."""
        changes = loads(os.environ.get("CACHIX_DEPLOY_WAITS", "{}"))
        names = cls.__dataclass_fields__
        return cls(**{name: float(changes[name]) for name in names if name in changes})


def backoff(failures: int, waits: Waits) -> float:
    """Seconds before the next attempt: exponential, with full jitter.

    The jitter keeps a fleet from coming back all at once.
    """
    import random

    return random.uniform(0, min(waits.slowest, waits.backoff * 2 ** min(failures, 16)))


Result = TypeVar("Result")


class _Call(threading.Thread):
    """A call in a thread of its own, which `give_up` ends once nobody waits for it any more."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="call", daemon=True)
        self.call = call
        self.results: list[Any] = []
        self.problems: list[Exception] = []
        self.running = True
        self.guard = threading.Lock()

    def run(self) -> None:
        try:
            self.results.append(self.call())
        except Exception as error:
            self.problems.append(error)
        except SystemExit:  # see `give_up`
            pass
        finally:
            with self.guard:
                self.running = False

    def give_up(self) -> None:
        """Raise SystemExit in the thread as soon as it runs Python again.

        Nothing else ends a thread in a name look-up, or in a library that waits for the next packet
        again and again. The thread can't end while `guard` is locked, so that no other thread has
        its ident yet.
        """
        import ctypes

        raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
        with self.guard:
            if self.running:
                count = raise_in(ctypes.c_ulong(self.ident or 0), ctypes.py_object(SystemExit))
                if count != 1:
                    raise RuntimeError(f"the exception was set in {count} threads instead of one")


def within(timeout: float, call: Callable[[], Result]) -> Result:
    """Return or raise whatever `call` does. Raises Unreachable after `timeout` seconds.

    The libraries' own timeouts are per packet, and a name look-up has none.
    """
    thread = _Call(call)
    thread.start()
    thread.join(timeout)
    if thread.problems:
        raise thread.problems[0]
    if not thread.results:
        thread.give_up()
        raise Unreachable(f"no answer within {timeout:.0f} s")
    return thread.results[0]  # type: ignore[no-any-return]


# --- the workspace --------------------------------------------------------------------------------


def ca_bundle() -> Optional[str]:
    """The file of trusted authorities for every connection: the system's, else certifi's."""
    variables = ("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    for candidate in (*map(os.environ.get, variables), *SYSTEM_BUNDLES):
        if candidate and os.path.isfile(candidate):
            return candidate
    with contextlib.suppress(ImportError, OSError):
        import certifi

        return certifi.where()
    return None


def complete_proxies() -> None:
    """Add the scheme to proxies that the environment gives as HOST:PORT.

    requests and Nix accept that form; websocket-client would bypass such a proxy.
    """
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        value = os.environ.get(name)
        if value and "://" not in value:
            os.environ[name] = f"http://{value}"


@dataclass(frozen=True)
class Peer:
    """A workspace, and a token for it. `name` is the agent's; CI has none."""

    host: str
    token: str
    name: Optional[str] = None

    @classmethod
    def create(cls, host: str, token: str, name: Optional[str] = None) -> Peer:
        """Complete `host` to a URL. Raises UsageError if it is not an http or https URL."""
        url = host if "://" in host else f"https://{host}"
        return cls(checked_url(url, "--host", "https://cachix.org"), token, name)

    def headers(self) -> dict[str, str]:
        """The headers of every request and handshake. An agent adds its name and system."""
        headers = {"Authorization": f"Bearer {self.token}"}
        if self.name is not None:
            headers.update(name=self.name, version=PROTOCOL_VERSION, system=nix_system())
        return {**headers, "User-Agent": USER_AGENT}

    def substituter(self, cache: Cache) -> str:
        """The URL of the workspace's cache: its `uri`, else a subdomain of the workspace."""
        if cache.uri:
            return cache.uri
        parts = urllib.parse.urlsplit(self.host)
        return f"{parts.scheme}://{cache.name}.{parts.netloc.rpartition('@')[2]}"

    def public_key(self, cache: Cache) -> str:
        """The cache's key in Nix's form, NAME:BASE64."""
        if ":" in cache.public_key:
            return cache.public_key
        host = urllib.parse.urlsplit(self.host).hostname
        return f"{cache.name}.{host}-1:{cache.public_key}"


# --- websockets -----------------------------------------------------------------------------------


def connect(peer: Peer, path: str, timeout: float = CONNECT_TIMEOUT) -> websocket.WebSocket:
    """Open a websocket to `path`. Raises Refused (the token), or Unreachable with the reason."""
    import websocket

    bundle = ca_bundle()
    sock = websocket.WebSocket(
        enable_multithread=True,
        skip_utf8_validation=True,
        sslopt={} if bundle is None else {"ca_certs": bundle},
    )
    options = {
        "header": [f"{name}: {value}" for name, value in peer.headers().items()],
        "timeout": timeout,
        "suppress_origin": True,
        "redirect_limit": 0,
    }
    url = "ws" + peer.host[4:] + path
    try:
        within(timeout, lambda: sock.connect(url, **options))  # type: ignore[no-untyped-call]
        if sock.status != 101:
            raise websocket.WebSocketException("a redirect")
    except (Unreachable, OSError, ValueError, websocket.WebSocketException) as error:
        hang_up(sock)
        raise _connect_problem(peer, path, sock, error) from None
    return sock


def _connect_problem(
    peer: Peer, path: str, sock: websocket.WebSocket, error: Exception
) -> Exception:
    """The error for a handshake that failed."""
    # the library raises no error with a status for a redirect
    status = getattr(error, "status_code", sock.status)
    if status in (401, 403):
        hint = "check it, or create a new one"
        return Refused(f"{peer.host} refused the token (HTTP {status}): {hint}")
    if status in (None, 101):
        return Unreachable(f"no connection to {peer.host}{path}: {error or type(error).__name__}")
    location = (getattr(error, "resp_headers", sock.headers) or {}).get("location")
    hint = ""
    if location:
        hint = f" and points to {location}, which is not followed: give it as --host"
    return Unreachable(f"{peer.host}{path} answered HTTP {status} instead of a websocket{hint}")


def hang_up(sock: websocket.WebSocket) -> None:
    """End a connection at once, from any thread. A read in another thread ends too."""
    with contextlib.suppress(OSError, AttributeError):
        sock.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]


def close(sock: websocket.WebSocket) -> None:
    """Close with code 1000, and wait at most a second for the answer. Never raises."""
    with contextlib.suppress(Exception):
        sock.close(timeout=1)


def round_trip(sock: websocket.WebSocket, timeout: float, frames: tuple[str, ...] = ()) -> None:
    """Send text frames and a ping, and wait for the pong, which proves that all have arrived.

    Raises Unreachable.
    """
    import websocket

    mark, deadline = os.urandom(16), time.monotonic() + timeout
    try:
        sock.settimeout(timeout)
        for text in frames:
            sock.send(text)
        sock.ping(mark)
        while True:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            opcode, frame = sock.recv_data_frame(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_PONG and frame.data == mark:
                return
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise Unreachable("the workspace closed the connection")
    except (OSError, websocket.WebSocketException) as error:
        raise Unreachable(f"no answer to a ping: {error or type(error).__name__}") from None


def reach(peer: Peer, timeout: float) -> None:
    """Check that the workspace answers over a fresh connection. Raises Refused or Unreachable."""
    sock = connect(peer, "/ws-deployment", timeout)
    try:
        round_trip(sock, timeout)
    finally:
        close(sock)


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
    than MAX_BODY. Redirects are not followed: the token would go elsewhere.
    """
    with _importing:
        import requests

    session, deadline = _session(), time.monotonic() + timeout
    kwargs["headers"] = {**peer.headers(), **kwargs.pop("headers", {})}
    kwargs.update(timeout=timeout, verify=ca_bundle() or True, stream=True, allow_redirects=False)

    def call() -> Answer:
        response = session.request(method, peer.host + path, **kwargs)
        body = bytearray()
        for chunk in response.iter_content(1 << 16):
            body += chunk
            if len(body) > MAX_BODY:
                raise ValueError(f"the answer is larger than {MAX_BODY >> 20} MiB")
            if time.monotonic() > deadline:
                raise requests.Timeout(f"the answer took longer than {timeout:.0f} s")
        return Answer(response.status_code, response.headers, bytes(body))

    try:
        return within(timeout, call)
    except (Unreachable, requests.RequestException, OSError, ValueError) as error:
        _sessions.session = None  # a late call may still be using it
        reason = error or type(error).__name__
        raise Unreachable(f"{method} {peer.host}{path} failed: {reason}") from None


_sessions = threading.local()
_importing = threading.Lock()  # Python 3.9: two threads that import from a zip see half a module


def _session() -> requests.Session:
    """The calling thread's session: proxies from the environment, no credentials from ~/.netrc."""
    import requests

    if getattr(_sessions, "session", None) is None:
        _sessions.session = requests.Session()
        _sessions.session.auth = lambda request: request
    return _sessions.session  # type: ignore[no-any-return]
