"""gunicorn with one threaded worker, started from Python: a thread for each connection in use."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import resource
import socket
import struct
import threading
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.http import wsgi
from gunicorn.workers.gthread import ThreadWorker

from cachix_console import tell
from cachix_protocol import Error, UsageError
from cachix_workspace.app import create_app, start_threads
from cachix_workspace.context import Workspace, workspace_of
from cachix_workspace.database import open_database
from cachix_workspace.settings import Settings
from cachix_workspace.tls import Certificate

logger = logging.getLogger(__name__)

GRACE = 4  # seconds from SIGTERM until open connections are cut
KEEP_ALIVE = 75  # seconds that an idle connection is kept for an agent's next report
IDLE_CONNECTIONS = 1024  # connections kept alive beside those in use
LINK = re.compile(r"(/sign-in/)[^\s\"'?]+")
LINGER = 1.0  # seconds that a peer has to take an answer before its connection is closed


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


def is_exposed(listener: socket.socket) -> bool:
    """Whether other machines reach a listening socket."""
    host = str(listener.getsockname()[0]).partition("%")[0]
    return not ipaddress.ip_address(host).is_loopback


class Answer(wsgi.Response):
    """An answer that does not say which server this is, and of which version."""

    def default_headers(self) -> list[str]:
        headers: list[str] = super().default_headers()
        return [header for header in headers if not header.startswith("Server: ")]


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

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.stopping.set()
        super().handle_exit(sig, frame)

    handle_quit = handle_exit  # Ctrl-C closes the websockets in order too

    def is_parent_alive(self) -> bool:
        alive = bool(super().is_parent_alive())
        if not alive:  # gunicorn's master was killed: leave the port to a successor
            self.stopping.set()
        return alive

    def enqueue_req(self, conn: Any) -> None:
        settings = self._workspace().settings
        _set_timeout(conn.sock, socket.SO_RCVTIMEO, settings.receive_timeout)
        _set_timeout(conn.sock, socket.SO_SNDTIMEO, settings.send_timeout)
        super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        """Handle a request, and half-close the connection here if it is not kept.

        gunicorn closes it in the main thread, which would wait for the peer there.
        """
        keep = super().handle(conn)
        if keep is False or (isinstance(keep, tuple) and not keep[0]):  # a tuple before gunicorn 24
            _linger(conn.sock)
        return keep


def _set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    with contextlib.suppress(OSError):
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, option, timeval)


def _linger(sock: socket.socket) -> None:
    """Half-close, and read on for a moment.

    A close while bytes are unread would reset the connection, and the answer would be lost.
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(LINGER)
        for _ in range(64):
            if not sock.recv(1 << 16):
                break
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Server(BaseApplication):
    """The workspace under gunicorn, on a socket that is listening already."""

    def __init__(
        self, settings: Settings, listener: socket.socket, certificate: Certificate | None
    ) -> None:
        self.settings, self.listener, self.certificate = settings, listener, certificate
        self.url = url_of(listener, "http" if certificate is None else "https")
        super().__init__()

    def load_config(self) -> None:
        threads = self.settings.max_connections
        config = {
            "bind": f"fd://{self.listener.detach()}",
            "workers": 1,
            "worker_class": WorkspaceWorker,
            "threads": threads,
            "worker_connections": threads + IDLE_CONNECTIONS,
            "keepalive": KEEP_ALIVE,
            "graceful_timeout": GRACE,
            "timeout": 60,
            "sendfile": False,  # Python's sendfile waits without end for a reader that stalls
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

    def load(self) -> Any:
        app = create_app(self.settings)
        start_threads(app)
        return app


def serve(
    settings: Settings, listener: socket.socket, certificate: Certificate | None = None
) -> int:
    """Serve until SIGTERM, SIGINT or SIGQUIT, by TLS if there is a certificate; the exit status.

    Raises Error if the data directory can't be used.
    """
    # An error is raised here: gunicorn would start a worker that fails again and again.
    open_database(settings, create=True).close()
    _raise_file_limit(settings.max_connections)
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


def _raise_file_limit(connections: int) -> None:
    """Allow a file descriptor for each connection, as far as the system's hard limit permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + IDLE_CONNECTIONS + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < needed:
            sentence = "only %d open files are allowed, %d connections may need more"
            logger.warning(sentence, allowed, connections)
