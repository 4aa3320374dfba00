"""Workspaces that are reached without encryption: whoever sees the traffic has the token."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import urllib.parse

from cachix_console import tell
from cachix_protocol import UsageError

VARIABLE = "CACHIX_DEPLOY_REQUIRE_TLS"  # the same as --require-tls, unless it is empty or 0
LOOK_UP = 5.0  # seconds for the name server; an address that is not known counts as foreign


def check(host: str, require_tls: bool) -> None:
    """Warn if the workspace at URL `host` is plain http on another machine.

    Raises UsageError instead if TLS is required. Nobody waits for a mere warning.
    """
    if not host.startswith("http://"):
        return
    problem = f"{host} is plain http: anybody on the way can read the token and change deployments"
    if require_tls or os.environ.get(VARIABLE, "0") not in ("", "0"):
        if not is_this_machine(host):
            raise UsageError(f"{problem}; --require-tls forbids that: use https://")
        return

    def warn() -> None:
        if not is_this_machine(host):
            tell(f"warning: {problem}; use https://")

    threading.Thread(target=warn, name="plain", daemon=True).start()


def is_this_machine(host: str) -> bool:
    """Whether the host of a URL has loopback addresses only, as far as they can be looked up."""
    name = urllib.parse.urlsplit(host).hostname or ""
    addresses: list[str] = []

    def look_up() -> None:
        try:
            # as bytes: Python loads the codec `idna` for a text
            infos = socket.getaddrinfo(name.encode(), None)
            addresses.extend(str(info[4][0]) for info in infos)
        except (OSError, UnicodeError):
            return

    thread = threading.Thread(target=look_up, name="look-up", daemon=True)
    thread.start()
    thread.join(LOOK_UP)
    numbers = [address.partition("%")[0] for address in addresses]
    return bool(numbers) and all(ipaddress.ip_address(address).is_loopback for address in numbers)
