"""How a workspace is served, and where its files are."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path

DATABASE = "workspace.db"  # the file in the data directory
DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Settings:
    """How a workspace is served. Times are in seconds."""

    data: Path
    public_url: str = DEFAULT_URL
    max_connections: int = 4096
    send_timeout: float = 20.0  # a peer that takes nothing for so long is disconnected
    receive_timeout: float = 60.0  # so is a peer that stops in the middle of a request
    patience: float = 15.0  # without a sign of life until a deployment is sent again
    lost_after: float = 60.0  # without one until a deployment counts as lost
    ping_interval: float = 25.0
    revocation_interval: float = 2.0  # sockets outlive their revoked or expired token by this

    @property
    def database_url(self) -> str:
        """The database as SQLAlchemy names it."""
        return f"sqlite:///{self.data / DATABASE}"

    @property
    def public_host(self) -> str:
        """The host in the public URL, without a port: caches and their keys are named after it."""
        return urllib.parse.urlsplit(self.public_url).hostname or "localhost"
