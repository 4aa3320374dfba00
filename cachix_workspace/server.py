"""gunicorn with one threaded worker, started from Python: a thread for each whole request."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.http import RequestParser, wsgi
from gunicorn.sock import ssl_wrap_socket
from gunicorn.util import has_fileno
from gunicorn.workers.gthread import TConn, ThreadWorker

from cachix_console import tell
from cachix_protocol import Error, UsageError
from cachix_workspace import health, limits, membership, nodes
from cachix_workspace.app import create_app, start_threads
from cachix_workspace.context import Workspace, workspace_of
from cachix_workspace.database import open_database
from cachix_workspace.directory import keep_reserve
from cachix_workspace.door import Door
from cachix_workspace.gate import KEEP_ALIVE, MAX_FIELD, MAX_FIELDS, Gate, Visitor
from cachix_workspace.limits import IDLE_CONNECTIONS
from cachix_workspace.quick import Quick
from cachix_workspace.settings import HOST, Settings
from cachix_workspace.supervisor import Supervisor
from cachix_workspace.tls import Certificate
from cachix_workspace.websocket import GOODBYE

logger = logging.getLogger(__name__)

GRACE = 4  # seconds from SIGTERM until open connections are cut
REQUESTS, LARGE = 24, 64  # threads for requests, and for those whose bodies are large
PAUSE = 0.02  # seconds
# A kernel would take megabytes for each peer that takes its time.
UNSENT, KEPT_UNSENT = getattr(socket, "TCP_NOTSENT_LOWAT", None), 1 << 18  # bytes
SPARE = 4096  # connections beyond those that the gate keeps, before none is accepted
LINK = re.compile(r"(/sign-in/)[^\s\"'?]+")


def bind(address: str) -> socket.socket:
    """A listening socket at HOST:PORT, or [HOST]:PORT for IPv6; port 0 picks a free one.

    Raises Error.
    """
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--listen must be HOST:PORT such as 127.0.0.1:8080, not {address!r}")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), int(port)))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        hint = "choose another address with --listen"
        raise Error(f"can't listen on {address}: {reason}; {hint}") from None
    return listener


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def default_url(listener: socket.socket, scheme: str) -> str:
    """The public URL where none is named; with the machine's name if it has all addresses."""
    if is_wildcard(listener) and HOST.fullmatch(name := socket.gethostname()):
        return f"{scheme}://{name}:{listener.getsockname()[1]}"
    return url_of(listener, scheme)


def is_wildcard(listener: socket.socket) -> bool:
    """Whether a socket listens on all addresses of the machine."""
    return ipaddress.ip_address(str(listener.getsockname()[0]).partition("%")[0]).is_unspecified


def is_exposed(listener: socket.socket) -> bool:
    """Whether other machines reach a listening socket."""
    host = str(listener.getsockname()[0]).partition("%")[0]
    return not ipaddress.ip_address(host).is_loopback


class Answer(wsgi.Response):
    """An answer that does not say which server this is, and of which version."""

    def default_headers(self) -> list[str]:
        headers: list[str] = super().default_headers()
        return [header for header in headers if not header.startswith("Server: ")]

    def sendfile(self, respiter: Any) -> bool:
        """Let the lot send a whole file, by TLS too; False if this is none."""
        file = getattr(respiter, "file", None)
        is_plain = self.response_length is not None and not self.is_chunked()
        if not isinstance(self.sock, Door) or not has_fileno(file) or not is_plain:
            return False
        self.send_headers()
        if self.req.method != "HEAD":
            self.sock.sendfile(file, file.tell(), self.response_length)
        return True


wsgi.Response = Answer  # type: ignore[misc]


