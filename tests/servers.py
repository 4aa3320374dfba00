"""Small servers for tests of connections: TCP, TLS, proxies."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.client
import http.server
import ipaddress
import socket
import ssl
import struct
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any, Callable, Optional

from quiet import QuietServer

Serve = Callable[[Any], None]


def listen(serve: Serve, address: str = "127.0.0.1", port: int = 0) -> tuple[socket.socket, str]:
    """Start a TCP server that calls `serve` for each connection; return its listener and URL."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=quiet, args=(connection,), daemon=True).start()

    def quiet(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            serve(connection)

    threading.Thread(target=accept, daemon=True).start()
    host = f"[{address}]" if ":" in address else address
    return listener, f"http://{host}:{listener.getsockname()[1]}"


def drip(data: bytes, pause: float = 0.05) -> Serve:
    """Return a function that answers byte by byte, so that no packet is ever late."""

    def serve(connection: Any) -> None:
        connection.recv(1 << 16)
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return serve


def answering(status: int, headers: list[str], body: bytes) -> Serve:
    """Return a function that gives every connection this answer."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers]

    def serve(connection: Any) -> None:
        connection.recv(1 << 16)
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    return serve


def pump(one: Any, other: Any) -> None:
    """Carry bytes both ways until either side ends."""

    def carry(source: Any, target: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                data = source.recv(1 << 16)
                if not data:
                    break
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=carry, args=(other, one), daemon=True)
    thread.start()
    carry(one, other)
    thread.join(10)


def forward(port: int) -> Serve:
    """Return a function that carries a connection to a port of this machine."""

    def serve(connection: Any) -> None:
        connection.settimeout(60)
        with socket.create_connection(("127.0.0.1", port), 60) as upstream:
            pump(connection, upstream)

    return serve


@contextlib.contextmanager
def deaf_port(address: str, port: int = 0) -> Any:
    """A port that answers no SYN, as if a firewall dropped it; yields its number."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(8):  # they fill the queue of the listener
            sock = stack.enter_context(socket.socket(family))
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# --- proxies --------------------------------------------------------------------------------------


class Proxy:
    """An HTTP proxy: CONNECT, and requests with absolute URLs. `asked` lists all requests.

    It reaches 127.0.0.1, whatever the host's name is.
    """

    def __init__(self, password: str = "", context: Optional[ssl.SSLContext] = None) -> None:
        self.asked: list[str] = []
        self.password = password
        proxy = self

        class Handler(_ProxyHandler):
            owner = proxy

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        serve = self.server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _ProxyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def is_allowed(self) -> bool:
        self.owner.asked.append(f"{self.command} {self.path}")
        expected = "Basic " + base64.b64encode(self.owner.password.encode()).decode()
        if self.owner.password and self.headers["Proxy-Authorization"] != expected:
            self.send_error(407)
            return False
        return True

    def do_CONNECT(self) -> None:
        if self.is_allowed():
            port = int(self.path.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), 10) as upstream:
                self.send_response(200)
                self.end_headers()
                pump(self.connection, upstream)
        self.close_connection = True

    def do_PUT(self) -> None:
        if self.is_allowed():
            parts = urllib.parse.urlsplit(self.path)
            upstream = http.client.HTTPConnection("127.0.0.1", parts.port or 80, timeout=10)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            names = [name for name in self.headers if not name.lower().startswith("proxy-")]
            headers = {name: self.headers[name] for name in names}
            path = f"{parts.path}?{parts.query}".rstrip("?")
            upstream.request(self.command, path, body or None, headers)
            answer = upstream.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"] or "text/plain")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            upstream.close()

    do_GET = do_POST = do_PUT

    def log_message(self, *_: Any) -> None:
        pass


class SocksProxy:
    """A SOCKS 5 proxy. `asked` lists the names or addresses of all connections."""

    def __init__(self, password: str = "") -> None:
        self.asked: list[str] = []
        self.password = password
        self.listener, url = listen(self.serve)
        self.port = urllib.parse.urlsplit(url).port

    def serve(self, connection: socket.socket) -> None:
        file = connection.makefile("rb")
        methods = file.read(file.read(2)[1])
        method = 2 if self.password else 0
        if method not in methods:
            connection.sendall(b"\5\xff")
            return
        connection.sendall(bytes([5, method]))
        if method:
            user = file.read(file.read(2)[1]).decode()
            password = file.read(file.read(1)[0]).decode()
            is_right = f"{user}:{password}" == self.password
            connection.sendall(b"\1\0" if is_right else b"\1\1")
            if not is_right:
                return
        kind = file.read(4)[3]
        if kind == 3:
            self.asked.append(file.read(file.read(1)[0]).decode())
        else:
            self.asked.append(str(ipaddress.ip_address(file.read(4 if kind == 1 else 16))))
        port = struct.unpack(">H", file.read(2))[0]
        try:
            upstream = socket.create_connection(("127.0.0.1", port), 10)
        except OSError:
            connection.sendall(b"\5\5\0\1\0\0\0\0\0\0")
            return
        connection.sendall(b"\5\0\0\1\0\0\0\0\0\0")
        with upstream:
            pump(connection, upstream)

    def close(self) -> None:
        self.listener.close()


# --- TLS ------------------------------------------------------------------------------------------


class Certificate:
    """A self-signed certificate: files with it (`public`) and with its key too (`both`)."""

    def __init__(self, directory: Path, *names: str, first: int = -3650, last: int = 36500) -> None:
        """It is for these names and addresses, between two days, counted from 2026-01-01."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
        start = datetime.datetime(2026, 1, 1)
        alternatives: list[x509.GeneralName] = []
        for name in names or ("127.0.0.1",):
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                alternatives.append(x509.DNSName(name))
        builder = x509.CertificateBuilder().subject_name(own).issuer_name(own)
        builder = builder.public_key(key.public_key()).serial_number(1)
        builder = builder.not_valid_before(start + datetime.timedelta(days=first))
        builder = builder.not_valid_after(start + datetime.timedelta(days=last))
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), False)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        signed = builder.add_extension(constraints, True).sign(key, hashes.SHA256())
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, *form)
        directory.mkdir(exist_ok=True)
        self.public, self.both = directory / "ca.pem", directory / "both.pem"
        self.public.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        self.both.write_bytes(self.public.read_bytes() + private)

    def context(self) -> ssl.SSLContext:
        """Return the context of a server with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.both)
        return context

    def serve(self, port: int) -> tuple[socket.socket, str]:
        """Serve TLS in front of a port of this machine; return the listener and its URL."""
        context, plain = self.context(), forward(port)

        def serve(connection: socket.socket) -> None:
            connection.settimeout(60)
            with context.wrap_socket(connection, server_side=True) as inside:
                plain(inside)

        listener, url = listen(serve)
        return listener, url.replace("http:", "https:")
