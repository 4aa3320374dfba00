"""Schema, migrations and transactions. Nothing above this file knows which database it is.

Times are text as the protocol writes them (RFC 3339, UTC), so that they sort and need no conversion.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
)
from sqlalchemy.exc import SQLAlchemyError

from cachix_workspace import DATABASE, Error, Settings

BUSY_TIMEOUT = 10.0  # seconds that a transaction waits for another process, such as the command line beside a server

metadata = MetaData()

meta = Table(
    "meta", metadata, Column("key", String, primary_key=True), Column("value", Text, nullable=False)
)

caches = Table(
    "caches",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("public", Boolean, nullable=False),
    Column("key_name", String, nullable=False),
    Column("public_key", String, nullable=False),  # base64, without the name
    Column("created_on", String, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column(
        "hash", String, nullable=False, unique=True
    ),  # SHA-256: the secret has 256 random bits of its own
    Column("description", Text, nullable=False),
    Column("cache_id", ForeignKey("caches.id")),
    Column("created_on", String, nullable=False),
    Column("expires_on", String),
    Column("revoked_on", String),
)

agents = Table(
    "agents",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("system", String, nullable=False),
    Column("version", String, nullable=False),
    Column("created_on", String, nullable=False),
    Column("seen_on", String, nullable=False),
    Column("connected", Boolean, nullable=False),
    Column("last_index", Integer, nullable=False),
)

deployments = Table(
    "deployments",
    metadata,
    Column("id", String, primary_key=True),
    Column("agent_id", ForeignKey("agents.id"), nullable=False),
    Column("index", Integer, nullable=False),
    Column("store_path", String, nullable=False),
    Column("rollback_script", String),
    Column("status", String, nullable=False),
    Column("reason", Text),
    Column("closure_size", BigInteger),  # bytes
    Column("created_on", String, nullable=False),
    Column("started_on", String),
    Column("finished_on", String),
    Column("log_next", Integer, nullable=False),  # the number of log lines
    UniqueConstraint("agent_id", "index"),
    Index("deployments_by_status", "agent_id", "status"),
)

log_chunks = Table(
    "log_chunks",
    metadata,
    Column("deployment_id", ForeignKey("deployments.id"), primary_key=True),
    Column("first", Integer, primary_key=True),  # index of the first line
    Column("count", Integer, nullable=False),
    Column("body", Text, nullable=False),  # the lines' JSON objects, joined by newlines
)

# Entry N takes version N + 1 to N + 2; a new database gets the newest schema at once.
MIGRATIONS: list[Callable[[Connection], None]] = []
VERSION = 1 + len(MIGRATIONS)


class Database:
    """One database: `read()` and `write()` are transactions, committed unless the block raises."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        # SQLite has one writer. Threads queue here, since its own waiting is by sleeping, up to 100 ms at a time.
        self._writer = threading.Lock() if self.engine.dialect.name == "sqlite" else None

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A snapshot."""
        with self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes; on SQLite it holds the write lock from its start."""
        with contextlib.ExitStack() as stack:
            if self._writer is not None:
                if not self._writer.acquire(timeout=BUSY_TIMEOUT):
                    raise Error("the database is busy: try again")
                stack.callback(self._writer.release)
            connection = stack.enter_context(self.engine.connect()).execution_options(write=True)
            stack.enter_context(connection.begin())
            yield connection

    def close(self) -> None:
        self.engine.dispose()


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_size=8, max_overflow=24, pool_timeout=20)
    engine = create_engine(
        url, pool_size=8, max_overflow=24, pool_timeout=20, connect_args={"timeout": BUSY_TIMEOUT}
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = (
        None  # Python's own rule begins no transaction before the first write
    )
    # An acknowledged report must survive a power loss, so every commit is synced: the agent forgets what it reported.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def open_database(settings: Settings, create: bool = False) -> Database:
    """The workspace's database, brought to the newest schema. Raises Error with what is wrong.

    `create` makes the data directory (0700) and an empty database where there is none.
    """
    path = Path(settings.data)
    if not create and not path.joinpath(DATABASE).exists():
        raise Error(
            f"there is no workspace in {path}: name it by --data, or create a token to begin one"
        )
    try:
        _own(path)
        database = Database(settings.database_url)
        with database.write() as connection:
            migrate(connection)
    except (OSError, SQLAlchemyError) as error:
        reason = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
        raise Error(f"the data directory {path} can't be used: {reason}") from None
    return database


def _own(directory: Path) -> None:
    """Make the data directory, private; one that was there must be ours. Raises Error, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not directory.joinpath(DATABASE).exists() and any(directory.iterdir()):
        raise Error(
            f"the data directory {directory} holds other files: name an empty one, or one that does not exist"
        )
    if directory.stat().st_mode & 0o077:
        directory.chmod(0o700)  # as it is made for a service, it may be open to others


def migrate(connection: Connection) -> None:
    """Bring the schema to VERSION. Raises Error where a newer program wrote the database."""
    if not inspect(connection).has_table("meta"):
        metadata.create_all(connection)
        put_meta(connection, "version", str(VERSION))
        return
    version = int(get_meta(connection, "version") or 1)
    if version > VERSION:
        raise Error(
            f"the database has schema {version}, this program knows {VERSION}: use a newer cachix-workspace"
        )
    for step in MIGRATIONS[version - 1 :]:
        step(connection)
    if version < VERSION:
        put_meta(connection, "version", str(VERSION))


def get_meta(connection: Connection, key: str) -> str | None:
    return connection.execute(select(meta.c.value).where(meta.c.key == key)).scalar_one_or_none()


def put_meta(connection: Connection, key: str, value: str) -> None:
    connection.execute(delete(meta).where(meta.c.key == key))
    connection.execute(insert(meta).values(key=key, value=value))
