"""TLS without a proxy: the certificate, which may be renewed at any time, and its connections."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import ssl
import struct
import threading
from pathlib import Path
from typing import Any, Callable, TypeVar

from cachix_protocol import Error

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# Else an upload that is broken off here could get no answer. Not every Python sets or names it.
IGNORE_UNEXPECTED_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 1 << 7)


class TlsSocket(ssl.SSLSocket):
    """A connection that one thread reads while another one writes, with the kernel's timeouts.

    OpenSSL lets only one thread at a time into a connection, and takes no notice of SO_RCVTIMEO and
    SO_SNDTIMEO. So this never blocks inside of it.
    """

    turn: threading.Lock
    ended: bool

    def __new__(cls, *arguments: Any, **options: Any) -> TlsSocket:
        context = super().__new__(cls, *arguments, **options)  # the library never calls __init__
        context.turn, context.ended = threading.Lock(), False
        return context

    def do_handshake(self, block: bool = False) -> None:
        """Raises OSError if the peer stalls."""
        self._wait_for(super().do_handshake)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Raises OSError if nothing comes in time."""
        receive = super().recv
        return self._wait_for(lambda: receive(buflen, flags))

    def send(self, data: Any, flags: int = 0) -> int:
        """Raises OSError if the peer takes nothing in time."""
        send = super().send
        return self._wait_for(lambda: send(data, flags))

    def shutdown(self, how: int) -> None:
        """Tell the peer that nothing more will come, without waiting for its answer."""
        with contextlib.suppress(OSError, ValueError), self.turn:
            self.setblocking(False)
            self.unwrap()
        self.ended = True
        super().shutdown(how)

    def _wait_for(self, do: Callable[[], Result]) -> Result:
        """Do something as soon as the connection allows it."""
        while True:
            try:
                with self.turn:
                    if not self.ended:
                        self.setblocking(False)  # gunicorn sets it to block
                    return do()
            except ssl.SSLWantReadError:
                event, option = select.POLLIN, socket.SO_RCVTIMEO
            except ssl.SSLWantWriteError:
                event, option = select.POLLOUT, socket.SO_SNDTIMEO
            poll = select.poll()
            poll.register(self.fileno(), event)
            if not poll.poll(self._timeout(option)):
                raise ConnectionResetError(errno.ECONNRESET, "the peer stalls")

    def _timeout(self, option: int) -> float | None:
        """A timeout of the kernel in milliseconds; None if there is none."""
        raw = self.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("ll"))
        seconds, microseconds = struct.unpack("ll", raw)
        return seconds * 1e3 + microseconds / 1e3 or None


class Certificate:
    """A certificate chain and its private key in PEM files. New files are used as they come."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises Error if the files can't be used."""
        self.certificate, self.key = certificate, key
        self._lock = threading.Lock()
        self._state = self._look()
        self._context = load(certificate, key)

    def context(self) -> ssl.SSLContext:
        """The context for a new connection."""
        with self._lock:
            state = self._look()
            if state != self._state:
                self._state = state
                try:
                    self._context = load(self.certificate, self.key)
                    logger.info("%s is used from now on", self.certificate)
                except Error as error:  # half of a renewal, perhaps
                    logger.warning("%s; the former certificate stays in use", error)
            return self._context

    def _look(self) -> list[tuple[int, int, int]]:
        """A value that changes when the files do."""
        files = []
        with contextlib.suppress(OSError):
            for path in (self.certificate, self.key):
                facts = os.stat(path)
                files.append((facts.st_mtime_ns, facts.st_ino, facts.st_size))
        return files


def load(certificate: Path, key: Path) -> ssl.SSLContext:
    """The context of a server. Raises Error that names the file that can't be used."""
    for option, path in (("--certificate", certificate), ("--key", key)):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise Error(f"{option}={path} can't be read: {error.strerror}") from None
        if b"-----BEGIN " not in text:
            raise Error(f"{option}={path} is no PEM file: it has no line `-----BEGIN ...`")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = TlsSocket
    context.options |= IGNORE_UNEXPECTED_EOF
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        raise Error(_sentence(certificate, key, error.reason or "")) from None
    except OSError as error:  # the file has changed since it was read
        raise Error(f"{certificate} or {key} can't be read: {error.strerror}") from None
    return context


def _no_password() -> str:
    """Raises Error; OpenSSL would ask on the terminal."""
    raise Error("--key must name a private key that no password protects")


def _sentence(certificate: Path, key: Path, reason: str) -> str:
    """The fault of two files, in words for OpenSSL's."""
    if reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        return f"--key={key} does not belong to the certificate in --certificate={certificate}"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
    except ssl.SSLError:
        return f"--certificate={certificate} holds no certificate in PEM ({reason})"
    if reason.startswith(("EE_KEY", "CA_MD")):
        return f"--certificate={certificate} is refused by OpenSSL as too weak ({reason})"
    return f"--key={key} holds no private key in PEM that can be used ({reason or 'damaged'})"
