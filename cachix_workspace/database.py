"""The database: engine, transactions, migrations. Nothing above this file knows which one it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

from sqlalchemy import Connection, Engine, create_engine, delete, event, insert, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from cachix_protocol import Error
from cachix_workspace.settings import DATABASE, Settings
from cachix_workspace.tables import meta, metadata

BUSY_TIMEOUT = 10.0  # seconds that a transaction waits for another one to end

ADDED_IN_2 = (
    *[("agents", "client")],
    *[("deployments", name) for name in ("step", "outcome", "cancel_requested", "cancel_refused")],
)


def _add_outcomes(connection: Connection) -> None:
    """Schema 2: what agents of ours report, and requests to cancel."""
    for table, column in ADDED_IN_2:
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column} VARCHAR")


# Entry N takes version N + 1 to N + 2; a new database gets the newest schema at once.
MIGRATIONS: list[Callable[[Connection], None]] = [_add_outcomes]
VERSION = 1 + len(MIGRATIONS)


class Database:
    """One database: `read()` and `write()` are transactions, committed unless the block raises."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        # SQLite has one writer, and itself waits by sleeping, up to 100 ms at a time.
        self._writer = threading.Lock() if self.engine.dialect.name == "sqlite" else None

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one snapshot."""
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
        """Close all connections."""
        self.engine.dispose()


def _engine(url: str) -> Engine:
    pool = {"pool_size": 8, "max_overflow": 24, "pool_timeout": 20}
    if not url.startswith("sqlite"):
        return create_engine(url, **pool)
    engine = create_engine(url, **pool, connect_args={"timeout": BUSY_TIMEOUT})
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


def open_database(settings: Settings, create: bool = False) -> Database:
    """Open the workspace's database and migrate it to the newest schema. Raises Error.

    With `create` the data directory (0700) and an empty database are made if they are missing.
    """
    path = Path(settings.data)
    if not create and not path.joinpath(DATABASE).exists():
        raise Error(
            f"there is no workspace in {path}: name its directory with --data, "
            "or start one there with `cachix-workspace token create`"
        )
    try:
        _prepare_directory(path)
        database = Database(settings.database_url)
        with database.write() as connection:
            migrate(connection)
    except (OSError, SQLAlchemyError) as error:
        reason = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
        raise Error(f"the data directory {path} can't be used: {reason}") from None
    return database


def _prepare_directory(directory: Path) -> None:
    """Make the data directory private. Raises OSError, or Error if it holds other files."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not directory.joinpath(DATABASE).exists() and any(directory.iterdir()):
        raise Error(
            f"the data directory {directory} holds other files: "
            "name an empty directory, or one that does not exist yet"
        )
    if directory.stat().st_mode & 0o077:
        directory.chmod(0o700)  # whoever made it for the service may have left it open to others


def migrate(connection: Connection) -> None:
    """Bring the schema to VERSION. Raises Error if a newer program wrote the database."""
    if not inspect(connection).has_table("meta"):
        metadata.create_all(connection)
        put_meta(connection, "version", str(VERSION))
        return
    version = int(get_meta(connection, "version") or 1)
    if version > VERSION:
        raise Error(
            f"the database has schema {version}, and this program knows none after {VERSION}: "
            "use a newer cachix-workspace"
        )
    for step in MIGRATIONS[version - 1 :]:
        step(connection)
    if version < VERSION:
        put_meta(connection, "version", str(VERSION))


def get_meta(connection: Connection, key: str) -> str | None:
    """A value of the meta table; None if it was never put."""
    return connection.execute(select(meta.c.value).where(meta.c.key == key)).scalar_one_or_none()


def put_meta(connection: Connection, key: str, value: str) -> None:
    """Set a value of the meta table."""
    connection.execute(delete(meta).where(meta.c.key == key))
    connection.execute(insert(meta).values(key=key, value=value))
