"""Why a connection has failed: sentences with the cause and the remedy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from activate.text import brief
from cachix_dial import Dialer, within
from cachix_errors import Refused, Undecodable, Unreachable
from cachix_protocol import loads
from cachix_proxy import authority, host_and_port

if TYPE_CHECKING:
    import ssl

PROBE_TIMEOUT = 3.0  # seconds for finding out whether a server speaks another protocol
MAX_SENTENCE = 300  # characters of a server's own words
UPGRADE = (
    "in nginx set `proxy_http_version 1.1`, `proxy_set_header Upgrade $http_upgrade` and"
    " `proxy_set_header Connection upgrade`; in Apache `upgrade=websocket`; Caddy passes them"
)
# OpenSSL's codes
UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
NOT_VALID_NOW = (9, 10)
OTHER_NAME = (62, 64)
OTHER_NAME_HINT = "; give a name as --host that the certificate has"


def reason(url: str, error: BaseException, dialer: Dialer) -> str:
    """Why no answer came from the server of a URL. It may be asked what it speaks instead."""
    import ssl

    if dialer.is_late:
        return dialer.lateness
    cause = root_cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _certificate_problem(cause)
    if type(cause).__name__ == "CertificateError":  # older urllib3 compares the names itself
        return f"certificate verify failed: {brief(str(cause))}{OTHER_NAME_HINT}"
    timeout = min(PROBE_TIMEOUT, dialer.deadline - time.monotonic())
    return (dialer.is_connected and other_scheme(url, timeout)) or _words(cause)


def root_cause(error: BaseException) -> BaseException:
    """The exception that the libraries have wrapped, maybe many times."""
    for _ in range(20):
        inner = (error.__cause__, getattr(error, "reason", None), *error.args)
        following = next((one for one in inner if isinstance(one, BaseException)), None)
        if following is None:
            break
        error = following
    return error


def _words(error: BaseException) -> str:
    """An exception in words."""
    import socket

    if isinstance(error, socket.gaierror):
        return f"the host's name can't be looked up: {error.strerror}"
    # the libraries are not strict
    if isinstance(error, (IndexError, UnicodeError)) or type(error).__name__ == "BadStatusLine":
        return "its answer is not HTTP"
    return brief(str(error)) or type(error).__name__


def _certificate_problem(error: ssl.SSLCertVerificationError) -> str:
    """Why a certificate is not accepted, and what can be done."""
    hint = ""
    if error.verify_code in UNKNOWN_AUTHORITY:
        hint = "; name a file with the authority to trust by SSL_CERT_FILE"
    elif error.verify_code in NOT_VALID_NOW:
        today = time.strftime("%Y-%m-%d")
        hint = f"; renew it, or set the clock of this machine, where it is {today}"
    elif error.verify_code in OTHER_NAME:
        hint = OTHER_NAME_HINT
    return f"certificate verify failed: {error.verify_message.rstrip('.')}{hint}"


# --- the other scheme -----------------------------------------------------------------------------


def other_scheme(url: str, timeout: float) -> str:
    """A sentence if the server of an https URL speaks plain http, or the reverse; else empty."""
    parts = urlsplit(url)
    scheme, name = ("http", "plain http") if parts.scheme == "https" else ("https", "https")
    host = authority(*host_and_port(url))
    if not speaks(f"{scheme}://{host}", timeout):
        return ""
    return f"{host} speaks {name}: use {scheme}://{host}{parts.path}"


def speaks(url: str, timeout: float) -> bool:
    """Whether the server of a URL answers in the URL's scheme within `timeout` seconds."""
    dialer = Dialer(timeout)

    def ask() -> bool:
        with contextlib.closing(dialer.open(url, verify=False)) as sock:
            if url.startswith("https:"):
                return True
            sock.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return bool(sock.recv(16).startswith(b"HTTP/"))

    with contextlib.suppress(Exception):
        return within(timeout, ask, dialer.hang_up)
    return False


# --- answers --------------------------------------------------------------------------------------


def sentence(body: bytes) -> str:
    """The server's own words in an answer: our JSON, Cachix's, or plain text; empty for a page."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(Undecodable):
        record = loads(body)
        is_object = isinstance(record, dict)
        values = [record.get("error"), record.get("message")] if is_object else [record]
        text = next((value for value in values if isinstance(value, str)), text)
    return "" if text.lstrip().startswith("<") else brief(text)[:MAX_SENTENCE]


def handshake_problem(
    host: str, path: str, status: int, headers: Mapping[str, str], body: bytes, dialer: Dialer
) -> Exception:
    """The error for a handshake that was answered with another status than 101."""
    text = sentence(body)
    if status in (401, 403):
        hint = text or "check it, or create a new one"
        problem = f"{host} refused the token (HTTP {status}): {hint}"
        return Refused(problem, is_unknown=status == 401)
    # our workspace answers a plain request for a log with its lines
    is_json = headers.get("content-type", "").startswith("application/json")
    is_log = status == 200 and path.startswith("/api/") and is_json
    if status == 426 or is_log or (status == 400 and "upgrade" in text.lower()):
        problem = f"does not pass the Upgrade headers (HTTP {status})"
        return Unreachable(f"a proxy in front of {host} {problem}: {UPGRADE}")
    if status == 404 and path.startswith("/ws"):
        hint = "is there a path too many, or one missing, in --host?"
        return Unreachable(f"{host} is no workspace (HTTP 404 at {path}): {hint}")
    if status == 400 and (other := speaks_https(host, dialer)):
        return Unreachable(other)
    hint = ""
    if status in (200, 400):
        question = "is it a workspace, and does a proxy in front of it pass the Upgrade headers?"
        hint = f": {text}" if status == 400 and text else f": {question}"
    if headers.get("location"):
        location = brief(headers["location"])
        hint = f" and points to {location}, which is not followed: give it as --host"
    return Unreachable(f"{host}{path} answered HTTP {status} instead of a websocket{hint}")


def speaks_https(host: str, dialer: Dialer) -> str:
    """A sentence if the server of an http URL, which has answered with 400, speaks https."""
    if not host.startswith("http:"):
        return ""
    return other_scheme(host, min(PROBE_TIMEOUT, dialer.deadline - time.monotonic()))