class WorkspaceWorker(ThreadWorker):
    """Closes its websockets in order, and never lets a peer hold up its main thread."""

    def init_process(self) -> None:
        self.stopping = threading.Event()
        threading.Thread(target=self._close_sockets, name="stopping", daemon=True).start()
        super().init_process()

    def _workspace(self) -> Workspace:
        application: Any = self.app
        return workspace_of(application.wsgi())

    def _close_sockets(self) -> None:
        self.stopping.wait()
        workspace = self._workspace()
        workspace.feed.close()
        workspace.hub.stop()
        membership.leave(workspace)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.stopping.set()
        super().handle_exit(sig, frame)

    handle_quit = handle_exit  # Ctrl-C closes the websockets in order too

    def init_signals(self) -> None:
        super().init_signals()
        for number in (signal.SIGHUP, signal.SIGUSR2):  # a closed terminal tells all its processes
            signal.signal(number, signal.SIG_IGN)

    def is_parent_alive(self) -> bool:
        alive = bool(super().is_parent_alive())
        if not alive:  # gunicorn's master was killed: leave the port to a successor
            self.stopping.set()
        return alive

    @property
    def nr_conns(self) -> int:
        """Connections that are not parked for good."""
        return self._open

    @nr_conns.setter
    def nr_conns(self, number: int) -> None:
        self._open = number

    def run(self) -> None:
        workspace = self._workspace()
        settings, self._changed = workspace.settings, threading.Condition()
        self.bodies = futures.ThreadPoolExecutor(LARGE, thread_name_prefix="body")
        most = settings.max_connections + IDLE_CONNECTIONS
        limits = (most, 0 if settings.behind_proxy else settings.max_per_address)
        timeout = settings.receive_timeout
        self.gate = Gate(
            *(workspace.lot, *limits, timeout, self._take, self._left),
            *(self._quick(workspace), self._work),
        )
        super().run()
        workspace.lot.call(self.gate.close)
        with self._changed:
            self._changed.wait_for(lambda: not self._open, GRACE)
        workspace.lot.wait_until_empty(GOODBYE + 1)
        workspace.turns.wait_until_idle(1)
        workspace.presence.wait_until_written(1)
        self.bodies.shutdown(wait=False)

    def _quick(self, workspace: Workspace) -> Quick:
        application: Any = self.app
        note = application.wsgi().extensions[health.REQUESTS].note
        return Quick(workspace, note)

    def _work(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have a thread call a function. Raises RuntimeError if the server has ended."""
        self.tpool.submit(function, *arguments)

    def accept(self, *arguments: Any) -> None:
        """Let a connection wait at the gate. The listener is the last of the arguments."""
        listener = arguments[-1]
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(PAUSE)  # others will end
            return
        self._count(1)
        try:
            if UNSENT is not None:
                sock.setsockopt(socket.IPPROTO_TCP, UNSENT, KEPT_UNSENT)
            conn = TConn(self.cfg, sock, address, listener.getsockname())
            if self.cfg.is_ssl:
                conn.sock = ssl_wrap_socket(sock, self.cfg)
        except OSError:  # it has left already
            sock.close()
            self._count(-1)
            return
        self.gate.enter(conn, str(address[0]))

    def _count(self, more: int) -> None:
        with self._changed:
            self._open += more
            if not self._open:
                self._changed.notify_all()

    def _left(self) -> None:
        self._count(-1)

    def _take(self, visitor: Visitor, sock: Any, is_large: bool, is_cut: bool) -> None:
        """Answer a request of the gate by a thread. The lot's thread calls this."""
        pool = self.bodies if is_large else self.tpool
        try:
            pool.submit(self._answer, visitor, sock, is_cut)
        except RuntimeError:  # the server has ended
            sock.close()
            self._count(-1)

    def _answer(self, visitor: Visitor, sock: Any, is_cut: bool) -> None:
        """Answer a request, then let the lot have the connection: parked for good, or at the gate.

        What gunicorn's own end of a request does would wait for the peer.
        """
        settings, lot = self._workspace().settings, self._workspace().lot
        door = Door(sock, 0.0 if is_cut else settings.receive_timeout, settings.send_timeout)
        conn, is_kept, rest = visitor.conn, False, b""
        source: Any = door
        try:
            conn.sock, conn.parser = door, RequestParser(self.cfg, source, conn.client)
            conn.parser.unreader.unread(bytes(visitor.head))
            conn.initialized = conn.data_ready = True
            keep = super().handle(conn)
            is_kept = keep[0] if isinstance(keep, tuple) else keep is True  # before gunicorn 24
            rest = conn.parser.unreader.buf.getvalue()
        except Exception:
            logger.exception("a request failed")
        finally:
            conn.parser = None
            parked = lot.claimed(door)
            if parked is not None:
                lot.park(parked, sock, rest)
                self._count(-1)
            else:
                if is_kept and door.reader is not None:
                    self.gate.quick.learn(visitor.head, door.reader)
                visitor.answered(door, bool(is_kept and self.alive and not is_cut), rest)
                lot.park(visitor, sock)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request; the connection ends if most of its body was not read."""
        keep = super().handle_request(req, conn)
        reader = req.body.reader
        is_open = getattr(reader, "parser", None) is not None  # chunks that may come
        left = getattr(reader, "length", 0) > len(conn.parser.unreader.buf.getvalue())
        return keep and not is_open and not left


class Server(BaseApplication):
    """The workspace under gunicorn, on a socket that is listening already."""

    def __init__(
        self, settings: Settings, listener: socket.socket, certificate: Certificate | None
    ) -> None:
        self.settings, self.listener, self.certificate = settings, listener, certificate
        self.url = url_of(listener, "http" if certificate is None else "https")
        super().__init__()

    def load_config(self) -> None:
        config = {
            "bind": f"fd://{self.listener.detach()}",
            "workers": 1,
            "worker_class": WorkspaceWorker,
            "threads": REQUESTS,
            "worker_connections": self.settings.max_connections + IDLE_CONNECTIONS + SPARE,
            "keepalive": int(KEEP_ALIVE),
            "limit_request_fields": MAX_FIELDS,
            "limit_request_field_size": MAX_FIELD,
            "graceful_timeout": GRACE,
            "timeout": 60,
            "loglevel": "warning",
            "control_socket_disable": True,
            "forwarder_headers": "",  # a client could name another path by them
            "forwarded_allow_ips": "",
            "post_worker_init": lambda _worker: tell(f"listening on {self.url}"),
        }
        if self.certificate is not None:
            context = self.certificate.context
            config["certfile"] = str(self.certificate.certificate)
            config["keyfile"] = str(self.certificate.key)
            config["ssl_context"] = lambda _config, _default: context()
        for name, value in config.items():
            if name in self.cfg.settings:  # older releases lack some
                self.cfg.set(name, value)

    def run(self) -> None:
        Supervisor(self).run()

    def load(self) -> Any:
        try:
            app = create_app(self.settings)
        except Error as error:  # such as newer tables, where a worker takes another one's place
            tell(f"error: {error}")
            raise SystemExit(Supervisor.WORKER_BOOT_ERROR) from None  # no further one is tried
        start_threads(app)
        return app


def serve(
    settings: Settings, listener: socket.socket, certificate: Certificate | None = None
) -> int:
    """Serve until SIGTERM, SIGINT or SIGQUIT, by TLS if there is a certificate; the exit status.

    Raises Error if the data directory can't be used.
    """
    # An error is raised here: gunicorn would start a worker that fails again and again.
    database = open_database(settings, create=True)
    with database.read() as connection:
        nodes.check(connection, settings, nodes.id_of(settings.data))
    database.close()
    keep_reserve(settings.data)
    limits.allow_files(settings.max_connections + limits.BESIDE)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    hide_links()
    os.environ.pop("GUNICORN_CMD_ARGS", None)
    try:
        Server(settings, listener, certificate).run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def hide_links() -> None:
    """Let no log of this process have the secret of a link that signs somebody in.

    Errors are logged with the path of their request, by gunicorn and by us.
    """
    make = logging.getLogRecordFactory()

    def masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with contextlib.suppress(Exception):  # whoever prints it complains of a wrong format
            text = record.getMessage()
            if LINK.search(text):
                record.msg, record.args = LINK.sub(r"\1...", text), None
        return record

    logging.setLogRecordFactory(masked)
