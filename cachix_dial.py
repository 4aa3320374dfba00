"""How a connection is opened: any address of the host, its proxy, TLS; all within a deadline."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar
from urllib.parse import urlsplit

from cachix_errors import Unreachable
from cachix_proxy import Proxy, host_and_port, proxy_for, tunnel

if TYPE_CHECKING:
    import ssl

STAGGER = 0.25  # seconds until the next address is tried as well (RFC 8305)
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
# Names that a system may lack; the times are in seconds.
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}

ANSWER = "waiting for the answer"  # a stage

# --- deadlines ------------------------------------------------------------------------------------

Result = TypeVar("Result")


class _Call(threading.Thread):
    """A call in a thread of its own, with its result or its problem."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="call", daemon=True)
        self.call = call
        self.results: list[Any] = []
        self.problems: list[Exception] = []

    def run(self) -> None:
        try:
            self.results.append(self.call())
        except Exception as error:
            self.problems.append(error)


def within(
    timeout: float, call: Callable[[], Result], cancel: Callable[[], None] = lambda: None
) -> Result:
    """Return or raise whatever `call` does. Raises Unreachable after `timeout` seconds.

    The libraries' own timeouts are per packet, and a name look-up has none. `cancel` is to end a
    call that is late: a look-up can't be ended, but must not be followed by anything.
    """
    thread = _Call(call)
    thread.start()
    thread.join(timeout)
    if thread.problems:
        raise thread.problems.pop()  # else its traceback would keep the thread, and that keeps it
    if not thread.results:
        cancel()
        raise Unreachable(f"no answer within {timeout:.0f} s")
    return thread.results.pop()  # type: ignore[no-any-return]


# --- sockets --------------------------------------------------------------------------------------


def shut_down(sock: Any) -> None:
    """End a connection at once, from any thread. A read in another thread ends too."""
    # an SSLSocket would first forget its encryption; TLS in TLS has its socket in `socket`
    with contextlib.suppress(OSError, TypeError):
        socket.socket.shutdown(getattr(sock, "socket", sock), socket.SHUT_RDWR)


