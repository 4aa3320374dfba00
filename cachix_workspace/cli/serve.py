"""The command `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachix_console import number
from cachix_workspace import server
from cachix_workspace.cli.place import public_url
from cachix_workspace.settings import Settings


def run(options: dict[str, Any]) -> int:
    """Serve until a signal; the exit status. Raises Error."""
    url = public_url(options)
    connections = int(number(options, "--max-connections", 4, 100_000))
    listener = server.bind(options["--listen"])
    settings = Settings(
        data=Path(options["--data"]).absolute(),
        public_url=url or server.url_of(listener),
        max_connections=connections,
    )
    return server.serve(settings, listener)
