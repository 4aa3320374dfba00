"""The engines of databases: SQLite in the data directory, or PostgreSQL by a URL."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import threading
import weakref
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

from cachix_protocol import Error, UsageError
from cachix_workspace.settings import DATABASE, NOTE, Settings

BUSY_TIMEOUT = 10.0  # seconds that a transaction waits for another one to end
CONNECT_TIMEOUT = 5  # seconds
POOL_TIMEOUT = 10.0  # seconds that a request waits for a connection of the pool
DRIVER = "postgresql+psycopg"
EXAMPLE = f"{DRIVER}://USER@HOST/DATABASE"
# PostgreSQL allows 100 connections by default: several nodes and their commands share them.
POOL = {"pool_size": 8, "max_overflow": 8, "pool_timeout": POOL_TIMEOUT}
SQLITE_POOL = {"pool_size": 8, "max_overflow": 24, "pool_timeout": 20}
# A peer that is gone is noticed within these seconds, whatever the network does.
KEEPALIVE = {
    **{"connect_timeout": CONNECT_TIMEOUT, "tcp_user_timeout": 15_000},
    **{"keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 2},
}
# PostgreSQL gives up a node that is gone while others still wait for the locks that it holds.
WATCH = (
    "SET tcp_keepalives_idle = 3",
    "SET tcp_keepalives_interval = 2",
    "SET tcp_keepalives_count = 2",
    "SET tcp_user_timeout = '7s'",
)
# No statement and no transaction waits without end: a node may be stopped in the middle of one.
LIMITS = (
    "SET statement_timeout = '30s'",
    f"SET lock_timeout = '{BUSY_TIMEOUT:.0f}s'",
    "SET idle_in_transaction_session_timeout = '60s'",
)


def checked_url(text: str, source: str) -> str:
    """A PostgreSQL URL as SQLAlchemy takes it. Raises UsageError, which does not show the URL."""
    try:
        url = make_url(text.strip())
    except ArgumentError:
        raise UsageError(f"{source} is no URL of a database: use {EXAMPLE}") from None
    if url.drivername not in ("postgres", "postgresql", DRIVER) or not url.database:
        raise UsageError(f"{source} must be a URL of PostgreSQL: {EXAMPLE}")
    return url.set(drivername=DRIVER).render_as_string(hide_password=False)


def has_password(url: str) -> bool:
    """Whether a URL has a secret that nobody else may see."""
    parts = make_url(url)
    return parts.password is not None or "password" in parts.query


def read_url(file: str) -> str:
    """The URL in a file. Raises Error."""
    try:
        return checked_url(Path(file).read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise Error(f"{file}, which has the URL of the database, can't be read: {reason}") from None


# --- the database of a data directory -------------------------------------------------------------


def url_of(settings: Settings) -> str:
    """The URL of the workspace's database. Raises Error."""
    return settings.database or noted_url(settings.data) or f"sqlite:///{settings.data / DATABASE}"


def noted_url(data: Path) -> str:
    """The URL that the data directory names; empty if its database is a file there. Raises Error.

    The note has a URL, or the name of a file that has it: then a password changes there alone.
    """
    try:
        note = json.loads(data.joinpath(NOTE).read_text(encoding="utf-8"))
        return read_url(note["file"]) if "file" in note else checked_url(note["url"], NOTE)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Error(f"{data / NOTE} can't be read: {error}") from None


def note_url(data: Path, url: str, file: str | None) -> None:
    """Let commands with this data directory find the database. Raises OSError."""
    text = json.dumps({"file": file} if file else {"url": url}) + "\n"
    place = data / NOTE
    if not place.exists() or place.read_text(encoding="utf-8") != text:
        new = data / f"{NOTE}.new"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        new.replace(place)


# --- engines --------------------------------------------------------------------------------------


def make_engine(url: str) -> Engine:
    """The engine of a database. Raises Error if the driver is missing."""
    if not url.startswith("sqlite"):
        return _make_postgresql(make_url(url))
    engine = create_engine(url, **SQLITE_POOL, connect_args={"timeout": BUSY_TIMEOUT})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # By default Python's driver begins no transaction before the first write.
    connection.isolation_level = None
    # Agents forget what was acknowledged, so each commit must survive a power loss: FULL syncs it.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


class Connections:
    """The sockets of a database's connections, which can be cut while somebody waits on them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, connection: Any) -> None:
        """Know a connection of psycopg."""
        with self._lock:
            self._open.add(connection)

    def cut(self) -> None:
        """Shut all down: whoever waits on one gets an error."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            failures = contextlib.suppress(Exception)  # of psycopg, if it is closed, or OSError
            with failures, socket.socket(fileno=os.dup(connection.fileno())) as sock:
                sock.shutdown(socket.SHUT_RDWR)


def connect_apart(url: str) -> Any:
    """A connection of psycopg for one thread alone. Raises psycopg.Error."""
    import psycopg

    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    keepalive: dict[str, Any] = {**KEEPALIVE}
    connection = psycopg.connect(plain, autocommit=True, **keepalive)
    for statement in WATCH:
        connection.execute(statement)
    return connection


def _make_postgresql(url: URL) -> Engine:
    if importlib.util.find_spec("psycopg") is None:
        hint = "install cachix-deploy with its extra `postgresql`"
        raise Error(f"the driver of PostgreSQL, psycopg, is missing: {hint}")
    arguments = {name: value for name, value in KEEPALIVE.items() if name not in url.query}
    # A connection that broke while nobody used it is replaced before anybody does.
    engine = create_engine(url, **POOL, connect_args=arguments, pool_pre_ping=True)
    event.listen(engine, "connect", _configure_postgresql)
    return engine


def _configure_postgresql(connection: Any, _record: Any) -> None:
    from psycopg.types.string import StrDumper

    class Cleaned(StrDumper):
        """PostgreSQL's texts have no NUL."""

        def dump(self, text: str) -> Any:
            return super().dump(text.replace("\0", "\N{REPLACEMENT CHARACTER}"))

    connection.adapters.register_dumper(str, Cleaned)
    connection.autocommit = True
    for statement in (*LIMITS, *WATCH):
        connection.execute(statement)
    connection.autocommit = False


def place_of(settings: Settings) -> str:
    """The database for people: without a password."""
    url = make_url(url_of(settings))
    if url.drivername.startswith("sqlite"):
        return f"the data directory {settings.data}"
    host = url.host or url.query.get("host") or "this machine"
    return f"the database {url.database} of PostgreSQL at {host}"
