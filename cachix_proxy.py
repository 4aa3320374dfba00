"""The proxy of a URL: one decision for websockets, requests and Nix, and the way through it.

The environment decides, as it does for curl: http_proxy, https_proxy, all_proxy and no_proxy, in
small letters before capital ones. An empty variable counts as none.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from typing import Optional
from urllib.parse import quote, unquote, urlsplit

from activate.values import dataclass
from cachix_errors import UsageError
from cachix_protocol import USER_AGENT

PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}  # the default ports of proxies
MAX_HEAD = 1 << 16  # bytes of a proxy's answer
SOCKS_ERRORS = {
    2: "its rules forbid that",
    3: "it does not reach that network",
    4: "it does not reach that host",
    5: "connection refused",
    8: "it does not know that kind of address",
}

# --- the decision ---------------------------------------------------------------------------------


def _variable(*names: str) -> tuple[str, str]:
    """The first variable that is set, and its value; both are empty if none is."""
    for name in names:
        for spelling in (name, name.upper()):
            value = os.environ.get(spelling, "").strip()
            if value:
                return spelling, value
    return "", ""


@dataclass(frozen=True)
class Proxy:
    """A proxy. With `socks5` names are looked up on this machine, with `socks5h` by the proxy."""

    scheme: str
    host: str
    port: int
    user: Optional[str] = None
    password: str = ""

    @classmethod
    def parse(cls, variable: str, text: str) -> Proxy:
        """The proxy that a variable names. HOST:PORT is a http proxy. Raises UsageError.

        The error does not show the value, which may hold a password.
        """
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            scheme = {"socks": "socks5"}.get(parts.scheme, parts.scheme)
            host, port = ascii_host(parts.hostname or ""), parts.port or PORTS[scheme]
        except (ValueError, KeyError):
            host = ""
        if not host:
            forms = ", ".join(f"{name}://HOST:PORT" for name in PORTS)
            raise UsageError(f"the proxy in {variable} can't be used: give {forms}")
        user = None if parts.username is None else unquote(parts.username)
        return cls(scheme, host, port, user, unquote(parts.password or ""))

    def __str__(self) -> str:
        """The proxy's URL without its credentials, for messages."""
        return f"{self.scheme}://{authority(self.host, self.port)}"

    @property
    def url(self) -> str:
        """The proxy's URL with its credentials."""
        if self.user is None:
            return str(self)
        credentials = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}"
        return f"{self.scheme}://{credentials}@{authority(self.host, self.port)}"

    @property
    def is_socks(self) -> bool:
        """Whether it speaks SOCKS, and not HTTP."""
        return self.scheme.startswith("socks")


def ascii_host(host: str) -> str:
    """A host's name in ASCII, as it goes over the wire. Raises UnicodeError."""
    if host.isascii():
        return host
    try:
        import idna
    except ImportError:
        return host.encode("idna").decode()
    return idna.encode(host, uts46=True).decode()


