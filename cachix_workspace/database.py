"""The database: engine, transactions, migrations. Nothing above this file knows which one it is."""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, delete, event, inspect, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from cachix_console import tell
from cachix_protocol import Error, __version__, utc_now
from cachix_workspace import directory, engine, postgres
from cachix_workspace.engine import BUSY_TIMEOUT, make_engine, place_of, url_of
from cachix_workspace.settings import DATABASE, Settings
from cachix_workspace.tables import meta, metadata

SCHEMA = 10  # the newest: see migrations/versions
MIGRATIONS = Path(__file__).parent / "migrations"
ATTEMPTS = 5  # of a migration, while others use the tables
IN_THE_WAY = ("40P01", "55P03")  # PostgreSQL's words for a deadlock, and a lock that it can't have


class Lock(enum.Enum):
    """How a transaction that writes goes together with others, on PostgreSQL.

    SQLite has one writer at a time whatever this says.
    """

    ALONE = "pg_advisory_xact_lock"  # with no other that is ALONE or SHARED
    SHARED = "pg_advisory_xact_lock_shared"  # with none that is ALONE; it locks rows
    ROWS = ""  # with any: it locks the rows that it decides by


WRITERS = 0x63616368  # the number of the lock: "cach"


class Database:
    """One database: `read()` and `write()` are transactions, committed unless the block raises."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = make_engine(url)
        self._connections = engine.Connections()
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # SQLite has one writer, and itself waits by sleeping, up to 100 ms at a time.
        self._writer = threading.Lock() if self.is_sqlite else None
        snapshot = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._reader = self.engine
        if not self.is_sqlite:
            event.listen(self.engine, "connect", lambda raw, _: self._connections.add(raw))
            self._reader = self.engine.execution_options(**snapshot)

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one snapshot."""
        with self._reader.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self, lock: Lock = Lock.ALONE) -> Iterator[Connection]:
        """A transaction that writes; on SQLite it holds the write lock from its start.

        On PostgreSQL it sees what was committed before each of its statements.
        """
        with contextlib.ExitStack() as stack:
            if self._writer is not None:
                if not self._writer.acquire(timeout=BUSY_TIMEOUT):
                    raise Error("the database is busy: try again")
                stack.callback(self._writer.release)
            connection = stack.enter_context(self.engine.connect()).execution_options(write=True)
            stack.enter_context(connection.begin())
            if lock.value and not self.is_sqlite:
                connection.execute(text(f"SELECT {lock.value}({WRITERS})"))
            yield connection

    def connect_apart(self) -> Any:
        """A connection to PostgreSQL for one thread alone, which `cut` cuts too."""
        connection = engine.connect_apart(self.url)
        self._connections.add(connection)
        return connection

    def cut(self) -> None:
        """Break all connections to PostgreSQL: whoever waits for an answer gets an error."""
        self._connections.cut()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_database(settings: Settings, create: bool = False) -> Database:
    """Open the workspace's database and migrate it to the newest schema. Raises Error.

    With `create` the data directory (0700) and an empty database are made if they are missing.
    """
    path, url = Path(settings.data), url_of(settings)
    is_file = url.startswith("sqlite")
    try:
        if is_file and not create and not path.joinpath(DATABASE).exists():
            raise Error(_missing(path))
        directory.prepare(path, has_files=not is_file)
        database = Database(url)
        if not (is_file or create):
            _check_there(database, path)
        schema = _schema_of(database, path)
        if schema < SCHEMA:
            _back_up(database, settings, schema)
            _upgrade(database)
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        raise Error(unusable(settings, error)) from None
    return database


def unusable(settings: Settings, error: Exception) -> str:
    """The sentence on a database that can't be used."""
    if url_of(settings).startswith("sqlite") or isinstance(error, OSError):
        return directory.unusable(Path(settings.data), error)
    return f"{place_of(settings)} can't be used: {reason_of(error)}"


def _missing(path: Path) -> str:
    hint = f"`cachix-workspace init --data={path}` makes one"
    return f"no workspace at {path}: name its directory with --data, or {hint}"


