"""How a workspace is served, and where its files are."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path

DATABASE = "workspace.db"  # the file in the data directory
DEFAULT_URL = "http://127.0.0.1:8080"


def host_and_port(url: str) -> tuple[str, int | None]:
    """The host and the port in a URL; no host if it has none, or is no URL."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


@dataclass(frozen=True)
class Settings:
    """How a workspace is served. Times are in seconds."""

    data: Path
    public_url: str = DEFAULT_URL
    also_known_as: tuple[str, ...] = ()  # further URLs
    behind_proxy: int = 0  # proxies whose X-Forwarded headers are believed
    auth_header: str = ""  # in which the proxy names who is signed in; empty for none
    max_connections: int = 4096
    max_nar: int = 10 << 30  # bytes
    keep_free: int = 1 << 30  # bytes of the disk: nothing is stored beyond that
    max_log: int = 256 << 20  # bytes of a deployment's log
    max_sockets: int = 10_000  # of one token
    max_sockets_of_one: int = 100  # of a token for one agent, which needs three
    send_timeout: float = 20.0  # a peer that takes nothing for so long is disconnected
    receive_timeout: float = 60.0  # so is a peer that stops in the middle of a request
    patience: float = 15.0  # without a sign of life until a deployment is sent again
    lost_after: float = 60.0  # without one until a deployment counts as lost
    ping_interval: float = 25.0
    revocation_interval: float = 2.0  # sockets outlive their revoked or expired token by this

    def most_sockets(self, is_for_one: bool) -> int:
        """How many websockets a token may have, which may be for one agent."""
        return self.max_sockets_of_one if is_for_one else self.max_sockets

    @property
    def max_unfinished(self) -> int:
        """How many bytes the uploads of one token may have at a time."""
        return 4 * self.max_nar

    @property
    def database_url(self) -> str:
        """The database as SQLAlchemy names it."""
        return f"sqlite:///{self.data / DATABASE}"

    @property
    def cache_place(self) -> Path:
        """A directory on the file system of the caches, which may be one of their own."""
        caches = self.data / "cache"
        return caches if caches.exists() else self.data

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs of this workspace, the public one first."""
        return (self.public_url, *self.also_known_as)

    def url_by(self, host: str) -> str:
        """This workspace's URL that has the host by which a client came: a Host header.

        The public one if it has none of our names: whoever invents one is not believed.
        """
        came = host_and_port(f"//{host}")
        same = [url for url in self.urls if host_and_port(url)[0] == came[0]]
        return next((url for url in same if host_and_port(url) == came), (same or self.urls)[0])

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts in all URLs, the public one first."""
        return tuple(dict.fromkeys(host_and_port(url)[0] for url in self.urls))

    @property
    def public_host(self) -> str:
        """The host in the public URL, without a port: caches and their keys are named after it."""
        return urllib.parse.urlsplit(self.public_url).hostname or "localhost"
