"""Sessions of requests whose connections are opened by a Dialer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from cachix_diagnosis import root_cause
from cachix_dial import Dialer
from cachix_proxy import Proxy
from cachix_unguessed import requests

READ_BYTES = 1 << 16


class Session(requests.Session):
    """A session for one thread. Neither the environment nor ~/.netrc changes its requests.

    Set the deadline of `dialer` before each request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False
        self.auth = lambda request: request  # or a user in the URL would replace the token
        self.headers["Accept-Encoding"] = "identity"
        self.dialer = Dialer(0)
        self.own_proxy: Optional[Proxy] = None  # one that `connect` goes through
        adapter = _Adapter(self)
        self.mount("http://", adapter)
        self.mount("https://", adapter)

    def fetch(
        self, method: str, url: str, proxy: Optional[Proxy], limit: int, **options: Any
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Make a request: status, headers and body of its answer. `options` are `request`'s.

        Redirects are not followed. Raises RequestException or OSError, and ValueError if the body
        has more than `limit` bytes, or is compressed: little of that may be much.
        """
        self.own_proxy, self.proxies = None, {}
        if proxy is not None and (proxy.is_socks or proxy.scheme == "https" and url[:5] == "http:"):
            self.own_proxy = proxy  # requests knows no SOCKS, and would not verify that certificate
        elif proxy is not None:
            self.proxies = {"http": proxy.url, "https": proxy.url}
        try:
            response = self.request(method, url, stream=True, allow_redirects=False, **options)
        except requests.exceptions.ProxyError as error:
            raise OSError(f"by the proxy {proxy}: {root_cause(error)}") from None
        coding = response.headers.get("Content-Encoding", "identity")
        if coding.lower() != "identity":
            raise ValueError(f"the answer is encoded as {coding[:20]!r}, which we never ask for")
        return response.status_code, response.headers, self.read(response.raw, limit)

    def read(self, raw: Any, limit: int) -> bytes:
        """The body of an answer as it comes over the wire. Raises OSError, or ValueError."""
        body = bytearray()
        try:
            while chunk := raw.read(READ_BYTES, decode_content=False):
                body += chunk
                if len(body) > limit:
                    raise ValueError(f"the answer is larger than {limit >> 20} MiB")
                self.dialer.left()
            return bytes(body)
        except HTTPError as error:
            raise OSError(error) from None
        finally:
            body.clear()  # a traceback may keep it for long

    def connect(self, host: str, port: int) -> Any:
        """A TCP connection to a host, or to a proxy that requests talks to. Raises OSError."""
        sock = self.dialer.connect(host, port, self.own_proxy)
        self.dialer.is_connected = not self.proxies
        return sock


class _Adapter(requests.adapters.HTTPAdapter):
    """Uses connections that ask their session for a socket."""

    def __init__(self, session: Session) -> None:
        self.pools = _pools(session)
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = self.pools

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **options)
        manager.pool_classes_by_scheme = self.pools
        return manager


def _pools(session: Session) -> dict[str, Any]:
    """urllib3's classes of connection pools, with connections of this session."""

    class Dialed:
        """The part of a connection that differs from urllib3's."""

        _dns_host: str
        port: int
        sock: Any

        def _new_conn(self) -> Any:
            return session.connect(self._dns_host, self.port)

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            session.dialer.keep(self.sock)  # it may be encrypted now

    class Plain(Dialed, HTTPConnection): ...

    class Encrypted(Dialed, HTTPSConnection): ...

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class EncryptedPool(HTTPSConnectionPool):
        ConnectionCls = Encrypted

    return {"http": PlainPool, "https": EncryptedPool}
