"""The workspace that a command works on."""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from pathlib import Path
from typing import Any

from cachix_protocol import Error, UsageError, checked_url
from cachix_workspace import engine
from cachix_workspace.database import CACHE_STORE, Database, get_meta, open_database
from cachix_workspace.settings import DATABASE as FILE
from cachix_workspace.settings import DEFAULT_URL, Settings

VARIABLE = "CACHIX_WORKSPACE_DATA"
DATABASE = "CACHIX_WORKSPACE_DATABASE"  # a URL
CREDENTIAL = "database-url"  # such a file among systemd's credentials
DATABASE_FILE = "CACHIX_WORKSPACE_DATABASE_FILE"  # a file that has it
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
    """The user who runs a command, for the audit."""
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


def database_of(options: dict[str, Any]) -> tuple[str, str | None]:
    """The URL of the database, and the file that has it. Raises Error.

    The URL is empty if the data directory has the database, or names it.
    """
    url, file = options.get("--database"), options.get("--database-file")
    if url and file:
        raise UsageError("--database and --database-file exclude each other")
    if url:
        checked = engine.checked_url(url, "--database")
        if engine.has_password(checked):
            hint = "write the URL into a file, and name that with --database-file"
            raise UsageError(f"anybody on this machine can read --database: {hint}")
        return checked, None
    if not file and os.environ.get(DATABASE):
        return engine.checked_url(os.environ[DATABASE], DATABASE), None
    file = file or os.environ.get(DATABASE_FILE)
    if file:
        return engine.read_url(file), os.path.abspath(file)
    credential = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), CREDENTIAL)
    return engine.read_url(str(credential)) if credential.exists() else "", None


def settings_of(options: dict[str, Any]) -> Settings:
    """The settings that say where the workspace is. Raises Error."""
    data, (url, _) = data_of(options), database_of(options)
    if url and data.joinpath(FILE).exists():
        hint = "`cachix-workspace migrate-database` moves it"
        raise Error(f"the workspace in {data} has a database of its own: {hint}")
    return Settings(data, database=url)


def cache_of(options: dict[str, Any]) -> str:
    """The place of the caches' files: a directory, or a bucket's URL; empty for the one noted.

    Raises UsageError.
    """
    directory, url = options["--cache-directory"], options["--cache-store"]
    if url:
        from cachix_workspace.bucket import checked_url as checked_bucket

        return checked_bucket(url)
    return os.path.abspath(directory) if directory else ""


def note_database(options: dict[str, Any]) -> None:
    """Let later commands with this data directory find the database. Raises Error or OSError.

    One that the environment names is for whoever has that environment.
    """
    if options["--database"] or options["--database-file"]:
        engine.note_url(data_of(options), *database_of(options))


def open_workspace(options: dict[str, Any], create: bool = False) -> tuple[Database, Settings]:
    """The workspace, and its settings as `serve` last had them. Raises Error."""
    url = public_url(options)
    settings = settings_of(options)
    database = open_database(settings, create)
    with database.read() as connection:
        stored = get_meta(connection, "public_url")
        store = get_meta(connection, CACHE_STORE) or ""
    return database, replace(settings, public_url=url or stored or DEFAULT_URL, cache_store=store)