def authority(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_and_port(url: str) -> tuple[str, int]:
    """The host of an http or https URL, an IPv6 address without brackets, and its port."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0)


def proxy_for(url: str) -> Optional[Proxy]:
    """The proxy for an http or https URL; None if it is reached directly. Raises UsageError."""
    variable, value = _variable(f"{urlsplit(url).scheme}_proxy", "all_proxy")
    if not value or any(entry.matches(*host_and_port(url)) for entry in _bypasses()):
        return None
    return Proxy.parse(variable, value)


@dataclass(frozen=True)
class _Bypass:
    """An entry of no_proxy: a host with all below it, an address, a network, or `*` for all."""

    host: str
    port: Optional[int] = None

    @classmethod
    def parse(cls, text: str) -> _Bypass:
        """HOST, .HOST, *.HOST, ADDRESS or NETWORK/BITS, each maybe with :PORT."""
        text = re.sub(r"^\w+://", "", text.lower()).rstrip("/")
        match = re.fullmatch(r"\[(.*)\](?::(\d+))?|([^:]*):(\d+)", text)
        port = match and (match[2] or match[4])
        host = (match[1] or match[3] or "") if match else text
        with contextlib.suppress(UnicodeError):  # else it matches nothing
            host = ascii_host(host)
        name = "*" if host == "*" else re.sub(r"^\*?\.", "", host).rstrip(".")
        return cls(name, int(port) if port else None)

    def matches(self, host: str, port: int) -> bool:
        """Whether a host is reached directly because of this entry."""
        host = host.lower().rstrip(".")
        if self.port not in (None, port):
            return False
        if self.host in ("*", host):
            return True
        if ":" in host or re.fullmatch(r"[\d.]+", host):
            return _is_in_network(host, self.host)
        return bool(self.host) and host.endswith(f".{self.host}")


def _is_in_network(address: str, network: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _bypasses() -> list[_Bypass]:
    """The entries of no_proxy, which commas or blanks separate."""
    return [_Bypass.parse(text) for text in re.split(r"[\s,]+", _variable("no_proxy")[1])]


def for_nix(*urls: str) -> dict[str, str]:
    """The variables by which curl, and so Nix, decides as we do, for these URLs at least.

    curl takes no HTTP_PROXY in capital letters and, in no_proxy, no port, no `*.` and, in older
    releases, no network. Raises UsageError.
    """
    variables = {}
    for scheme in ("http", "https"):
        name, value = _variable(f"{scheme}_proxy", "all_proxy")
        if value:
            variables[f"{scheme}_proxy"] = Proxy.parse(name, value).url
    if not variables:
        return {}
    bypasses = _bypasses()
    hosts = [entry.host for entry in bypasses if entry.host and entry.port is None]
    for url in urls:
        with contextlib.suppress(ValueError):  # it is no URL: Nix says so
            hosts += [urlsplit(url).hostname or ""] if proxy_for(url) is None else []
    text = "*" if "*" in hosts else ",".join(dict.fromkeys(filter(None, hosts)))
    return {**variables, "no_proxy": text, "NO_PROXY": text}


# --- the way through it ---------------------------------------------------------------------------


def tunnel(sock: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """Let the proxy at the other end of `sock` connect to a host. Raises OSError."""
    if proxy.is_socks:
        _connect_socks(sock, proxy, host, port)
    else:
        _connect_http(sock, proxy, host, port)


def _connect_http(sock: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """Ask for a tunnel by CONNECT."""
    target = authority(host, port)
    head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: {USER_AGENT}\r\n"
    if proxy.user is not None:
        import base64

        credentials = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
        head += f"Proxy-Authorization: Basic {credentials}\r\n"
    sock.sendall(f"{head}\r\n".encode())
    answer = b""
    while not answer.endswith((b"\r\n\r\n", b"\n\n")) and len(answer) < MAX_HEAD:
        answer += _read(sock, 1)  # no more: what follows is for the other end
    match = re.match(rb"HTTP/\S+ (\d{3})", answer)
    if match is None:
        raise OSError("it does not answer as an HTTP proxy")
    status = int(match[1])
    if status == 407:
        raise OSError("it refused the credentials in its URL, or wants some (HTTP 407)")
    if not 200 <= status < 300:
        raise OSError(f"it refused to connect to {target} (HTTP {status})")


def _connect_socks(sock: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """Ask for a connection by SOCKS 5 (RFC 1928, RFC 1929)."""
    methods = b"\0" if proxy.user is None else b"\0\2"
    sock.sendall(b"\5" + bytes([len(methods)]) + methods)
    method = _read(sock, 2)[1]
    if method == 2:
        parts = ((proxy.user or "").encode(), proxy.password.encode())
        sock.sendall(b"\1" + b"".join(bytes([len(part)]) + part for part in parts))
        if _read(sock, 2)[1]:
            raise OSError("it refused the credentials in its URL")
    elif method:
        raise OSError("it wants credentials: give them in its URL")
    sock.sendall(b"\5\1\0" + _socks_address(proxy, host) + port.to_bytes(2, "big"))
    _, code, _, kind = _read(sock, 4)
    if code:
        reason = SOCKS_ERRORS.get(code, f"SOCKS error {code}")
        raise OSError(f"it can't connect to {authority(host, port)}: {reason}")
    _read(sock, {1: 4, 4: 16}.get(kind) or _read(sock, 1)[0])
    _read(sock, 2)


def _socks_address(proxy: Proxy, host: str) -> bytes:
    """A host as SOCKS writes it: an address, or a name that the proxy looks up."""
    flags = 0 if proxy.scheme == "socks5" else socket.AI_NUMERICHOST
    try:
        results = socket.getaddrinfo(host.encode(), None, 0, socket.SOCK_STREAM, 0, flags)
    except socket.gaierror:
        if not flags:
            raise
        return b"\3" + bytes([len(host)]) + host.encode()
    family, _, _, _, address = results[0]
    kind = b"\1" if family == socket.AF_INET else b"\4"
    return kind + socket.inet_pton(family, str(address[0]).partition("%")[0])


def _read(sock: socket.socket, size: int) -> bytes:
    """So many bytes. Raises OSError if the proxy hangs up before."""
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise OSError("it hung up")
        data += part
    return data
