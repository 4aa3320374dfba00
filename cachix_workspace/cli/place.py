"""The workspace that a command works on."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

from cachix_protocol import UsageError, checked_url
from cachix_workspace.database import Database, get_meta, open_database
from cachix_workspace.settings import DEFAULT_URL, Settings

VARIABLE = "CACHIX_WORKSPACE_DATA"
DEFAULT = "/var/lib/cachix-workspace"  # of root


def public_url(options: dict[str, Any]) -> str | None:
    """The value of --public-url, None if there is none. Raises UsageError."""
    text = options.get("--public-url")
    if not text:
        return None
    return checked_url(text, "--public-url", "https://deploy.example.org", bare=True)


def further_urls(options: dict[str, Any]) -> tuple[str, ...]:
    """The values of --also-known-as. Raises UsageError."""
    option, example = "--also-known-as", "http://deploy.lan:8080"
    return tuple(checked_url(text, option, example, bare=True) for text in options[option])


def operator() -> str:
    """Whoever runs a command, for the audit."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    return f"command of {user}"


def data_of(options: dict[str, Any]) -> Path:
    """The directory of the workspace. Raises UsageError if nothing names one."""
    named = options["--data"] or os.environ.get(VARIABLE)
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]  # systemd may name several
    if named or state:
        return Path(named or state).absolute()
    if os.geteuid() == 0:
        return Path(DEFAULT)
    raise UsageError(f"name the directory of the workspace with --data, or in {VARIABLE}")


def open_workspace(options: dict[str, Any], create: bool = False) -> tuple[Database, Settings]:
    """The workspace, and its settings as `serve` last had them. Raises Error."""
    url = public_url(options)
    data = data_of(options)
    database = open_database(Settings(data), create)
    with database.read() as connection:
        stored = get_meta(connection, "public_url")
    return database, Settings(data, url or stored or DEFAULT_URL)
