"""The self-hosted workspace: agents, their tokens, their binary cache and their deployments.

`python -m workspace serve` (installed as `cachix-workspace`) runs it. Arrows point one way:
api, sockets, cache -> deployments, logs, tokens -> tables. What agents and CI say on the wire is in cachix_deploy.py.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachix_protocol import Error as Error
from cachix_protocol import UsageError as UsageError

if TYPE_CHECKING:
    from flask import Flask

DATABASE = "workspace.db"  # the file in the data directory


class Refusal(Error):
    """A request that is answered with the HTTP status `code` and this sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Settings:
    """How a workspace is served. Times are in seconds."""

    data: Path
    public_url: str = "http://127.0.0.1:8080"
    max_connections: int = 4096
    send_timeout: float = 20.0  # a reader that takes nothing for so long is hung up on
    receive_timeout: float = 60.0  # a sender that stops in the middle of a request
    ping_interval: float = 25.0
    revocation_interval: float = 2.0  # how long a revoked or expired token's sockets may live on

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.data / DATABASE}"

    @property
    def public_host(self) -> str:
        """The host name in the public URL, without a port: caches and their keys are named after it."""
        return urllib.parse.urlsplit(self.public_url).hostname or "localhost"


def create_app(settings: Settings) -> Flask:
    """The WSGI application, with its database open and its watch over revoked tokens running."""
    from cachix_workspace import api

    return api.create_app(settings)
