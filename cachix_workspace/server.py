"""gunicorn's threaded worker, started from Python: one worker process, a thread for each connection that is in use."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import struct
import sys
import threading
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.workers.gthread import ThreadWorker

import cachix_workspace
from cachix_workspace import Error, Settings
from cachix_workspace.tables import open_database

logger = logging.getLogger("workspace")

GRACE = 4  # seconds from SIGTERM until connections that are still open are cut
KEEP_ALIVE = 75  # seconds that an idle connection is kept for an agent's next report
IDLE_CONNECTIONS = 1024  # kept alive beside those in use
LINGER = 1.0  # seconds to wait for a peer to take an answer before its connection is closed


def bind(address: str) -> socket.socket:
    """A listening socket at HOST:PORT, or [HOST]:PORT for IPv6; port 0 picks a free one. Raises Error."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    if not host or not port.isdigit() or int(port) > 65535:
        raise cachix_workspace.UsageError(
            f"--listen must be HOST:PORT such as 127.0.0.1:8080, not {address!r}"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), int(port)))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise Error(
            f"can't listen on {address}: {error.strerror or error}; another address is chosen by --listen"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Worker(ThreadWorker):
    """Says goodbye on its sockets, never waits for a peer in its main thread, bounds what a peer can hold up."""

    def init_process(self) -> None:
        self.ending = threading.Event()
        threading.Thread(target=self._close_sockets, name="ending", daemon=True).start()
        super().init_process()

    def _workspace(self) -> Any:
        """What the application's routes share (api.Workspace)."""
        application: Any = self.app
        return application.wsgi().extensions["workspace"]

    def _close_sockets(self) -> None:
        self.ending.wait()
        self._workspace().hub.stop()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.ending.set()
        super().handle_exit(sig, frame)

    handle_quit = handle_exit  # Ctrl-C says goodbye too

    def is_parent_alive(self) -> bool:
        alive = bool(super().is_parent_alive())
        if not alive:  # the parent was killed: make way, for a successor wants the port
            self.ending.set()
        return alive

    def enqueue_req(self, conn: Any) -> None:
        settings = self._workspace().settings
        for option, seconds in (
            (socket.SO_RCVTIMEO, settings.receive_timeout),
            (socket.SO_SNDTIMEO, settings.send_timeout),
        ):
            with contextlib.suppress(OSError):
                conn.sock.setsockopt(
                    socket.SOL_SOCKET,
                    option,
                    struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)),
                )
        super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        """gunicorn closes in its main thread and would wait there for each peer: let it find nothing to wait for."""
        keep = super().handle(conn)
        if keep is False or (
            isinstance(keep, tuple) and not keep[0]
        ):  # releases before 24 answer (keep, conn)
            _linger(conn.sock)
        return keep


def _linger(connection: socket.socket) -> None:
    """Half-close and read on for a moment, so that the peer gets the answer although bytes of it were left unread."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(LINGER)
        for _ in range(64):
            if not connection.recv(1 << 16):
                break
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Server(BaseApplication):
    """The workspace under gunicorn, on a socket that is listening already."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.settings, self.listener, self.url = settings, listener, url_of(listener)
        super().__init__()

    def load_config(self) -> None:
        threads = self.settings.max_connections
        wanted = {
            "bind": f"fd://{self.listener.detach()}",
            "workers": 1,
            "worker_class": Worker,
            "threads": threads,
            "worker_connections": threads + IDLE_CONNECTIONS,
            "keepalive": KEEP_ALIVE,
            "graceful_timeout": GRACE,
            "timeout": 60,
            "sendfile": False,  # Python's sendfile waits for ever for a reader that stalls
            "loglevel": "warning",
            "control_socket_disable": True,
            "post_worker_init": lambda _worker: print(
                f"listening on {self.url}", file=sys.stderr, flush=True
            ),
        }
        for name, value in wanted.items():
            if name in self.cfg.settings:  # older releases lack some
                self.cfg.set(name, value)

    def load(self) -> Any:
        return cachix_workspace.create_app(self.settings)


def serve(settings: Settings, listener: socket.socket) -> int:
    """Serve until SIGTERM, SIGINT or SIGQUIT; the exit status. Raises Error where the data directory can't be used."""
    open_database(
        settings, create=True
    ).close()  # told here, not by a process that gunicorn would start again
    _allow_files(settings.max_connections)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    os.environ.pop("GUNICORN_CMD_ARGS", None)
    try:
        Server(settings, listener).run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _allow_files(connections: int) -> None:
    """A file descriptor for each connection, as far as the system's hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + IDLE_CONNECTIONS + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            logger.warning(
                "only %d open files are allowed, %d connections may need more", allowed, connections
            )