class Dialer:
    """Opens connections until a deadline, and ends all of them on demand.

    One thread uses it at a time; `hang_up` is for any thread. `stage` says what is waited for,
    `is_connected` whether a connection to a server was opened before the deadline.
    """

    def __init__(self, timeout: float) -> None:
        self.guard = threading.Lock()
        self.sockets: weakref.WeakSet[Any] = weakref.WeakSet()
        self.has_ended = False
        self.set_deadline(timeout)

    def set_deadline(self, timeout: float) -> None:
        """Begin something new, which may take `timeout` seconds."""
        self.timeout, self.deadline = timeout, time.monotonic() + timeout
        self.stage, self.is_connected = "", False

    def left(self) -> float:
        """Seconds until the deadline. Raises TimeoutError after it, or after a hang-up."""
        left = self.deadline - time.monotonic()
        if left <= 0 or self.has_ended:
            raise TimeoutError(self.lateness)
        return left

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed: whatever fails then fails because of that."""
        return time.monotonic() >= self.deadline - 0.01

    @property
    def lateness(self) -> str:
        """The reason of a failure at the deadline."""
        stage = f" while {self.stage}" if self.stage else ""
        return f"no answer within {self.timeout:.0f} s{stage}"

    def keep(self, sock: Any) -> None:
        """Note a socket, so that `hang_up` ends it. Raises TimeoutError after a hang-up."""
        with self.guard:
            self.sockets.add(sock)
            has_ended = self.has_ended
        if has_ended:
            shut_down(sock)
            raise TimeoutError(self.lateness)

    def hang_up(self) -> None:
        """End all connections that were opened, and let none be opened any more."""
        with self.guard:
            self.has_ended = True
            sockets = list(self.sockets)
        for sock in sockets:
            shut_down(sock)

    def open(self, url: str, verify: bool = True) -> Any:
        """A socket to the server of an http or https URL. Raises OSError with the reason."""
        host, port = host_and_port(url)
        sock = self.connect(host, port, proxy_for(url))
        self.is_connected = True
        try:
            if urlsplit(url).scheme == "https":
                sock = self.encrypt(sock, host, verify)
            sock.settimeout(self.left())
        except BaseException:
            sock.close()
            raise
        self.stage = ANSWER
        return sock

    def connect(self, host: str, port: int, proxy: Optional[Proxy]) -> Any:
        """A TCP connection to a host, maybe through a proxy. Raises OSError."""
        if proxy is None:
            direct = self.dial(host, port)
            self.stage = ANSWER
            return direct
        sock: Any = None
        try:
            sock = self.dial(proxy.host, proxy.port)
            if proxy.scheme == "https":
                sock = self.encrypt(sock, proxy.host)
            self.stage = "waiting for the proxy"
            sock.settimeout(self.left())
            tunnel(sock, proxy, host, port)
            self.stage = ANSWER
        except Exception as error:
            if sock is not None:
                sock.close()
            raise OSError(f"by the proxy {proxy}: {error or type(error).__name__}") from None
        return sock

    def dial(self, host: str, port: int) -> socket.socket:
        """Connect to the first address of a host that takes it. Raises OSError."""
        self.stage = f"looking up {host}"
        # as bytes: Python loads the codec `idna` for a text
        name = host.replace("%25", "%").encode()
        addresses = _interleave(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM))
        self.left()  # a look-up that was late is not followed by a connection
        self.stage = f"connecting to {', '.join(address[4][0] for address in addresses)}"
        sock = _Race(addresses).run(self)
        sock.settimeout(self.left())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.keep(sock)
        return sock

    def encrypt(self, sock: Any, host: str, verify: bool = True) -> Any:
        """Speak TLS on a socket from now on. Raises OSError."""
        import ssl

        self.stage = "in the TLS handshake"
        sock.settimeout(self.left())
        context: Any = tls_context() if verify else unverified_context()
        name: Any = host.rstrip(".").encode()  # as bytes, for the same reason as in `dial`
        if isinstance(sock, ssl.SSLSocket):  # an https proxy: TLS in TLS
            from urllib3.util.ssltransport import SSLTransport

            return SSLTransport(sock, context, name)
        encrypted = context.wrap_socket(
            sock,
            server_hostname=name,
            do_handshake_on_connect=False,
        )
        self.keep(encrypted)
        encrypted.do_handshake()
        return encrypted


def _interleave(addresses: list[Any]) -> list[Any]:
    """The results of a name look-up in an order that alternates between IPv6 and IPv4.

    The system's order says which comes first: IPv6, unless this machine has no IPv6.
    """
    families = list(dict.fromkeys(address[0] for address in addresses))
    ranks = [
        (sum(other[0] == address[0] for other in addresses[:index]), families.index(address[0]))
        for index, address in enumerate(addresses)
    ]
    return [address for _, address in sorted(zip(ranks, addresses), key=lambda pair: pair[0])]


class _Race:
    """Attempts to connect to several addresses; the first to connect wins (RFC 8305)."""

    def __init__(self, addresses: list[Any]) -> None:
        self.waiting = list(addresses)
        self.running: dict[int, tuple[socket.socket, str]] = {}
        self.problems: list[str] = []
        self.poll = select.poll()

    def run(self, dialer: Dialer) -> socket.socket:
        """The socket that has connected. Raises OSError if all have failed, or at the deadline."""
        try:
            start = 0.0
            while self.waiting or self.running:
                left, now = dialer.left(), time.monotonic()
                if self.waiting and (now >= start or not self.running):
                    self.start_next()
                    start = now + STAGGER
                    continue
                pause = min(left, start - now) if self.waiting else left
                for fd, _ in self.poll.poll(math.ceil(pause * 1000)):
                    start = 0.0  # of those that fail the next one takes the place at once
                    sock = self.finish(fd)
                    if sock is not None:
                        return sock
            raise OSError(", ".join(self.problems) or "the name has no address")
        finally:
            for sock, _ in self.running.values():
                sock.close()

    def start_next(self) -> None:
        """Begin to connect to the next address."""
        family, kind, protocol, _, address = self.waiting.pop(0)
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            self.note(address[0], error.errno or 0)
            return
        sock.setblocking(False)
        problem = sock.connect_ex(address)
        if problem not in (0, errno.EINPROGRESS):
            self.note(address[0], problem)
            sock.close()
            return
        self.running[sock.fileno()] = (sock, address[0])
        self.poll.register(sock, select.POLLOUT)

    def finish(self, fd: int) -> Optional[socket.socket]:
        """The socket of an attempt that is over; None if it has failed."""
        sock, address = self.running.pop(fd)
        self.poll.unregister(fd)
        problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not problem:
            return sock
        self.note(address, problem)
        sock.close()
        return None

    def note(self, address: str, problem: int) -> None:
        """Keep the reason of an attempt that has failed."""
        self.problems.append(f"{address}: {os.strerror(problem)}")


# --- TLS ------------------------------------------------------------------------------------------


_kept = ("", "")  # a bundle, and a name for it that works when its file is gone


def ca_bundle() -> Optional[str]:
    """The file of trusted authorities for every connection: the system's, else certifi's.

    If a kept file is gone it counts all the same, unless the environment names another.
    """
    if _kept[0] and not os.path.isfile(_kept[0]) and _named_bundle() is None:
        return _kept[1]
    for candidate in (_named_bundle(), *SYSTEM_BUNDLES):
        if candidate and os.path.isfile(candidate):
            return candidate
    with contextlib.suppress(ImportError, OSError):
        import certifi

        return certifi.where()
    return None


def _named_bundle() -> Optional[str]:
    """The first file of authorities that the environment names, and that exists."""
    variables = ("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    paths = filter(None, map(os.environ.get, variables))
    return next((path for path in paths if os.path.isfile(path)), None)


_latest: tuple[Any, Any] = (None, None)  # a bundle's path and status, and its context


def tls_context() -> ssl.SSLContext:
    """The context with the trusted authorities, which are read again if their file has changed.

    Reading them takes 20 ms. If the file is gone, as an activation may remove it, those count that
    were read before, unless the environment names others.
    """
    global _latest
    import ssl

    former, context = _latest
    if former is not None and not os.path.isfile(former[0]) and _named_bundle() is None:
        return context  # type: ignore[no-any-return]
    bundle = ca_bundle()
    status = None if bundle is None else os.stat(bundle)
    key = status and (bundle, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if context is None or key != former:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if bundle is None:
            context.load_default_certs()
        else:
            try:
                context.load_verify_locations(bundle)
            except OSError as error:
                raise OSError(f"the authorities in {bundle} can't be read: {error}") from None
        _latest = (key, context)
    return context  # type: ignore[no-any-return]


def unverified_context() -> ssl.SSLContext:
    """A context that trusts everybody, only to find out whether somebody speaks TLS."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def keep_bundle() -> None:
    """Keep the file of authorities open, as requests reads it for each connection."""
    global _kept
    bundle = ca_bundle()
    if bundle is not None and not _kept[0] and os.path.isdir("/proc/self/fd"):
        _kept = (bundle, f"/proc/self/fd/{os.open(bundle, os.O_RDONLY | os.O_CLOEXEC)}")


def load(url: str) -> None:
    """Load all that `Dialer.open` needs for a URL: files may be gone when it is called."""
    proxy = proxy_for(url)
    schemes = (urlsplit(url).scheme, proxy.scheme if proxy else "")
    if "https" in schemes:
        with contextlib.suppress(OSError):
            tls_context()
            keep_bundle()
    if schemes == ("https", "https"):
        import urllib3.util.ssltransport  # noqa: F401