def _check_there(database: Database, path: Path) -> None:
    """Raises Error if PostgreSQL has no workspace."""
    with database.read() as connection:
        if not inspect(connection).has_table("meta"):
            hint = "`cachix-workspace init` makes one"
            raise Error(f"the database that {path} names has no workspace: {hint}")


def _schema_of(database: Database, path: Path) -> int:
    """The schema of a database, which is made if there is none. Raises Error or SQLAlchemyError.

    A full disk lets no database be opened, unless a little of it was kept.
    """
    try:
        with database.write() as connection:
            return prepare(connection)
    except OperationalError as error:
        database.close()
        locked = "locked" in reason_of(error)
        if not database.is_sqlite or locked or not directory.release_reserve(path):
            raise
        with database.write() as connection:
            return prepare(connection)


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


def _upgrade(database: Database) -> None:
    """Migrate. Transactions of nodes that serve may be in the way: then it is tried again.

    Raises SQLAlchemyError.
    """
    for left in reversed(range(ATTEMPTS)):
        try:
            with database.write() as connection:
                migrate(connection)
                return
        except OperationalError as error:
            if not left or getattr(error.orig, "sqlstate", None) not in IN_THE_WAY:
                raise
        time.sleep(1.0)


def migrate(connection: Connection) -> None:
    """Bring an older schema to the newest one. Another process may have done so meanwhile."""
    schema = prepare(connection)
    if schema < SCHEMA:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))  # tables may be large
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


def _back_up(database: Database, settings: Settings, schema: int) -> None:
    """Copy the database before a migration. Raises OSError, sqlite3.Error or Error."""
    if database.is_sqlite:
        target = _copy(Path(settings.data), schema)
    else:
        target = Path(settings.data) / f"workspace.dump.schema-{schema}"
        target.unlink(missing_ok=True)
        postgres.dump(url_of(settings), target)
    tell(f"the database gets schema {SCHEMA}; a backup with schema {schema} is in {target}")


def _copy(place: Path, schema: int) -> Path:
    source, target = place / DATABASE, place / f"{DATABASE}.schema-{schema}"
    target.unlink(missing_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with contextlib.ExitStack() as stack:
        old, new = (
            stack.enter_context(contextlib.closing(sqlite3.connect(path)))
            for path in (source, target)
        )
        old.backup(new)
    return target


def reason_of(error: Exception) -> str:
    """The reason why the database can't be used, in one line."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


def _insert(connection: Connection, table: Table) -> Any:
    """An insert that knows what to do where the row is there already."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return insert(table)


def upsert(connection: Connection, table: Table, key: Any, own: Any, /, **values: Any) -> None:
    """Add a row, or change the one that has the same key."""
    query = _insert(connection, table).values({key: own, **values})
    connection.execute(query.on_conflict_do_update(index_elements=[key], set_=values))


def add_missing(connection: Connection, table: Table, /, **values: Any) -> None:
    """Add a row, unless there is one with the same key or the same unique name."""
    add_all_missing(connection, table, [values])


def add_all_missing(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Add those rows that have no key, and no unique name, of one that is there."""
    connection.execute(_insert(connection, table).on_conflict_do_nothing(), rows)


def get_meta(connection: Connection, key: str) -> str | None:
    """A value of the meta table; None if it was never put."""
    return connection.execute(select(meta.c.value).where(meta.c.key == key)).scalar_one_or_none()


def put_meta(connection: Connection, key: str, value: str) -> None:
    """Set a value of the meta table."""
    upsert(connection, meta, meta.c.key, key, value=value)


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


CACHE_STORE = "cache_store"  # the key of the place of the caches, if it is not the usual one
CHANGED = "changed"  # when a command beside the server changed what agents or pages have to hear of


def note_change(connection: Connection) -> None:
    """Let a running server look at everything: a command has changed what concerns its agents."""
    put_meta(connection, CHANGED, f"{utc_now()} {secrets.token_hex(4)}")
