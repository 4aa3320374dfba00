"""The database: engine, transactions, migrations. Nothing above this file knows which one it is."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, delete, event, insert, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from cachix_console import tell
from cachix_protocol import Error, __version__, utc_now
from cachix_workspace.settings import DATABASE, Settings
from cachix_workspace.tables import meta, metadata

BUSY_TIMEOUT = 10.0  # seconds that a transaction waits for another one to end

SCHEMA = 8  # the newest: see migrations/versions
MIGRATIONS = Path(__file__).parent / "migrations"


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
        hint = f"`cachix-workspace init --data={path}` makes one"
        raise Error(f"no workspace at {path}: name its directory with --data, or {hint}")
    try:
        _prepare_directory(path)
        database = Database(settings.database_url)
        with database.write() as connection:
            schema = prepare(connection)
        if schema < SCHEMA:
            _back_up(path, schema)
            with database.write() as connection:
                migrate(connection)
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
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
    for file in directory.glob(f"{DATABASE}*"):
        if file.stat().st_mode & 0o077:  # earlier releases did not see to it
            file.chmod(0o600)


def prepare(connection: Connection) -> int:
    """Make the tables of a new database; the schema that there is.

    Raises Error if a newer program wrote the database.
    """
    if not inspect(connection).has_table("meta"):
        metadata.create_all(connection)
        _note_schema(connection)
    schema = int(get_meta(connection, "version") or 1)
    if schema > SCHEMA:
        newer = get_meta(connection, "program")
        program = f"cachix-workspace {newer} or newer" if newer else "a newer cachix-workspace"
        raise Error(
            f"the database has schema {schema}, and this program, {__version__}, knows none after "
            f"{SCHEMA}: use {program}"
        )
    return schema


def migrate(connection: Connection) -> None:
    """Bring an older schema to the newest one. Another process may have done so meanwhile."""
    schema = prepare(connection)
    if schema < SCHEMA:
        _alembic("stamp", connection, schema)
        _alembic("upgrade", connection, SCHEMA)
        _note_schema(connection)


def _alembic(command: str, connection: Connection, schema: int) -> None:
    """Run a command of Alembic in the connection's transaction. It is not loaded otherwise."""
    from alembic import command as commands
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    getattr(commands, command)(config, str(schema))


def _note_schema(connection: Connection) -> None:
    """Note the newest schema, and which program has it, for programs that are older."""
    put_meta(connection, "version", str(SCHEMA))
    put_meta(connection, "program", __version__)


def _back_up(directory: Path, schema: int) -> None:
    """Copy the database before a migration. Raises OSError or sqlite3.Error."""
    source, target = directory / DATABASE, directory / f"{DATABASE}.schema-{schema}"
    target.unlink(missing_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with contextlib.ExitStack() as stack:
        old, new = (
            stack.enter_context(contextlib.closing(sqlite3.connect(path)))
            for path in (source, target)
        )
        old.backup(new)
    tell(f"the database gets schema {SCHEMA}; a backup with schema {schema} is in {target}")


def get_meta(connection: Connection, key: str) -> str | None:
    """A value of the meta table; None if it was never put."""
    return connection.execute(select(meta.c.value).where(meta.c.key == key)).scalar_one_or_none()


def put_meta(connection: Connection, key: str, value: str) -> None:
    """Set a value of the meta table."""
    connection.execute(delete(meta).where(meta.c.key == key))
    connection.execute(insert(meta).values(key=key, value=value))


def delete_meta(connection: Connection, key: str) -> None:
    """Remove a value of the meta table, if it is there."""
    connection.execute(delete(meta).where(meta.c.key == key))


def secret_key(connection: Connection) -> str:
    """The key that signs Flask's cookies: made once, so that forms outlive a restart."""
    key = get_meta(connection, "secret_key")
    if key is None:
        key = secrets.token_hex(32)
        put_meta(connection, "secret_key", key)
    return key


CHANGED = "changed"  # when a command beside the server changed what agents or pages have to hear of


def note_change(connection: Connection) -> None:
    """Let a running server look at everything: a command has changed what concerns its agents."""
    put_meta(connection, CHANGED, f"{utc_now()} {secrets.token_hex(4)}")
