"""How a workspace is served, and where its files are."""

from __future__ import annotations

import functools
import re
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

DATABASE = "workspace.db"  # the file in the data directory
NOTE = "database.json"  # in its place where the database is PostgreSQL: see engine.py
HOST = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")  # a Host header
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
    is_nameless: bool = False  # no URL was named, and it listens on all addresses of the machine
    behind_proxy: int = 0  # proxies whose X-Forwarded headers are believed
    auth_header: str = ""  # in which the proxy names who is signed in; empty for none
    max_connections: int = 16_000
    max_per_address: int = 512  # connections that have not shown a valid token; 0 for any number
    max_nar: int = 10 << 30  # bytes
    keep_free: int = 1 << 30  # bytes of the disk: nothing is stored beyond that
    max_log: int = 64 << 20  # bytes of a deployment's log
    keep_deployments: int = 0  # of each agent; 0 for all
    keep_days: float = 0.0  # that deployments are kept; 0 for any number
    # the URL of PostgreSQL, perhaps with a password; empty for the database of the data directory
    database: str = field(default="", repr=False)
    cache_store: str = ""  # the caches' directory, or the s3:// URL of a bucket; empty for `cache`
    has_shared_directory: bool = False  # whether other nodes use that directory too
    max_sockets: int = 10_000  # of one token
    max_sockets_of_one: int = 100  # of a token for one agent, which needs three
    send_timeout: float = 20.0  # a peer that takes nothing for so long is disconnected
    receive_timeout: float = 60.0  # so is a peer that stops in the middle of a request
    patience: float = 15.0  # without a sign of life until a deployment is sent again
    lost_after: float = 60.0  # without one until a deployment counts as lost
    ping_interval: float = 25.0
    beat_interval: float = 5.0  # between two words of a node that it lives
    node_timeout: float = 30.0  # a node that says nothing for so long lives no more
    look_interval: float = 10.0  # between two looks for webhooks, and for news that were lost
    database_patience: float = 20.0  # without a database a node closes its websockets after this
    revocation_interval: float = 2.0  # sockets outlive their revoked or expired token by this

    def most_sockets(self, is_for_one: bool) -> int:
        """How many websockets a token may have, which may be for one agent."""
        return self.max_sockets_of_one if is_for_one else self.max_sockets

    @property
    def max_unfinished(self) -> int:
        """How many bytes the uploads of one token may have at a time."""
        return 4 * self.max_nar

    @property
    def cache_place(self) -> Path:
        """A directory on the file system that uploads are written to."""
        return self.caches if not self.is_bucket and self.caches.exists() else self.data

    @property
    def is_bucket(self) -> bool:
        """Whether a bucket has the caches."""
        return self.cache_store.startswith("s3://")

    @functools.cached_property
    def caches(self) -> Path:
        """The directory of the caches, unless a bucket has them."""
        named = "" if self.is_bucket else self.cache_store
        return Path(named) if named else self.data / "cache"

    @property
    def has_shared_cache(self) -> bool:
        """Whether all nodes use these caches."""
        return self.is_bucket or self.has_shared_directory

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs of this workspace, the public one first."""
        return (self.public_url, *self.also_known_as)

    def url_by(self, host: str) -> str:
        """This workspace's URL that has the host by which a client came: a Host header.

        The public one if it has none of our names: whoever invents one is not believed. If we have
        none, it is the one that a client uses.
        """
        came = host_and_port(f"//{host}")
        if self.is_nameless and came[0] not in self.hosts and HOST.fullmatch(host):
            return f"{urllib.parse.urlsplit(self.public_url).scheme}://{host}"
        same = [url for url in self.urls if host_and_port(url)[0] == came[0]]
        return next((url for url in same if host_and_port(url) == came), (same or self.urls)[0])

    def link_by(self, host: str) -> str:
        """The URL that links begin with, for a client that came by this host."""
        return self.url_by(host) if self.is_nameless else self.public_url

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts in all URLs, the public one first."""
        return tuple(dict.fromkeys(host_and_port(url)[0] for url in self.urls))

    @property
    def public_host(self) -> str:
        """The host in the public URL, without a port: caches and their keys are named after it."""
        return urllib.parse.urlsplit(self.public_url).hostname or "localhost"
